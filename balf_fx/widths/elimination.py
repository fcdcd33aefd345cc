"""Which features to give up first: elimination in a metric (Hassibi & Stork 1993)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_DELAYED = 64  # removals that are applied together


_DENSE = 0.75  # the share of features left at which the others are dropped


_NOTHING = 1e-30  # a variance that may be divided by, but is none


def conditioned(covariance: Tensor, share: float = 1e-4, noise: float = 2e-6) -> Tensor:
    """A covariance [F, F] that has an inverse: plus a share of the mean eigenvalue and of the largest.

    Features that follow from each other, or never vary, are then no special case, nor is what sums in float32 leave.
    """
    symmetric: Tensor = (covariance + covariance.mT) / 2
    vector = symmetric.sum(-1, keepdim=True)
    for _ in range(8):  # the power method, to the order of magnitude
        vector = symmetric @ (vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny))
    floor = share * symmetric.diagonal().mean() + noise * vector.norm()
    symmetric.diagonal().add_(floor.clamp_min(_NOTHING))
    return symmetric


def prediction_errors(
    covariance: Tensor, moment: Tensor, metric: Tensor, order: Tensor, sizes: Sequence[int]
) -> list[float]:
    """What predicting all features from the first ones costs on other samples than those it was learned from.

    Block by block of features, all others are predicted from it: what is left of them has a Schur complement of C as
    its covariance, and on the other samples the moment of h_R - T h_K, with T = C[R, K] C[K, K]^-1.

    Args:
        covariance: C [F, F] of the samples that the prediction is learned from, `conditioned`.
        moment: [F, F], of the others, around the first samples' mean.
        metric: A [F, F], what errors in the features cost the others.
        order: [F], the first features to keep first.
        sizes: how many are kept, ascending, below F.
    """
    order = order.to(covariance.device)
    covariance, moment, metric = (value[order][:, order] for value in (covariance, moment, metric))
    errors, before = [], 0
    for size in sizes:
        own, rest = slice(size - before), slice(size - before, None)
        predicted = torch.linalg.solve(covariance[own, own], covariance[own, rest]).mT
        crossed = moment[rest, own] - predicted @ moment[own, own] / 2
        pairs = torch.cat([predicted, crossed], 1), torch.cat([crossed, predicted], 1)
        moment = torch.addmm(moment[rest, rest], pairs[0], pairs[1].mT, alpha=-1)
        covariance = torch.addmm(covariance[rest, rest], predicted, covariance[own, rest], alpha=-1)
        metric = metric[rest, rest]
        errors.append(float((metric * moment).sum()))
        before = size
    return errors


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
    inverses = [_inverse(covariance / unit) for covariance, unit in zip(covariances, units, strict=True)]
    state = _Elimination(torch.stack(inverses), torch.stack(scaled).div_(whole))
    gone, costs = zip(*(state.remove_cheapest() for _ in range(len(covariances[0]))), strict=True)
    errors = itertools.accumulate(costs, initial=0.0)
    return torch.tensor(gone[::-1]), [float(whole) * error for error in errors][::-1]


def _inverse(covariance: Tensor) -> Tensor:
    """Of a positive definite matrix; NaN of any other."""
    root, failed = torch.linalg.cholesky_ex(covariance)
    inverse: Tensor = torch.cholesky_inverse(root).masked_fill_(failed > 0, torch.nan)
    return inverse


class _Elimination:
    """Each reader's inverse covariance M and metric A, as they are once the features gone so far are predicted.

    Each removal changes both by a few vectors. They are held back and applied together, as LAPACK's blocked
    factorisations do: M - U^T U and A - P^T Q - Q^T P. Rows and columns of features that are gone stay where they are,
    and are not read, until there are enough of them to be worth a copy.

    Shapes: of R readers, M and A are [R, F, F], and U, P and Q hold vectors [R, F] in their rows.
    """

    def __init__(self, inverse: Tensor, metric: Tensor) -> None:
        self.inverse, self.metric = inverse, metric
        self.features = torch.arange(inverse.shape[-1])
        self.gone = torch.zeros(inverse.shape[-1], dtype=torch.bool, device=inverse.device)
        self._restart()

    def _restart(self) -> None:
        readers, features = self.inverse.shape[:2]
        self.inverse_diagonal = self.inverse.diagonal(dim1=-2, dim2=-1).clone()
        self.metric_diagonal = self.metric.diagonal(dim1=-2, dim2=-1).clone()
        self.u, self.p, self.q = (self.inverse.new_empty(readers, _DELAYED, features) for _ in range(3))
        self.held = 0

    def remove_cheapest(self) -> tuple[int, float]:
        """A feature, and what its removal costs."""
        if self.held == _DELAYED:
            self._apply()
        numbers = torch.finfo(self.inverse.dtype)
        costs = (self.metric_diagonal.clamp_min(0) / self.inverse_diagonal.clamp_min(numbers.tiny)).sum(0)
        index = int(costs.clamp_max(numbers.max).masked_fill_(self.gone, torch.inf).argmin())
        u, p, q = (held[:, : self.held] for held in (self.u, self.p, self.q))
        row = torch.baddbmm(self.inverse[:, None, index], u[:, None, :, index], u, alpha=-1)[:, 0]
        own = torch.baddbmm(self.metric[:, None, index], p[:, None, :, index], q, alpha=-1)
        own = torch.baddbmm(own, q[:, None, :, index], p, alpha=-1)[:, 0]
        pivot = row[:, index, None].clamp_min(numbers.tiny)
        share = row / pivot
        left = torch.addcmul(own, own[:, index, None], share, value=-0.5)
        self.u[:, self.held], self.p[:, self.held], self.q[:, self.held] = row / pivot.sqrt(), left, share
        self.inverse_diagonal.addcmul_(row, share, value=-1)
        self.metric_diagonal.addcmul_(left, share, value=-2)
        self.gone[index] = True
        self.held += 1
        return int(self.features[index]), float(costs[index])

    def _apply(self) -> None:
        """Carry out what was held back, and drop the features that are gone if they are many."""
        self.inverse.baddbmm_(self.u.mT, self.u, alpha=-1)
        self.metric.baddbmm_(torch.cat([self.p, self.q], 1).mT, torch.cat([self.q, self.p], 1), alpha=-1)
        alive = torch.nonzero(~self.gone).flatten()
        if len(alive) <= _DENSE * len(self.gone):
            self.inverse, self.metric = (matrix[:, alive][..., alive] for matrix in (self.inverse, self.metric))
            self.features, self.gone = self.features[alive.cpu()], self.gone[alive]
        self._restart()
