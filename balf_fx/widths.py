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

_DELAYED = 64  # removals that are applied together
_NOTHING = 1e-30  # a variance that may be divided by, but is none


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
        name: of the width, after the layer that reads it, or that writes the queries.
        producers: the nodes of the layers that write the features.
        rows: for each producer its rows that write them, head by head, heads * features (queries: * repeat) of them.
        consumers: the nodes of the layers that read them, in the order of columns that the producers' rows have.
        between: nodes whose parameters or constants have one entry for each feature.
        product: of heads: the node that sums over the features or averages them; else "".
        operands: of heads: how the product reads each producer.
        sequence_first: of heads: positions lead in the producers' outputs, in place of the batch.
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
    product: str = ""
    operands: tuple[Operand, ...] = ()
    sequence_first: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers on both sides."""
        return tuple(dict.fromkeys((*self.producers, *self.consumers)))


@dataclass(frozen=True)
class WidthMaps:
    """The maps of one width at one size: features h give way to R h, and are read as L R h.

    Attributes:
        left, right: L [heads, features, r] and R [heads, r, features].
        kept: [r], the features that R chooses, of channels; None where R is no choice.
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
        distortion: at sizes 0 .. features, in the metric of the layer that minds it (`passes.ScoreWidths`).
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


def conditioned(covariance: Tensor, share: float = 1e-4, noise: float = 2e-6) -> Tensor:
    """A covariance [F, F] that has an inverse: plus a share of the mean eigenvalue and of the largest.

    Features that follow from each other, or never vary, are then no special case, nor is what sums in float32 leave.
    """
    symmetric = (covariance + covariance.mT) / 2
    vector = symmetric.sum(-1, keepdim=True)
    for _ in range(8):  # the power method, to the order of magnitude
        vector = symmetric @ (vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny))
    floor = share * symmetric.diagonal().mean() + noise * vector.norm()
    identity = torch.eye(len(symmetric), dtype=symmetric.dtype, device=symmetric.device)
    damped: Tensor = symmetric + floor.clamp_min(_NOTHING) * identity
    return damped


def predict(covariance: Tensor, kept: Tensor) -> Tensor:
    """L [F, r], the best linear prediction of all features from the kept ones: C[:, K] C[K, K]^-1.

    Args:
        covariance: C [F, F] float64, `conditioned`.
    """
    solved: Tensor = torch.linalg.solve(covariance[kept][:, kept], covariance[kept])
    return solved.mT


def prediction_error(covariance: Tensor, moment: Tensor, metric: Tensor, kept: Tensor) -> float:
    """What predicting all features from the kept ones costs on other samples than those it was learned from.

    Args:
        covariance: C [F, F] of the samples that the prediction is learned from, `conditioned`.
        moment: [F, F], of the others, around the first samples' mean.
        metric: A [F, F], what errors in the features cost the others.
    """
    gone = torch.ones(len(covariance), dtype=torch.bool, device=covariance.device)
    gone[kept] = False
    rest = torch.nonzero(gone).flatten()
    predicted = torch.linalg.solve(covariance[kept][:, kept], covariance[kept][:, rest]).mT
    crossed = predicted @ moment[kept][:, rest]
    left = moment[rest][:, rest] - crossed - crossed.mT + predicted @ moment[kept][:, kept] @ predicted.mT
    return float((metric[rest][:, rest] * left).sum())


def eliminate(covariances: Sequence[Tensor], metrics: Sequence[Tensor]) -> tuple[Tensor, list[float]]:
    """Features in the order in which to give them up, each the one whose loss costs least given those gone before.

    Feature j costs |w_j|^2_A / (C^-1)_jj: what the readers' error grows by when the others take over as well as they
    can (Hassibi & Stork 1993, for a whole column in a metric). What several readers lose adds up.

    Args:
        covariances: for each reader, C [F, F] float64 of the features as it sees them, `conditioned`.
        metrics: for each reader, A [F, F], what errors in the features cost it.

    Returns:
        order [F], the last to go first, and the error at sizes 0 .. F.
    """
    # What costs little may cost so little that its square is no number: all is done in units of the mean.
    units = [covariance.diagonal().mean() for covariance in covariances]
    scaled = [unit * metric for unit, metric in zip(units, metrics, strict=True)]
    whole = torch.stack([metric.diagonal().mean() for metric in scaled]).max().clamp_min(_NOTHING)
    states = [
        _Elimination(torch.linalg.inv(covariance / unit), metric / whole)
        for covariance, unit, metric in zip(covariances, units, scaled, strict=True)
    ]
    left = torch.arange(len(covariances[0]))
    gone: list[int] = []
    errors = [0.0]
    while len(left):
        alive = torch.ones(len(left), dtype=torch.bool)
        for _ in range(min(_DELAYED, len(left))):
            costs = torch.stack([state.costs() for state in states]).sum(0).cpu()
            candidates = torch.nonzero(alive).flatten()
            index = int(candidates[costs[candidates].argmin()])
            gone.append(int(left[index]))
            errors.append(errors[-1] + float(costs[index]))
            alive[index] = False
            for state in states:
                state.remove(index)
        for state in states:
            state.compact(alive)
        left = left[alive]
    return torch.tensor(gone[::-1]), [float(whole) * error for error in errors[::-1]]


class _Elimination:
    """One reader's inverse covariance M and metric A, as they are once the features gone so far are predicted.

    Each removal changes both by a few vectors. They are held back and applied together, as LAPACK's blocked
    factorisations do: M - U U^T and A - P Q^T - Q P^T.
    """

    def __init__(self, inverse: Tensor, metric: Tensor) -> None:
        self.inverse, self.metric = inverse, metric
        self._restart()

    def _restart(self) -> None:
        self.inverse_diagonal = self.inverse.diagonal().clone()
        self.metric_diagonal = self.metric.diagonal().clone()
        self.u, self.p, self.q = (self.inverse.new_zeros(len(self.inverse), _DELAYED) for _ in range(3))
        self.held = 0

    def costs(self) -> Tensor:
        """What each feature's removal would cost."""
        tiny = torch.finfo(self.inverse.dtype).tiny
        return self.metric_diagonal.clamp_min(0) / self.inverse_diagonal.clamp_min(tiny)

    def remove(self, index: int) -> None:
        u, p, q = (held[:, : self.held] for held in (self.u, self.p, self.q))
        row = self.inverse[index] - u @ u[index]
        own = self.metric[index] - p @ q[index] - q @ p[index]
        share = row / row[index].clamp_min(torch.finfo(row.dtype).tiny)
        self.u[:, self.held] = row / row[index].clamp_min(torch.finfo(row.dtype).tiny).sqrt()
        self.p[:, self.held] = own - own[index] / 2 * share
        self.q[:, self.held] = share
        self.inverse_diagonal -= self.u[:, self.held].square()
        self.metric_diagonal -= 2 * self.p[:, self.held] * share
        self.held += 1

    def compact(self, alive: Tensor) -> None:
        """Apply what was held back, and drop the features that are gone."""
        alive = alive.to(self.inverse.device)
        u, p, q = (held[alive, : self.held] for held in (self.u, self.p, self.q))
        self.inverse = self.inverse[alive][:, alive] - u @ u.mT
        crossed = p @ q.mT
        self.metric = self.metric[alive][:, alive] - crossed - crossed.mT
        self._restart()


def joint_widths(widths: Sequence[Width]) -> list[list[int]]:
    """Indices of widths that share layers or a product, directly or through others."""
    touched = [{*width.layers, width.product} - {""} for width in widths]
    groups: list[list[int]] = []
    for index, own in enumerate(touched):
        joined = [group for group in groups if any(own & touched[i] for i in group)]
        groups = [group for group in groups if group not in joined]
        groups.append(sorted([index, *(i for group in joined for i in group)]))
    return groups
