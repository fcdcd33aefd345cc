"""Widths: features inside a model that can be replaced by fewer features.

A *width* is a set of features between layers: the hidden features of a feed-forward block or of a bottleneck, the
features of an attention head over which queries and keys are multiplied, or those of its values. A rank only saves
something below O D / (O + D), but each removed feature saves its share of the layers on both sides.

Shapes: a width has `heads` heads of `features` features, of which each keeps r. Where `repeat` > 1, that many heads of
the reader (queries, or attention outputs) share one head of the writer (keys and values), as in grouped-query
attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from balf_fx.graph.curves import fits

WidthKind = Literal["channels", "queries", "values"]


HOSTS = {"queries": 1, "values": 0}
"""The producer, by its number, in which heads of a width may get identity blocks: that of keys, or of values."""


@dataclass(frozen=True)
class Operand:
    """How a product reads heads of features.

    Attributes:
        position: the position among the product's arguments.
        scale: the factor by which the features are multiplied before.
        transposed: whether features come before positions.
        copies: the number of times that each head is repeated.
        merged: whether the batch and the heads are one axis.
        source: the reshape of the producer's output from whose last axis the features are read; "" if that is the
            output itself.
    """

    position: int
    scale: float = 1.0
    transposed: bool = False
    copies: int = 1
    merged: bool = False
    source: str = ""


@dataclass(frozen=True)
class Reader:
    """A node that reads some rows of a value, the output features of a layer on one of its axes.

    The node's value is source[rows].unflatten(axis, sizes).permute(axes), with rows on the source's axis.

    Attributes:
        layers: the nodes of the layers that output the rows.
    """

    source: str
    axis: int
    node: str
    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    axes: tuple[int, ...]
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """A node that reads the shape or the type of a value that becomes narrower, or that nothing else needs any more.

    Attributes:
        source: the node from which it can be read.
        axes: for each axis of the value, the same axis of the source, or None if its size is a constant.
        shape: the shape of the value, of which only the constants are used.
    """

    node: str
    source: str
    axes: tuple[int | None, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class View:
    """A reshape that is given the number of features.

    Attributes:
        axis: the axis of the features in its result.
        layer: the layer all of whose output features it holds; "" if it holds the features of the width.
    """

    node: str
    axis: int
    layer: str = ""


@dataclass(frozen=True)
class Width:
    """Features whose number may be reduced. Nodes are stored by name, so that copies of a graph may share the record.

    * "channels": producers output the features, elementwise operations and convolutions with groups may process them,
      and consumers read them. Where values are concatenated, some of these hold only some of the features. A subset of
      the features is kept, from which the consumers predict the others by least squares.
    * "queries": two producers, of queries and of keys, are multiplied in a product that sums over the features of each
      head; there are no consumers. The basis of the features is arbitrary.
    * "values": one producer, one consumer, and an average over positions between them. The basis is arbitrary.

    Attributes:
        name: the name of the layer that reads the features, or that outputs the queries; unique among widths of one
            kind.
        producers: the nodes of the layers that output the features; one that outputs several values for each feature,
            such as a gate and what it scales, is listed for each of them.
        rows: the rows of each producer that output them, head by head: heads * features, for queries also * repeat.
        consumers: the nodes of the layers that read them; their columns have the order of the producers' rows.
        between: nodes whose parameters or constants have one entry for each feature, and convolutions each of whose
            groups outputs as many of the features as it reads.
        fused: the same with one entry for each row of `fused_layer`, before its several values are separated.
        fused_layer: the producer for `fused`.
        readers: for channels, the nodes that separate the values of such producers.
        views: reshapes that are given the number of features.
        sizes: nodes that read shapes on which the number of features has an effect.
        product: for heads, the node that sums over the features or averages them.
        operands: for heads, how the product reads each producer.
        sequence_first: for heads, whether positions come first in the producers' outputs, before the batch.
        step: sizes below the full one are multiples of it.
        block: for channels, so many features that follow each other stay or go together, as those that GroupNorm
            normalises together, or that a group of a convolution reads. `step` is a multiple of it.
        padded: whether the model has zeros in the places of removed features, so that products of heads and constants
            along the features keep their size.
        layer_names: `Site.name` of the producers and then of the consumers, each once; set by `passes.FindWidths`. In
            other graphs of the same model, nodes may have other names, but layers may not.
        held: for channels, the nodes that output or process only some of the features, and which these are, in the
            order of their rows or entries.
        read: the same for the nodes that read only some of them, in the order of their columns.
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
    fused: tuple[str, ...] = ()
    fused_layer: str = ""
    readers: tuple[Reader, ...] = ()
    views: tuple[View, ...] = ()
    sizes: tuple[Size, ...] = ()
    product: str | None = None
    operands: tuple[Operand, ...] = ()
    sequence_first: bool = False
    step: int = 1
    block: int = 1
    padded: bool = False
    layer_names: tuple[str, ...] = ()
    held: tuple[tuple[str, tuple[int, ...]], ...] = ()
    read: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def key(self) -> str:
        """Identifies the width in all graphs of the same model."""
        return f"{self.kind} {self.name}"

    @property
    def layers(self) -> tuple[str, ...]:
        """The nodes of the layers on both sides."""
        return tuple(dict.fromkeys((*self.producers, *self.consumers)))

    @property
    def least(self) -> int:
        """The least size, at which every layer holds some features."""
        return self.step * max(len(self.branches), 1)

    @property
    def branches(self) -> tuple[tuple[int, ...], ...]:
        """Sets of features that the same producers hold; none where all of these hold all features."""
        held = {name: frozenset(features) for name, features in self.held if name in self.producers}
        found: dict[tuple[str, ...], list[int]] = {}
        for feature in range(self.features if held else 0):
            found.setdefault(tuple(name for name, own in held.items() if feature in own), []).append(feature)
        return tuple(map(tuple, found.values()))

    def held_by(self, name: str) -> tuple[int, ...] | None:
        """The features that a node outputs or processes; None for all."""
        return dict(self.held).get(name)

    def read_by(self, name: str) -> tuple[int, ...] | None:
        """The features that a node reads; None for all."""
        return dict(self.read).get(name)


@dataclass(frozen=True)
class WidthMaps:
    """The maps of one width at one size: features h are replaced by R h, and read as L R h.

    Attributes:
        right: R [heads, r, features].
        kept: [r], the features that R selects, for channels; None if R does not select features.
        mean: [heads * repeat * features], E[h] at the reader, to whose bias W (I - L R) E[h] is added.
        predicted: returns L. For channels, this solves a system of equations, and few of the maps need it.
    """

    right: Tensor
    kept: Tensor | None
    mean: Tensor | None
    predicted: Callable[[], Tensor]

    @cached_property
    def left(self) -> Tensor:
        """L [heads, features, r]."""
        return self.predicted()


@dataclass(frozen=True)
class WidthCurve:
    """The error of each size of a width.

    Attributes:
        distortion: the error at sizes 0 .. features, in the metric of the layers that read it (`passes.ScoreWidths`).
        loss: the increase of the loss, to second order, when all features are removed.
        order: [features], for channels, the last one removed first.
        covariances: for channels, [F, F] float64 for each reader, of the F features that it reads.
        left, right: for heads, [heads, features, features]; at size r, left[..., :r] and right[:, :r].
        means: the mean for each reader, as in `WidthMaps`.
        fitted: the error at sizes 0 .. features on the samples by which features are chosen and predicted, where
            `distortion` is that on other samples; () where they are the same.
        half: the curve by the first half of the samples; None if the choice does not fit the samples (`fits_samples`).
    """

    distortion: tuple[float, ...]
    loss: float
    order: Tensor | None = None
    covariances: tuple[Tensor, ...] = ()
    left: Tensor | None = None
    right: Tensor | None = None
    means: tuple[Tensor, ...] = ()
    fitted: tuple[float, ...] = ()
    half: WidthCurve | None = None

    @property
    def fits_samples(self) -> bool:
        """Whether half of the features lose much more on other samples than on those that chose them."""
        size = len(self.distortion) // 2
        return fits(self.normalised(self.distortion[size]), self.optimism(size))

    def optimism(self, size: int) -> float:
        """How much more is lost on other samples than on those by which features are chosen, normalised; at least 0."""
        return max(self.normalised(self.distortion[size] - self.fitted[size]), 0.0) if self.fitted else 0.0

    def normalised(self, distortion: float) -> float:
        """`distortion` as a share of the distortion without any features."""
        return distortion / self.distortion[0] if self.distortion[0] > 0 else 0.0

    def kept(self, size: int) -> Tensor | None:
        """[size], the features that are kept, for channels; None for heads, which get a new basis."""
        return None if self.order is None else self.order[:size].sort().values

    def maps(self, size: int, reader: int = 0, held: Sequence[int] | None = None) -> WidthMaps:
        """The maps at a size, for one of the readers.

        Args:
            held: the features that it reads; None for all.
        """
        mean = self.means[reader] if self.means else None
        kept = self.kept(size)
        if kept is not None:
            kept = places(kept, held)
            covariance = self.covariances[reader]
            right = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)[kept].unsqueeze(0)
            return WidthMaps(right, kept, mean, lambda: predict(covariance, kept).unsqueeze(0))
        if self.left is None or self.right is None:
            raise ValueError("a curve has either an order of its features or a basis")
        left = self.left[..., :size]
        return WidthMaps(self.right[:, :size], None, mean, lambda: left)


def places(kept: Tensor, held: Sequence[int] | None) -> Tensor:
    """The places of features among those that are held, ascending, without those that are not held.

    Args:
        kept: the features, in any order if all are held.
        held: in any order; None for all features.
    """
    if held is None:
        return kept
    return torch.nonzero(torch.isin(torch.tensor(held, device=kept.device), kept)).flatten()


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
