"""Least squares for a layer whose input is no longer what it was: y from x', with a prior map, at full or reduced rank.

Shapes: x' is [G, D] and y [G, O] at each position; maps are [G, O, D]. Everything is float64.

Ridge: M minimises E|y - M x' - b|^2 + c |M - M0|^2, c a multiple of the mean variance of x'. The best map of rank r in
E|R (y - M x' - b)|^2 is L U_r U_r^T R M with U the eigenvectors of R M (Cov(x') + c I) M^T R^T (reduced-rank
regression, Izenman 1975), where R and L are the spectrum's right and left maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from balf_fx.sites import Spectrum


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


def joint(x: Tensor, y: Tensor, weights: Tensor | None) -> Joint:
    """Sums of one batch.

    Args:
        x, y: [G, D, n] and [G, O, n].
        weights: [n], None for 1 each.
    """
    weighted = x if weights is None else x * weights
    count = float(x.shape[-1] if weights is None else weights.sum(dtype=torch.float64))
    weighted_y = y if weights is None else y * weights
    sums = (weighted.sum(-1), weighted_y.sum(-1), weighted @ x.mT, y @ weighted.mT)
    return Joint(count, *(value.to(torch.float64) for value in sums))


def ridge(seen: Joint, prior: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """The map [G, O, D], and the covariance [G, D, D] with the ridge on it."""
    covariance, cross = seen.centred()
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    added = (strength * mean + torch.finfo(mean.dtype).tiny) * torch.eye(
        covariance.shape[-1], dtype=mean.dtype, device=mean.device
    )
    damped = covariance + added
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.any():
        return prior, damped
    return torch.cholesky_solve((cross + prior @ added).mT, factor).mT, damped


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
