"""The bias of a layer whose weight does not change: shifted by the mean residual.

Shapes: outputs y are [G, O] at each position. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from balf_fx.graph.curves import Solution, Spectrum
from balf_fx.graph.site import Site
from balf_fx.refit.regression import root_of
from balf_fx.refit.sums import applied


@dataclass(frozen=True)
class Residual:
    """Weighted sums over positions of the residual of a layer's output.

    Attributes:
        count: the sum of weights.
        total: [G, O] float64.
    """

    count: float
    total: Tensor

    @classmethod
    def of(cls, values: Tensor, weights: Tensor | None) -> Residual:
        """The sums over some positions: values [G, O, n], weights [n] or None for 1 each."""
        if weights is None:
            return cls(values.shape[-1], values.sum(-1, dtype=torch.float64))
        weights = weights.to(torch.float64)
        return cls(float(weights.sum()), values.to(torch.float64) @ weights)

    def __add__(self, other: Residual) -> Residual:
        return Residual(self.count + other.count, self.total + other.total)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    def rise(self, shift: Tensor, root: Tensor | None) -> float:
        """The difference between E |R (r - s)|^2 and E |R r|^2 for a shift s [G, O]; R [G, m, O] may be None for 1."""
        pair = (shift, shift - 2 * self.mean)
        first, second = pair if root is None else (applied(root, each) for each in pair)
        return float((first * second).sum())


def best_shift(train: Residual, held_out: Residual, spectrum: Spectrum | None) -> Tensor:
    """The shift of a bias [G, O]: the mean residual, or zero if that of the training share raises the held-out error.

    Args:
        spectrum: the metric; None for the plain squared error.
    """
    root = None if spectrum is None else root_of(spectrum)
    both = train + held_out
    accepted = not held_out.count or held_out.rise(train.mean, root) < 0
    return both.mean if accepted and both.rise(both.mean, root) < 0 else torch.zeros_like(both.total)


def shift_between(old: Solution, new: Solution) -> Tensor | None:
    """The change of the bias, [G, O]."""
    return new.bias if old.bias is None or new.bias is None else new.bias - old.bias


def shifted(value: Tensor, site: Site, shift: Tensor | None) -> Tensor:
    """An output [..., G * O] or [..., G * O, *size] with a shift added to its features."""
    if shift is None:
        return value
    sizes = () if site.conv is None else (1,) * len(site.conv.kernel_size)
    return value + shift.to(value.dtype).reshape(-1, *sizes)
