"""The bias of a layer whose weight does not change: shifted by the mean residual.

Shapes: outputs y are [G, O] at each position. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from balf_fx.graph.curves import Spectrum
from balf_fx.refit.regression import metric_of


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

    def rise(self, shift: Tensor, metric: Tensor | None) -> float:
        """The difference between E (r - s)^T M (r - s) and E r^T M r for a shift s [G, O]."""
        weighted = shift if metric is None else (metric @ shift.unsqueeze(-1)).squeeze(-1)
        return float((weighted * (shift - 2 * self.mean)).sum())


def best_shift(train: Residual, held_out: Residual, spectrum: Spectrum | None) -> Tensor:
    """The shift of a bias [G, O]: the mean residual, or zero if that of the training share raises the held-out error.

    Args:
        spectrum: the metric; None for the plain squared error.
    """
    metric = None if spectrum is None else metric_of(spectrum)
    both = train + held_out
    accepted = not held_out.count or held_out.rise(train.mean, metric) < 0
    return both.mean if accepted and both.rise(both.mean, metric) < 0 else torch.zeros_like(both.total)
