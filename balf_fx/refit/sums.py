"""Weighted sums over positions of a layer's inputs x' and outputs y, and of their products.

Shapes: x' is [G, D] and y [G, O] at each position. Totals are float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from balf_fx.calibration.gram import add_lower, mirror
from balf_fx.distributed.group import Group

_CACHED = 2048  # the largest size of Cholesky factors that are kept


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

    @property
    def covariance(self) -> Tensor:
        """Cov(x') [G, D, D]; computed anew each time, since it is large."""
        found = self.xx / self.count
        return found.sub_(self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2))

    @cached_property
    def uncentred(self) -> Inputs:
        """The sums as if the mean were zero; cached, as are their Cholesky factors."""
        return Inputs(self.count, torch.zeros_like(self.x), self.xx)

    def ridge(self, strength: float) -> Tensor:
        """[G, 1, 1], the value that a ridge adds to the diagonal of the covariance."""
        variances = self.xx.diagonal(dim1=-2, dim2=-1) / self.count - self.mean.square()
        mean = variances.mean(-1)[:, None, None]
        return strength * mean + torch.finfo(mean.dtype).tiny

    def factor(self, strength: float) -> Tensor | None:
        """The Cholesky factor of the covariance with a ridge; None if it is not positive definite.

        It is cached unless it is large: several of them would take most of the memory of a refit.
        """
        if strength in self._factors:
            return self._factors[strength]
        damped = self.covariance
        damped.diagonal(dim1=-2, dim2=-1).add_(self.ridge(strength).squeeze(-1))
        found, failed = torch.linalg.cholesky_ex(damped)
        factor: Tensor | None = None if failed.any() else found
        if damped.shape[-1] <= _CACHED:
            self._factors[strength] = factor
        return factor


@dataclass(frozen=True)
class Joint:
    """Weighted sums over positions of x', y and their products.

    Where y = T z, the sums may be those of z, which has fewer values: then everything is solved for z.

    Attributes:
        inputs: the sums of x' alone; one group of x' may be shared by all groups of y.
        y, yx: [G, O] and [G, O, D]; or [G, Z] and [G, Z, D], those of z.
        through: T [G, O, Z], of which all groups may share one group of z; None if the sums are those of y.
    """

    inputs: Inputs
    y: Tensor
    yx: Tensor
    through: Tensor | None = None

    @property
    def count(self) -> float:
        return self.inputs.count

    @property
    def groups(self) -> int:
        """The number of groups of y."""
        return len(self.y if self.through is None else self.through)

    @property
    def mean_y(self) -> Tensor:
        mean = self.y / self.count
        return mean if self.through is None else applied(self.through, mean)

    def part(self, own: slice) -> Joint:
        """The sums of some groups of y."""
        if self.through is not None:
            return replace(self, through=self.through[own])
        return replace(self, y=self.y[own], yx=self.yx[own])

    def seen(self, map_: Tensor | None) -> Joint:
        """The sums of R y in place of y, for R [G, m, O], or R T [G, m, Z] from sums of z; None for the identity."""
        return self if map_ is None else Joint(self.inputs, applied(map_, self.y), map_ @ self.yx)

    def uncentred(self) -> Joint:
        """The sums as if both means were zero: a regression on them has no bias."""
        return replace(self, inputs=self.inputs.uncentred, y=torch.zeros_like(self.y))

    def cross(self) -> Tensor:
        """Cov(y, x') [G, O, D], or Cov(z, x') [G, Z, D]."""
        found = self.yx / self.count  # in place from here, since it is large for many outputs
        found -= (self.y / self.count).unsqueeze(-1) * self.inputs.mean.unsqueeze(-2)
        return found


def applied(map_: Tensor, vector: Tensor) -> Tensor:
    """[G, O, Z] times [G, Z]."""
    return (map_ @ vector.unsqueeze(-1)).squeeze(-1)


class JointSums:
    """Accumulates a `Joint` chunk by chunk: products in the precision of the chunks, totals in float64.

    Products are of values around the first chunk's mean: float32 loses the covariance of values far from zero.

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
        # [G, D + rows, 1], what is subtracted from x and y; None before the first chunk, and zeros once it is undone
        self._shift: Tensor | None = None

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None) -> None:
        """Add some positions.

        Args:
            x, y: [G, D, n] and [G, O, n].
            weights: [n], None for 1 each.
        """
        size = x.shape[1]
        rows = torch.cat([x, y.reshape(len(x), -1, y.shape[-1]), x.new_ones(len(x), 1, x.shape[-1])], 1)
        if self._shift is None:
            self._shift = rows[:, :-1].mean(-1, keepdim=True)
            if self._known is not None:  # the sum of the x that were added here, which may be only some, is not known
                self._shift[:, size:] = 0
        rows[:, :-1] -= self._shift
        if weights is not None:
            rows *= weights.sqrt()
        self.count += float(x.shape[-1] if weights is None else weights.sum(dtype=torch.float64))
        self._y += (rows[:, size:-1] @ rows[:, -1:].mT).squeeze(-1)
        if self._known is None:
            add_lower(self._products, rows)
        else:
            self._products += rows[:, size:-1] @ rows[:, :size].mT

    def merge(self, group: Group) -> None:
        """Add the sums of the other processes; the sums over known x must be those of all processes."""
        self._move_to_zero()
        self.count, self._y, self._products = group.merged((self.count, self._y, self._products), _added)

    def joint(self) -> Joint:
        """The sums so far, in the memory in which they are accumulated."""
        self._move_to_zero()
        inputs, yx = self._known, self._products
        if inputs is None:
            xx, yx, x = yx.tensor_split((self._shape[-1], -1), 1)
            inputs = Inputs(self.count, x.squeeze(1), mirror(xx))
        return Joint(inputs, self._y.reshape(self._shape[:2]), yx.reshape(self._shape))

    def _move_to_zero(self) -> None:
        """Turn sums around the shift into sums around zero; what is added from here is not shifted."""
        if self._shift is None or not self._shift.any():
            return
        shift = self._shift.squeeze(-1).to(torch.float64)
        x, y = shift.tensor_split((self._shape[-1],), 1)
        if self._known is None:
            sums = torch.cat([self._products[:, -1], self._y], 1)
            self._products[:, -1] += self.count * x
            _add_outer(self._products[:, :-1], sums, x)
            _add_outer(self._products[:, :-1], shift, self._products[:, -1])
        else:
            _add_outer(self._products, self._y, x)
        self._y += self.count * y
        self._shift = torch.zeros_like(self._shift)


def _add_outer(total: Tensor, first: Tensor, second: Tensor) -> None:
    """Add the products of [G, n] and [G, m] to [G, n, m], in place since it may be large."""
    total.baddbmm_(first.unsqueeze(-1), second.unsqueeze(-2))


_Sums = tuple[float, Tensor, Tensor]


def _added(first: _Sums, second: _Sums) -> _Sums:
    return first[0] + second[0], first[1] + second[1], first[2] + second[2]


def joint(x: Tensor, y: Tensor, weights: Tensor | None) -> Joint:
    """The sums of one chunk; arguments as in `JointSums.add`."""
    sums = JointSums((len(x), x.shape[1]), (len(y), y.shape[1]), x.device)
    sums.add(x, y, weights)
    return sums.joint()


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
        return Joint(inputs, train.y + held_out.y, train.yx + held_out.yx, train.through)
