"""Least squares for a layer whose input has changed: y from x', with a prior map, at full or reduced rank.

Shapes: x' is [G, D] and y [G, O] at each position; maps are [G, O, D]. Everything is float64.

Ridge. M minimises E|y - M x' - b|^2 + c |M - M0|^2, where M0 is the prior map and c a multiple of the mean variance of
x'. Centred, M = (Cov(y, x') + c M0) (Cov(x') + c I)^-1.

Reduced rank. The best map of rank r in E|R (y - M x' - b)|^2 is L U_r U_r^T R M. Here U are the eigenvectors of
R M (Cov(x') + c I) M^T R^T, and R and L are the spectrum's right and left maps (reduced-rank regression, Izenman 1975).

Outputs as a map of fewer values. Where y = T z and M0 = T K0, then M = T K, with the ridge solution K for z and K0; the
map of rank r needs R T K alone. So nothing takes memory for products of the outputs, which are many in a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from balf_fx.distributed.group import ALONE, Group
from balf_fx.graph.curves import Solution, Spectrum
from balf_fx.ranks.divided import ROUNDS, Patches, divided_factors, whole
from balf_fx.refit.sums import Joint, Shares, applied

_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # c of the ridge, in units of the mean variance of x'
_FIRST = 3  # the index of the strength to try first, and of that for too few samples to hold some out


def ridge(seen: Joint, prior: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """The ridge solution M [G, O, D], and its product M (Cov(x') + c I) [G, O, D]; [G, Z, D] from sums of z."""
    factor = seen.inputs.factor(strength) if prior.shape[-1] else None
    added = seen.inputs.ridge(strength) if prior.shape[-1] else 0.0
    if factor is None:
        return prior, prior @ seen.inputs.covariance + prior * added
    product = seen.cross()
    product += prior * added
    half = torch.linalg.solve_triangular(factor, product.mT, upper=False)  # cholesky_solve would copy the factor
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).mT, product


def truncate(full: Tensor, product: Tensor, spectrum: Spectrum, rank: int, metric: Tensor) -> tuple[Tensor, Tensor]:
    """The factors A [G, O, r] and B [G, r, D] of the best map of this rank, from the results of `ridge`.

    Args:
        metric: R [G, m, O]; R T [G, m, Z], where the results are maps to z.
    """
    leading, right = _truncated(full, product, rank, metric)
    return spectrum.maps(spectrum.energies.shape[-1])[0] @ leading, right


def _truncated(full: Tensor, product: Tensor, rank: int, metric: Tensor) -> tuple[Tensor, Tensor]:
    """U_r [G, m, r] and B [G, r, D]: the map to R y, since A = L U_r and R L = I."""
    seen = metric @ full
    _, vectors = torch.linalg.eigh((metric @ product @ seen.mT).nan_to_num())  # fails for NaN on some devices
    leading = vectors.flip(-1)[..., :rank]
    return leading, leading.mT @ seen


def error(seen: Joint, solution: Solution) -> float:
    """E |y - A B x' - b|^2 over all groups, up to a constant that is the same for all solutions.

    In a metric R^T R, y is R y and the solution is that of `solution_in_metric`. R^T R has a row and a column for each
    output, and is not computed.
    """
    solution, count = whole(solution), seen.count
    left = solution.left
    if left is None:  # the map itself is A, and B is the identity
        left, products, cross, mean = solution.right, seen.inputs.xx, seen.yx, seen.inputs.mean.unsqueeze(-1)
    else:
        right = solution.right
        products, cross, mean = (
            right @ seen.inputs.xx @ right.mT,
            seen.yx @ right.mT,
            right @ seen.inputs.mean[..., None],
        )
    y = seen.mean_y.unsqueeze(-1)
    bias = torch.zeros_like(y) if solution.bias is None else solution.bias.unsqueeze(-1)
    shift = (bias * (bias - 2 * y)).sum()
    if seen.through is not None:  # no products with a row for each output, which are many
        squares = (products * (left.mT @ left)).sum() - 2 * (cross * (seen.through.mT @ left)).sum()
        return float(squares / count + 2 * (bias.mT @ left @ mean).sum() + shift)
    fitted = left @ products
    fitted.sub_(cross, alpha=2).div_(count)
    fitted += 2 * bias @ mean.mT
    return float(fitted.mul_(left).sum() + shift)


def solution_in_metric(solution: Solution, root: Tensor | None) -> Solution:
    """A solution as a map to R y, for R [G, m, O]; None for the identity."""
    solution = whole(solution)
    if root is None:
        return solution
    bias = None if solution.bias is None else applied(root, solution.bias)
    if solution.left is None:
        return Solution(None, root @ solution.right, bias)
    return Solution(root @ solution.left, solution.right, bias)


class Fit(NamedTuple):
    """A solution, and the index of the strength that has the least held-out error."""

    solution: tuple[Solution, ...]
    strength: int


def best(
    shares: Shares,
    toward: Tensor,
    prior: Sequence[Solution],
    spectra: Sequence[Spectrum | None],
    strongest: int | None = None,
    group: Group = ALONE,
) -> Fit:
    """The solution with the least held-out error, solved again on all samples; the prior if its error is no larger.

    Args:
        toward: [G, O, D], the map toward which the ridge shrinks; [G, Z, D] from sums of z.
        prior: the solution so far, one for each part of the outputs; parts with a left factor are solved at its rank.
        spectra: the metric of each part, None for the plain squared error.
        strongest: the index of the strongest ridge to try, which is tried first; None for any. The search ends at a
            minimum; layers have had only one.
        group: the processes over which the strengths of the ridge are shared out; their sums are the same.
    """
    roots = [None if spectrum is None else root_of(spectrum) for spectrum in spectra]
    metrics = metrics_of(shares.train, roots)  # once, since they are large for many outputs
    held_out, before = in_metrics(shares.held_out, metrics), list(map(solution_in_metric, prior, roots))

    def judged(index: int) -> float:
        return total_error(held_out, judged_solutions(shares.train, toward, prior, _STRENGTHS[index], metrics))

    start, count = (_FIRST, len(_STRENGTHS)) if strongest is None else (strongest, strongest + 1)
    if shares.held_out.count:  # nothing is held out of fewer than four samples
        start, least = lowest(judged, count, start, group)
        if not least < total_error(held_out, before):  # also where one of them is not a number
            return Fit(tuple(prior), start)
    seen = in_metrics(shares.whole, metrics)
    solved = solutions(shares.whole, toward, prior, spectra, _STRENGTHS[start], metrics)
    better = total_error(seen, list(map(solution_in_metric, solved, roots))) < total_error(seen, before)
    return Fit(solved if better else tuple(prior), start)


def lowest(function: Callable[[int], float], count: int, start: int, group: Group = ALONE) -> tuple[int, float]:
    """The index and the value of a minimum of a function of 0 to `count` - 1, descending from `start`.

    Args:
        group: the processes over which its values are shared out.
    """
    known: dict[int, float] = {}
    least = start
    while True:
        near = [index for index in (least, least - 1, least + 1) if 0 <= index < count and index not in known]
        if not near:
            return least, known[least]
        tried = near[: group.size]
        known.update(zip(tried, group.shared_out(tried, [1.0] * len(tried), function), strict=True))
        least = min(known, key=lambda index: (math.isnan(known[index]), known[index]))


class _Regression(NamedTuple):
    """The regression of a part of the outputs: its sums, and the results of `ridge`."""

    sums: Joint
    full: Tensor
    product: Tensor

    @property
    def map(self) -> Tensor:
        """The map to y, [G, O, D]."""
        return self.full if self.sums.through is None else self.sums.through @ self.full


def _regressions(seen: Joint, toward: Tensor, prior: Sequence[Solution], strength: float) -> Iterator[_Regression]:
    """The regression of each part; one whose prior has no bias gets none, and so is regressed uncentred."""
    groups = seen.groups // len(prior)
    known: dict[bool, _Regression] = {}
    for index, part in enumerate(prior):
        biased = part.bias is not None
        if biased not in known:
            sums = seen if biased else seen.uncentred()
            known[biased] = _Regression(sums, *ridge(sums, toward, strength))
        sums, full, product = known[biased]
        own = slice(index * groups, (index + 1) * groups)
        if sums.through is None:  # else all parts are maps of the same z
            full, product = full[own], product[own]
        yield _Regression(sums.part(own), full, product)


def solutions(
    seen: Joint,
    toward: Tensor,
    prior: Sequence[Solution],
    spectra: Sequence[Spectrum | None],
    strength: float,
    metrics: Sequence[Tensor | None],
) -> tuple[Solution, ...]:
    """The regression with one strength of the ridge, part by part; arguments as in `best`.

    A part whose prior has no bias gets none, since its cost was counted without one.

    Args:
        metrics: R or R T of each part, or None (`metrics_of`).
    """
    found = []
    regressions = _regressions(seen, toward, prior, strength)
    for part, spectrum, metric, own in zip(prior, spectra, metrics, regressions, strict=True):
        left: Tensor | None = None
        if part.left is None or spectrum is None or metric is None:
            right = own.map
        elif part.divided:
            left, right = _divided(own, metric, part, strength, ROUNDS)
        else:
            left, right = truncate(own.full, own.product, spectrum, part.left.shape[-1], metric)
        found.append(_with_bias(part, left, right, own.sums.inputs.mean, own.sums.mean_y))
    return tuple(found)


def judged_solutions(
    seen: Joint, toward: Tensor, prior: Sequence[Solution], strength: float, metrics: Sequence[Tensor | None]
) -> tuple[Solution, ...]:
    """What `error` asks of `solutions`: maps to R y, without products with a row for each output.

    Both factors of divided kernels are those for uncorrelated strips, which compare strengths as well.
    """
    found = []
    for part, metric, own in zip(prior, metrics, _regressions(seen, toward, prior, strength), strict=True):
        left: Tensor | None = None
        if metric is None:
            right, mean = own.map, own.sums.mean_y
        else:
            mean = applied(metric, own.sums.y / own.sums.count)
            if part.left is None:
                right = metric @ own.full
            elif part.divided:
                factors = _divided(own, metric, part, strength, 0)
                right = metric @ whole(Solution(*factors, None, form=part.form, taps=part.taps)).right
            else:
                left, right = _truncated(own.full, own.product, part.left.shape[-1], metric)
        found.append(_with_bias(part, left, right, own.sums.inputs.mean, mean))
    return tuple(found)


def _divided(own: _Regression, metric: Tensor, part: Solution, strength: float, rounds: int) -> tuple[Tensor, Tensor]:
    """The factors of a convolution with a divided kernel; rounds as in `ranks.divided.divided_factors`."""
    inputs = own.sums.inputs
    patches = Patches(inputs.xx, inputs.count, inputs.mean, inputs.ridge(strength), part.taps)
    return divided_factors(own.full, own.product, patches, metric, part.right.shape[1], rounds)


def _with_bias(part: Solution, left: Tensor | None, right: Tensor, mean: Tensor, mean_y: Tensor) -> Solution:
    """A part with new factors and, if it has a bias, the one for which their mean error is zero."""
    bias = None
    if part.bias is not None:
        fitted = whole(Solution(left, right, None, form=part.form, taps=part.taps))
        answer = applied(fitted.right, mean)
        bias = mean_y - (answer if fitted.left is None else applied(fitted.left, answer))
    return Solution(left, right, bias, form=part.form, taps=part.taps)


def root_of(spectrum: Spectrum) -> Tensor:
    """R [G, m, O], the root of the metric R^T R for which the spectrum's maps are optimal."""
    return spectrum.maps(spectrum.energies.shape[-1])[1]


def metrics_of(seen: Joint, roots: Sequence[Tensor | None]) -> list[Tensor | None]:
    """R T [G, m, Z] of each part, for sums of z; R alone for sums of y; None where there is no R."""
    throughs = [seen.part(own).through for own in _owns(len(roots))]
    return [
        root if through is None or root is None else root @ through
        for root, through in zip(roots, throughs, strict=True)
    ]


def in_metrics(seen: Joint, metrics: Sequence[Tensor | None]) -> list[Joint]:
    """The sums of R y of each part, by its R T."""
    return [seen.part(own).seen(metric) for own, metric in zip(_owns(len(metrics)), metrics, strict=True)]


def _owns(parts: int) -> list[slice]:
    """The groups of each part; several parts belong to one group."""
    return [slice(None)] if parts == 1 else [slice(index, index + 1) for index in range(parts)]


def total_error(seen: Sequence[Joint], solution: Sequence[Solution]) -> float:
    """The sum of the `error` of all parts."""
    return sum(map(error, seen, solution))


def rounded(solution: Sequence[Solution], dtype: torch.dtype) -> tuple[Solution, ...]:
    """A solution for `apply`: in this precision, and with its divided kernels as whole ones."""
    return tuple(
        Solution(
            None if part.left is None else part.left.to(dtype),
            part.right.to(dtype),
            None if part.bias is None else part.bias.to(dtype),
        )
        for part in map(whole, solution)
    )


def apply(solution: Sequence[Solution], x: Tensor) -> Tensor:
    """The output [G, O, n] of a `rounded` solution for an input [G, D, n]."""
    found = []
    for part in solution:
        y = part.right @ x
        y = y if part.left is None else part.left @ y
        found.append(y if part.bias is None else y + part.bias.unsqueeze(-1))
    return torch.cat(found) if len(found) > 1 else found[0]
