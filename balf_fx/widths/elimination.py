"""The order in which to remove features: optimal elimination in a metric (Hassibi & Stork 1993)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_DELAYED = 64  # removals that are applied together
_DENSE = 0.75  # once at most this share of the rows remains, the matrices are copied without the removed ones
_NOTHING = 1e-30  # the least variance, so that a division is defined
_RAISES = 4  # each by ten times, for sums with errors beyond those of float32


def conditioned(covariance: Tensor, share: float = 1e-4, noise: float = 2e-6) -> Tensor:
    """The covariance [F, F] plus shares of its mean and its largest eigenvalue, so that it is positive definite.

    Linearly dependent or constant features, and rounding errors of sums in float32, then need no special case. Where a
    few positions have nearly all of the weight, these errors are larger, and the shares are raised until they suffice.

    Args:
        share: the share of the mean eigenvalue.
        noise: the share of the largest eigenvalue.
    """
    symmetric: Tensor = (covariance + covariance.mT) / 2
    vector = symmetric.sum(-1, keepdim=True)
    for _ in range(8):  # the power method; the order of magnitude suffices
        vector = symmetric @ (vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny))
    floor = share * symmetric.diagonal().mean() + noise * vector.norm()
    floor = floor.clamp_min(_NOTHING)
    symmetric.diagonal().add_(floor)
    for _ in range(_RAISES):
        if not bool(torch.linalg.cholesky_ex(symmetric).info.any()):
            break
        symmetric.diagonal().add_(9 * floor)
        floor = 10 * floor
    return symmetric


def prediction_errors(
    covariance: Tensor, moment: Tensor, metric: Tensor, order: Tensor, sizes: Sequence[int]
) -> list[float]:
    """The errors, on held-out samples, of predicting all features h from those that are kept.

    The kept features K predict the removed ones R by T h_K with T = C[R, K] C[K, K]^-1. The error is tr A[R, R] E with
    E the second moment of h_R - T h_K on the held-out samples. K grows block by block, and the residual's covariance
    on the fitting samples is the Schur complement of C[K, K].

    Args:
        covariance: C [F, F] of the fitting samples, `conditioned`.
        moment: [F, F], the second moment of the held-out samples around the mean of the fitting samples.
        metric: A [F, F], the metric of errors in the features on the held-out samples.
        order: [F], the features in the order in which they are kept.
        sizes: the numbers of features kept, ascending, below F.
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
        errors.append(max(float((metric * moment).sum()), 0.0))  # where it is zero, rounding decides its sign
        before = size
    return errors


def eliminate(covariances: Sequence[Tensor], metrics: Sequence[Tensor], block: int = 1) -> tuple[Tensor, list[float]]:
    """Order the features greedily: each step removes the one whose removal increases the error least.

    If feature j is removed and the remaining features predict it by least squares, the error in the metric A increases
    by A_jj Var(h_j | others) = A_jj / (C^-1)_jj (Hassibi & Stork 1993, for a whole column in a metric). C is that of
    the remaining features. A includes the effect of h_j on the features removed before, which are predicted from it.
    The errors of several readers are added.

    Args:
        covariances: C [F, F] float64 of the features at each reader, `conditioned`.
        metrics: A [F, F], the metric of errors in the features at each reader.
        block: so many features that follow each other are removed together.

    Returns:
        order [F], the last one removed first, and the error at sizes 0 .. F, linear between those of whole blocks.
    """
    # Squares of very small costs could underflow, so everything is computed in units of the mean.
    units = [covariance.diagonal().mean() for covariance in covariances]
    scaled = [unit * metric for unit, metric in zip(units, metrics, strict=True)]
    whole = torch.stack([metric.diagonal().mean() for metric in scaled]).max().clamp_min(_NOTHING)
    inverses = [_inverse(covariance / unit) for covariance, unit in zip(covariances, units, strict=True)]
    stacked = torch.stack(inverses), torch.stack(scaled).div_(whole)
    gone, costs = zip(*_removed(*stacked) if block == 1 else _removed_in_blocks(*stacked, block), strict=True)
    errors = itertools.accumulate(costs, initial=0.0)
    return torch.tensor(gone[::-1], device="cpu"), [float(whole) * error for error in errors][::-1]


def _inverse(covariance: Tensor) -> Tensor:
    """The inverse of a positive definite matrix; NaN for any other matrix."""
    root, failed = torch.linalg.cholesky_ex(covariance)
    inverse: Tensor = torch.cholesky_inverse(root).masked_fill_(failed > 0, torch.nan)
    return inverse


def _removed(inverse: Tensor, metric: Tensor) -> Iterator[tuple[int, float]]:
    """The features in the order of their removal, each with the increase of the error; arguments of `_Elimination`."""
    state = _Elimination(inverse, metric)
    return (state.remove_cheapest() for _ in range(inverse.shape[-1]))


def _removed_in_blocks(inverse: Tensor, metric: Tensor, block: int) -> Iterator[tuple[int, float]]:
    """The same for blocks, which increase the error by tr A_BB (M_BB)^-1: each of their features by the same share.

    Args:
        inverse, metric: M and A as in `_Elimination`; they are changed.
    """
    left = torch.arange(inverse.shape[-1], device=inverse.device).reshape(-1, block)
    numbers = torch.arange(len(left), device="cpu").tolist()
    while numbers:
        rows, columns = left.unsqueeze(-1), left.unsqueeze(-2)
        variances = torch.linalg.inv_ex(inverse[:, rows, columns]).inverse  # of each block, given all other ones
        costs = (metric[:, rows, columns] * variances).sum((0, 2, 3)).clamp_min(0)
        place = int(costs.argmin())
        own = left[place]
        share = inverse[:, :, own] @ variances[:, place]
        crossed = metric[:, :, own] - share @ metric[:, own][:, :, own] / 2
        inverse -= share @ inverse[:, own]
        metric -= crossed @ share.mT + share @ crossed.mT
        left = torch.cat([left[:place], left[place + 1 :]])
        first = block * numbers.pop(place)
        yield from ((first + each, float(costs[place]) / block) for each in reversed(range(block)))


class _Elimination:
    """Each reader's inverse covariance M and metric A, after the features removed so far are predicted by the others.

    Each removal updates both matrices by a few vectors. As in LAPACK's blocked factorisations, the updates are
    collected and applied together: M - U^T U and A - P^T Q - Q^T P. Rows and columns of removed features stay in place
    and are not read, until there are enough of them to be worth a copy.

    Shapes: for R readers, M and A are [R, F, F], and the rows of U, P and Q are vectors [R, F].
    """

    def __init__(self, inverse: Tensor, metric: Tensor) -> None:
        self.inverse, self.metric = inverse, metric
        self.features = torch.arange(inverse.shape[-1], device="cpu")
        self.gone = torch.zeros(inverse.shape[-1], dtype=torch.bool, device=inverse.device)
        self._restart()

    def _restart(self) -> None:
        readers, features = self.inverse.shape[:2]
        self.inverse_diagonal = self.inverse.diagonal(dim1=-2, dim2=-1).clone()
        self.metric_diagonal = self.metric.diagonal(dim1=-2, dim2=-1).clone()
        self.u, self.p, self.q = (self.inverse.new_empty(readers, _DELAYED, features) for _ in range(3))
        self.held = 0

    def remove_cheapest(self) -> tuple[int, float]:
        """Remove the cheapest feature; returns its index and the increase of the error."""
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
        """Apply the collected updates, and copy the matrices without the removed features if these are many."""
        self.inverse.baddbmm_(self.u.mT, self.u, alpha=-1)
        self.metric.baddbmm_(torch.cat([self.p, self.q], 1).mT, torch.cat([self.q, self.p], 1), alpha=-1)
        alive = torch.nonzero(~self.gone).flatten()
        if len(alive) <= _DENSE * len(self.gone):
            self.inverse, self.metric = (matrix[:, alive][..., alive] for matrix in (self.inverse, self.metric))
            self.features, self.gone = self.features[alive.cpu()], self.gone[alive]
        self._restart()
