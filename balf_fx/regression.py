"""Least squares for a layer whose input is no longer what it was: y from x', with a prior map, at full or reduced rank.

Shapes: x' is [G, D] and y [G, O] at each position; maps are [G, O, D]. Everything is float64.

Ridge: M minimises E|y - M x' - b|^2 + c |M - M0|^2, c a multiple of the mean variance of x'. The best map of rank r in
E|R (y - M x' - b)|^2 is L U_r U_r^T R M with U the eigenvectors of R M (Cov(x') + c I) M^T R^T (reduced-rank
regression, Izenman 1975), where R and L are the spectrum's right and left maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from balf_fx.sites import Solution, Spectrum

_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_BLOCK = 96  # columns of x x^T that are done at a time: half of the matrix mirrors the other


@dataclass(frozen=True)
class Joint:
    """Weighted sums over positions of x', y and their products.

    Attributes:
        count: the sum of weights.
        x, y: [G, D] and [G, O].
        xx, yx: [G, D, D] and [G, O, D].
    """

    count: float
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor

    def __add__(self, other: Joint) -> Joint:
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("count", "x", "y", "xx", "yx"))
        return Joint(*(a + b for a, b in pairs))

    @property
    def mean_x(self) -> Tensor:
        return self.x / self.count

    @property
    def mean_y(self) -> Tensor:
        return self.y / self.count

    def only(self, own: slice) -> Joint:
        """Some of the groups of y, and of x' where it has groups."""
        x, xx = (value if len(value) == 1 else value[own] for value in (self.x, self.xx))
        return Joint(self.count, x, self.y[own], xx, self.yx[own])

    def centred(self) -> tuple[Tensor, Tensor]:
        """Cov(x') [G, D, D] and Cov(y, x') [G, O, D]."""
        covariance = self.xx / self.count - self.mean_x.unsqueeze(-1) * self.mean_x.unsqueeze(-2)
        return covariance, self.yx / self.count - self.mean_y.unsqueeze(-1) * self.mean_x.unsqueeze(-2)


class JointSums:
    """Adds up a `Joint` chunk by chunk: products in the chunks' own precision, totals in float64.

    Args:
        x, y: (G, D) and (G, O); x may have one group for all of y's.
        known: sums over the same x, whose products need not be taken again.
    """

    def __init__(
        self, x: tuple[int, int], y: tuple[int, int], device: torch.device, known: Joint | None = None
    ) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        groups, self._size = x
        rows = y[0] * y[1] // groups
        self._known, self._shape = known, (*y, self._size)
        self._count = 0.0
        self._y = zeros(groups, rows)
        # of y, and unless they are known of x and 1 above and below it, with x
        self._products = zeros(groups, rows if known is not None else self._size + rows + 1, self._size)

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None) -> None:
        """Count some positions.

        Args:
            x, y: [G, D, n] and [G, O, n].
            weights: [n], None for 1 each.
        """
        y = y.reshape(len(x), -1, y.shape[-1])
        self._count += float(x.shape[-1] if weights is None else weights.sum(dtype=torch.float64))
        if self._known is not None:
            y = y if weights is None else y * weights
            self._y += y.sum(-1)
            self._products += y @ x.mT
            return
        rows = torch.cat([x, y, y.new_ones(len(y), 1, y.shape[-1])], 1)
        if weights is not None:
            rows *= weights.sqrt()
        self._y += (rows[:, self._size : -1] @ rows[:, -1:].mT).squeeze(-1)
        width = max(_BLOCK, self._size // 16)
        for start in range(0, self._size, width):  # nothing is needed of x x^T above the diagonal
            block = slice(start, min(start + width, self._size))
            self._products[:, start:, block] += rows[:, start:] @ rows[:, block].mT

    def joint(self) -> Joint:
        """What has been added up."""
        y = self._y.reshape(self._shape[:2])
        if self._known is not None:
            return Joint(self._count, self._known.x, y, self._known.xx, self._products.reshape(self._shape))
        lower, yx, x = self._products.tensor_split((self._size, -1), 1)
        return Joint(self._count, x.squeeze(1), y, lower.tril() + lower.tril(-1).mT, yx.reshape(self._shape))


def joint(x: Tensor, y: Tensor, weights: Tensor | None) -> Joint:
    """Sums of one chunk, as `JointSums.add` takes it."""
    sums = JointSums((len(x), x.shape[1]), (len(y), y.shape[1]), x.device)
    sums.add(x, y, weights)
    return sums.joint()


def ridge(seen: Joint, prior: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """The map [G, O, D], and the covariance [G, D, D] with the ridge on it."""
    damped, cross = seen.centred()
    if not damped.shape[-1]:
        return prior, damped
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    added = strength * diagonal.mean(-1)[:, None, None] + torch.finfo(damped.dtype).tiny
    diagonal.add_(added.squeeze(-1))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.any():
        return prior, damped
    return torch.cholesky_solve((cross + prior * added).mT, factor).mT, damped


def truncate(full: Tensor, covariance: Tensor, spectrum: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """The factors A [G, O, r] and B [G, r, D] of the best map of this rank."""
    left, right = spectrum.maps(spectrum.energies.shape[-1])
    seen = right @ full
    _, vectors = torch.linalg.eigh(seen @ covariance @ seen.mT)
    leading = vectors.flip(-1)[..., :rank]
    return left @ leading, leading.mT @ seen


def error(held_out: Joint, fitted: Tensor, bias: Tensor, right: Tensor | None) -> float:
    """E|R (y - M x' - b)|^2 up to what no M and b change.

    Args:
        fitted, bias: [G, O, D] and [G, O].
        right: R [G, m, O], None for the identity.
    """
    shift = bias.unsqueeze(-1)
    x, y = held_out.mean_x.unsqueeze(-1), held_out.mean_y.unsqueeze(-1)
    second = fitted @ (held_out.xx / held_out.count) @ fitted.mT
    mixed = fitted @ x @ shift.mT
    cross = (held_out.yx / held_out.count) @ fitted.mT + y @ shift.mT
    total = second + mixed + mixed.mT + shift @ shift.mT - cross - cross.mT
    if right is not None:
        total = right @ total @ right.mT
    return float(total.diagonal(dim1=-2, dim2=-1).sum())


def best(
    train: Joint, held_out: Joint, toward: Tensor, prior: Sequence[Solution], spectra: Sequence[Spectrum | None]
) -> tuple[Solution, ...]:
    """The solution of least error on what was held out, the prior among them; its ridge, on all that was seen.

    Args:
        toward: [G, O, D], the map that the ridge draws to.
        prior: the solution so far, one for each part of the outputs; what has a left factor is solved at its rank.
        spectra: the metric of each part, None for the plain squared error.
    """
    if not held_out.count:  # batches of one or two samples leave none
        return solutions(train, toward, prior, spectra, 1.0)
    options = [solutions(train, toward, prior, spectra, strength) for strength in _STRENGTHS]
    errors = [total_error(held_out, option, spectra) for option in (prior, *options)]
    least = min(range(len(errors)), key=errors.__getitem__)
    if least == 0:
        return tuple(prior)
    return solutions(train + held_out, toward, prior, spectra, _STRENGTHS[least - 1])


def solutions(
    seen: Joint, toward: Tensor, prior: Sequence[Solution], spectra: Sequence[Spectrum | None], strength: float
) -> tuple[Solution, ...]:
    """The regression at one strength of the ridge, part by part; arguments as in `best`."""
    full, covariance = ridge(seen, toward, strength)
    groups = len(full) // len(prior)
    found = []
    for index, (part, spectrum) in enumerate(zip(prior, spectra, strict=True)):
        own = slice(index * groups, (index + 1) * groups)
        mean_x = seen.mean_x if len(seen.mean_x) == 1 else seen.mean_x[own]
        if part.left is None or spectrum is None:
            left, right = None, full[own]
        else:
            left, right = truncate(full[own], covariance, spectrum, part.left.shape[-1])
        fitted = right if left is None else left @ right
        bias = seen.mean_y[own] - (fitted @ mean_x.unsqueeze(-1)).squeeze(-1)
        found.append(Solution(left, right, bias))
    return tuple(found)


def total_error(seen: Joint, solution: Sequence[Solution], spectra: Sequence[Spectrum | None]) -> float:
    """The `error` of all parts."""
    groups = len(seen.y) // len(solution)
    total = 0.0
    for index, (part, spectrum) in enumerate(zip(solution, spectra, strict=True)):
        own = slice(index * groups, (index + 1) * groups)
        right = None if spectrum is None else spectrum.maps(spectrum.energies.shape[-1])[1]
        fitted = part.right if part.left is None else part.left @ part.right
        bias = torch.zeros_like(seen.y[own]) if part.bias is None else part.bias
        total += error(seen.only(own), fitted, bias, right)
    return total


def apply(solution: Sequence[Solution], x: Tensor) -> Tensor:
    """What a solution puts out, [G, O, n], in the precision of its input [G, D, n]."""
    found = []
    for part in solution:
        y = part.right.to(x.dtype) @ x
        y = y if part.left is None else part.left.to(x.dtype) @ y
        found.append(y if part.bias is None else y + part.bias.to(x.dtype).unsqueeze(-1))
    return torch.cat(found) if len(found) > 1 else found[0]
