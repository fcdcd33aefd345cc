"""Which features to give up first: elimination in a metric (Hassibi & Stork 1993)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DELAYED = 64  # removals that are applied together


_NOTHING = 1e-30  # a variance that may be divided by, but is none


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
