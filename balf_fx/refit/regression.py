"""Least squares for a layer whose input has changed: y from x', with a prior map, at full or reduced rank.

Shapes: x' is [G, D] and y [G, O] at each position; maps are [G, O, D]. Everything is float64.

Ridge. M minimises E|y - M x' - b|^2 + c |M - M0|^2, where M0 is the prior map and c a multiple of the mean variance of
x'. Centred, M = (Cov(y, x') + c M0) (Cov(x') + c I)^-1.

Reduced rank. The best map of rank r in E|R (y - M x' - b)|^2 is L U_r U_r^T R M. Here U are the eigenvectors of
R M (Cov(x') + c I) M^T R^T, and R and L are the spectrum's right and left maps (reduced-rank regression, Izenman 1975).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from balf_fx.distributed.group import ALONE, Group
from balf_fx.graph.curves import Solution, Spectrum
from balf_fx.ranks.separable import separated, whole

_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # c of the ridge, in units of the mean variance of x'
_FIRST = 3  # the index of the strength to try first, and of that for too few samples to hold some out
_BLOCK = 48  # columns of x x^T that are computed at a time, or a multiple of it


@dataclass(frozen=True)
class Inputs:
    """Weighted sums over positions of x' and its products.

    Attributes:
        count: the sum of weights.
        x, xx: [G, D] and [G, D, D].
    """

    count: float
    x: Tensor
    xx: Tensor
    _factors: dict[float, Tensor | None] = field(default_factory=dict, repr=False)

    def __add__(self, other: Inputs) -> Inputs:
        return Inputs(self.count + other.count, self.x + other.x, self.xx + other.xx)

    @property
    def mean(self) -> Tensor:
        return self.x / self.count

    @cached_property
    def covariance(self) -> Tensor:
        """Cov(x') [G, D, D]."""
        return self.xx / self.count - self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)

    @cached_property
    def uncentred(self) -> Inputs:
        """The sums as if the mean were zero; cached, so that their Cholesky factors are computed only once."""
        return Inputs(self.count, torch.zeros_like(self.x), self.xx)

    def ridge(self, strength: float) -> Tensor:
        """[G, 1, 1], the value that a ridge adds to the diagonal of the covariance."""
        mean = self.covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        return strength * mean + torch.finfo(mean.dtype).tiny

    def factor(self, strength: float) -> Tensor | None:
        """The Cholesky factor of the covariance with a ridge, cached; None if it is not positive definite."""
        if strength not in self._factors:
            damped = self.covariance.clone()
            damped.diagonal(dim1=-2, dim2=-1).add_(self.ridge(strength).squeeze(-1))
            factor, failed = torch.linalg.cholesky_ex(damped)
            self._factors[strength] = None if failed.any() else factor
        return self._factors[strength]


@dataclass(frozen=True)
class Joint:
    """Weighted sums over positions of x', y and their products.

    Attributes:
        inputs: the sums of x' alone; one group of x' may be shared by all groups of y.
        y, yx: [G, O] and [G, O, D].
    """

    inputs: Inputs
    y: Tensor
    yx: Tensor

    @property
    def count(self) -> float:
        return self.inputs.count

    @property
    def mean_y(self) -> Tensor:
        return self.y / self.count

    def uncentred(self) -> Joint:
        """The sums as if both means were zero: a regression on them has no bias."""
        return Joint(self.inputs.uncentred, torch.zeros_like(self.y), self.yx)

    def cross(self) -> Tensor:
        """Cov(y, x') [G, O, D]."""
        found = self.yx / self.count  # in place from here, since it is large for many outputs
        found -= self.mean_y.unsqueeze(-1) * self.inputs.mean.unsqueeze(-2)
        return found


class JointSums:
    """Accumulates a `Joint` chunk by chunk: products in the precision of the chunks, totals in float64.

    Args:
        x, y: (G, D) and (G, O); one group of x may be shared by all groups of y.
        known: the sums over the same x, if they are already known.

    Attributes:
        count: the sum of weights.
    """

    def __init__(
        self, x: tuple[int, int], y: tuple[int, int], device: torch.device, known: Inputs | None = None
    ) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        groups, size = x
        rows = y[0] * y[1] // groups
        self._known, self._shape = known, (*y, size)
        self.count = 0.0
        self._y = zeros(groups, rows)
        # products of x, y and 1 with x, stacked in this order; only of y if the sums over x are known
        self._products = zeros(groups, rows if known is not None else size + rows + 1, size)

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None) -> None:
        """Add some positions.

        Args:
            x, y: [G, D, n] and [G, O, n].
            weights: [n], None for 1 each.
        """
        y = y.reshape(len(x), -1, y.shape[-1])
        self.count += float(x.shape[-1] if weights is None else weights.sum(dtype=torch.float64))
        if self._known is not None:
            y = y if weights is None else y * weights
            self._y += y.sum(-1)
            self._products += y @ x.mT
            return
        size = x.shape[1]
        rows = torch.cat([x, y, x.new_ones(len(x), 1, x.shape[-1])], 1)
        if weights is not None:
            rows *= weights.sqrt()
        self._y += (rows[:, size:-1] @ rows[:, -1:].mT).squeeze(-1)
        width = max(size // 16 // _BLOCK, 1) * _BLOCK
        for start in range(0, size, width):  # x x^T is symmetric: only its lower triangle is computed
            block = slice(start, min(start + width, size))
            self._products[:, start:, block] += rows[:, start:] @ rows[:, block].mT

    def merge(self, group: Group) -> None:
        """Add the sums of the other processes; the sums over known x must be those of all processes."""
        self.count, self._y, self._products = group.merged((self.count, self._y, self._products), _added)

    def joint(self) -> Joint:
        """The sums so far."""
        inputs, yx = self._known, self._products
        if inputs is None:
            lower, yx, x = yx.tensor_split((self._shape[-1], -1), 1)
            inputs = Inputs(self.count, x.squeeze(1), lower.tril() + lower.tril(-1).mT)
        return Joint(inputs, self._y.reshape(self._shape[:2]), yx.reshape(self._shape))


_Sums = tuple[float, Tensor, Tensor]


def _added(first: _Sums, second: _Sums) -> _Sums:
    return first[0] + second[0], first[1] + second[1], first[2] + second[2]


def joint(x: Tensor, y: Tensor, weights: Tensor | None) -> Joint:
    """The sums of one chunk; arguments as in `JointSums.add`."""
    sums = JointSums((len(x), x.shape[1]), (len(y), y.shape[1]), x.device)
    sums.add(x, y, weights)
    return sums.joint()


def ridge(seen: Joint, prior: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """The ridge solution M [G, O, D], and its product M (Cov(x') + c I) [G, O, D]."""
    factor = seen.inputs.factor(strength) if prior.shape[-1] else None
    added = seen.inputs.ridge(strength) if prior.shape[-1] else 0.0
    if factor is None:
        return prior, prior @ seen.inputs.covariance + prior * added
    product = seen.cross()
    product += prior * added
    return torch.cholesky_solve(product.mT, factor).mT, product


def truncate(full: Tensor, product: Tensor, spectrum: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """The factors A [G, O, r] and B [G, r, D] of the best map of this rank, from the results of `ridge`."""
    left, right = spectrum.maps(spectrum.energies.shape[-1])
    seen = right @ full
    _, vectors = torch.linalg.eigh((right @ product @ seen.mT).nan_to_num())  # fails for NaN on some devices
    leading = vectors.flip(-1)[..., :rank]
    return left @ leading, leading.mT @ seen


def error(seen: Joint, solution: Solution, metric: Tensor | None) -> float:
    """E (y - A B x' - b)^T M (y - A B x' - b) over all groups, up to a constant that is the same for all solutions.

    Args:
        metric: M [G, O, O], symmetric; None for the identity.
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
    fitted = left @ products
    fitted.sub_(cross, alpha=2).div_(count)
    fitted += 2 * bias @ mean.mT
    offset = bias - 2 * y
    if metric is not None:
        left, bias = metric @ left, metric @ bias
    return float(fitted.mul_(left).sum() + (bias * offset).sum())


@dataclass(frozen=True)
class Shares:
    """The sums over the training share and over the held-out share of the samples.

    Attributes:
        inputs: those of x' over both, if they are already known; with their Cholesky factors.
    """

    train: Joint
    held_out: Joint
    inputs: Inputs | None = None

    @cached_property
    def whole(self) -> Joint:
        """The sums over all samples."""
        train, held_out = self.train, self.held_out
        inputs = train.inputs + held_out.inputs if self.inputs is None else self.inputs
        return Joint(inputs, train.y + held_out.y, train.yx + held_out.yx)


class Fit(NamedTuple):
    """A solution, and the index of the strength that has the least held-out error."""

    solution: tuple[Solution, ...]
    strength: int


def best(
    shares: Shares,
    toward: Tensor,
    prior: Sequence[Solution],
    spectra: Sequence[Spectrum | None],
    start: int = _FIRST,
    group: Group = ALONE,
) -> Fit:
    """The solution with the least held-out error, solved again on all samples; the prior if its error is no larger.

    Args:
        toward: [G, O, D], the map toward which the ridge shrinks.
        prior: the solution so far, one for each part of the outputs; parts with a left factor are solved at its rank.
        spectra: the metric of each part, None for the plain squared error.
        start: the index of the strength to try first. The search ends at a minimum; layers have had only one.
        group: the processes over which the strengths of the ridge are shared out; their sums are the same.
    """
    metrics = [None if spectrum is None else metric_of(spectrum) for spectrum in spectra]
    held_out = shares.held_out

    def judged(index: int) -> float:
        return total_error(held_out, solutions(shares.train, toward, prior, spectra, _STRENGTHS[index]), metrics)

    if held_out.count:  # nothing is held out of fewer than four samples
        start, least = lowest(judged, len(_STRENGTHS), start, group)
        if not least < total_error(held_out, prior, metrics):  # also where one of them is not a number
            return Fit(tuple(prior), start)
    seen = shares.whole
    solved = solutions(seen, toward, prior, spectra, _STRENGTHS[start])
    better = total_error(seen, solved, metrics) < total_error(seen, prior, metrics)
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


def solutions(
    seen: Joint, toward: Tensor, prior: Sequence[Solution], spectra: Sequence[Spectrum | None], strength: float
) -> tuple[Solution, ...]:
    """The regression with one strength of the ridge, part by part; arguments as in `best`.

    A part whose prior has no bias gets none, since its cost was counted without one: its regression is uncentred.
    """
    groups = len(toward) // len(prior)
    fits: dict[bool, tuple[Joint, Tensor, Tensor]] = {}
    found = []
    for index, (part, spectrum) in enumerate(zip(prior, spectra, strict=True)):
        biased = part.bias is not None
        if biased not in fits:
            sums = seen if biased else seen.uncentred()
            fits[biased] = sums, *ridge(sums, toward, strength)
        sums, full, product = fits[biased]
        own = slice(index * groups, (index + 1) * groups)
        if part.left is None or spectrum is None:
            left, right = None, full[own]
        elif part.form == "separable":
            left, right = _separated(sums, full, product, spectrum, part, strength)
        else:
            left, right = truncate(full[own], product[own], spectrum, part.left.shape[-1])
        bias = None
        if biased:
            mean = sums.inputs.mean if len(sums.inputs.mean) == 1 else sums.inputs.mean[own]
            fitted = whole(Solution(left, right, None, form=part.form, taps=part.taps))
            map_ = fitted.right if fitted.left is None else fitted.left @ fitted.right
            bias = sums.mean_y[own] - (map_ @ mean.unsqueeze(-1)).squeeze(-1)
        found.append(Solution(left, right, bias, form=part.form, taps=part.taps))
    return tuple(found)


def _separated(
    sums: Joint, full: Tensor, product: Tensor, spectrum: Spectrum, part: Solution, strength: float
) -> tuple[Tensor, Tensor]:
    """The factors of a separable convolution, from the results of `ridge`."""
    moment = sums.inputs.covariance.clone()
    moment.diagonal(dim1=-2, dim2=-1).add_(sums.inputs.ridge(strength).squeeze(-1))
    _, metric = spectrum.maps(spectrum.energies.shape[-1])
    return separated(full, product, moment, metric, part.right.shape[1], part.taps)


def metric_of(spectrum: Spectrum) -> Tensor:
    """M = R^T R [G, O, O], the metric for which the spectrum's maps are optimal."""
    _, right = spectrum.maps(spectrum.energies.shape[-1])
    return right.mT @ right


def total_error(seen: Joint, solution: Sequence[Solution], metrics: Sequence[Tensor | None]) -> float:
    """The sum of the `error` of all parts; several parts belong to one group."""
    total = 0.0
    for index, (part, metric) in enumerate(zip(solution, metrics, strict=True)):
        own = slice(None) if len(solution) == 1 else slice(index, index + 1)
        total += error(Joint(seen.inputs, seen.y[own], seen.yx[own]), part, metric)
    return total


def apply(solution: Sequence[Solution], x: Tensor) -> Tensor:
    """The output of a solution, [G, O, n], in the precision of its input [G, D, n]."""
    found = []
    for part in map(whole, solution):
        y = part.right.to(x.dtype) @ x
        y = y if part.left is None else part.left.to(x.dtype) @ y
        found.append(y if part.bias is None else y + part.bias.to(x.dtype).unsqueeze(-1))
    return torch.cat(found) if len(found) > 1 else found[0]
