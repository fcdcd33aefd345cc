"""Widths: features inside a model that fewer features can stand in for.

A *width* is what lies between layers: the hidden features of a feed-forward block or of a bottleneck, the channels of
an attention head in which queries meet keys, or in which values are averaged. Unlike a rank, which has to fall below
O D / (O + D) before it saves anything, every feature less saves its share of the layers on both sides.

Shapes: a width has `heads` heads of `features` features, which keep r each. Where `repeat` > 1, that many heads of the
reader (queries, or attention outputs) share one head of the writer (keys and values), as in grouped-query attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WidthKind = Literal["channels", "queries", "values"]


@dataclass(frozen=True)
class Operand:
    """How a product reads heads of features.

    Attributes:
        position: among the product's arguments.
        scale: what they are multiplied by on the way.
        transposed: features come before positions.
        copies: each head is repeated this many times.
    """

    position: int
    scale: float = 1.0
    transposed: bool = False
    copies: int = 1


@dataclass(frozen=True)
class Width:
    """Features that may become fewer. Nodes go by their names, so that copies of a graph may share the record.

    * "channels": producers write the features, elementwise operations and depthwise convolutions may work on them, and
      consumers read them. A choice of them stays, from which least squares predicts the others for the consumers.
    * "queries": two producers, of queries and of keys, meet in a product that sums over the features of each head;
      there are no consumers. Any basis of the features will do.
    * "values": one producer, one consumer, and between them an average over positions. Any basis will do.

    Attributes:
        name: after the layer that reads the features, or that writes the queries; unique among widths of one kind.
        producers: the nodes of the layers that write the features.
        rows: for each producer its rows that write them, head by head, heads * features (queries: * repeat) of them.
        consumers: the nodes of the layers that read them, in the order of columns that the producers' rows have.
        between: nodes whose parameters or constants have one entry for each feature.
        product: of heads: the node that sums over the features or averages them.
        operands: of heads: how the product reads each producer.
        sequence_first: of heads: positions lead in the producers' outputs, in place of the batch.
        layer_names: `Site.name` of the producers and then of the consumers, each once, by `passes.FindWidths`. Other
            graphs of the same model may call their nodes otherwise, but not their layers.
    """

    kind: WidthKind
    name: str
    features: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...] = ()
    heads: int = 1
    repeat: int = 1
    rows: tuple[tuple[int, ...], ...] = ()
    between: tuple[str, ...] = ()
    product: str | None = None
    operands: tuple[Operand, ...] = ()
    sequence_first: bool = False
    layer_names: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What identifies the width in all graphs of the same model."""
        return f"{self.kind} {self.name}"

    @property
    def layers(self) -> tuple[str, ...]:
        """The nodes of the layers on both sides."""
        return tuple(dict.fromkeys((*self.producers, *self.consumers)))


@dataclass(frozen=True)
class WidthMaps:
    """The maps of one width at one size: features h give way to R h, and are read as L R h.

    Attributes:
        left, right: L [heads, features, r] and R [heads, r, features].
        kept: [r], the features that R chooses, of channels; None where R does not choose.
        mean: [heads * repeat * features], E[h] as the reader sees it: what L R h lacks of it moves into its bias.
    """

    left: Tensor
    right: Tensor
    kept: Tensor | None
    mean: Tensor | None


@dataclass(frozen=True)
class WidthCurve:
    """What each size of a width loses.

    Attributes:
        distortion: at sizes 0 .. features, in the metric of the layers that read it (`passes.ScoreWidths`).
        loss: what the loss rises by, to second order, where no feature is left.
        order: [features], of channels, the last to go first.
        covariances: of channels, [features, features] float64 for each reader.
        left, right: [heads, features, features], of heads: at size r, left[..., :r] and right[:, :r].
        means: for each reader, as in `WidthMaps`.
    """

    distortion: tuple[float, ...]
    loss: float
    order: Tensor | None = None
    covariances: tuple[Tensor, ...] = ()
    left: Tensor | None = None
    right: Tensor | None = None
    means: tuple[Tensor, ...] = ()

    def normalised(self, distortion: float) -> float:
        """`distortion` as a share of what losing all features would do."""
        return distortion / self.distortion[0] if self.distortion[0] > 0 else 0.0

    def kept(self, size: int) -> Tensor | None:
        """[size], which features stay, of channels; None of heads, which get a new basis."""
        return None if self.order is None else self.order[:size].sort().values

    def maps(self, size: int, reader: int = 0) -> WidthMaps:
        """The maps at a size, for one of the readers."""
        mean = self.means[reader] if self.means else None
        kept = self.kept(size)
        if self.order is not None and kept is not None:
            left = predict(self.covariances[reader], kept).unsqueeze(0)
            right = torch.eye(len(self.order), dtype=left.dtype, device=left.device)[kept].unsqueeze(0)
            return WidthMaps(left, right, kept, mean)
        if self.left is None or self.right is None:
            raise ValueError("a curve has either an order of its features or a basis")
        return WidthMaps(self.left[..., :size], self.right[:, :size], None, mean)


def predict(covariance: Tensor, kept: Tensor) -> Tensor:
    """L [F, r], the best linear prediction of all features from the kept ones: C[:, K] C[K, K]^-1.

    Args:
        covariance: C [F, F] float64, `conditioned`.
    """
    solved: Tensor = torch.linalg.solve(covariance[kept][:, kept], covariance[kept])
    return solved.mT


def joint_widths(widths: Sequence[Width]) -> list[list[int]]:
    """Indices of widths that share layers or a product, directly or through others."""
    touched = [{*width.layers, width.product} - {None} for width in widths]
    groups: list[list[int]] = []
    for index, own in enumerate(touched):
        joined = [group for group in groups if any(own & touched[i] for i in group)]
        groups = [group for group in groups if group not in joined]
        groups.append(sorted([index, *(i for group in joined for i in group)]))
    return groups
