"""What was certified about the disagreement or divergence of a compressed model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from balf_fx.graph.curves import Measure

Mistakes = Literal["disagreement", "divergence"]
"""What is counted: the share of a sample's predictions (classes, tokens, pixels) that differ from the original's, or
the relative error of its outputs, at most 1."""


@dataclass(frozen=True)
class Tried:
    """One budget that was tested.

    Attributes:
        share: the share of the cost that it keeps.
        observed: the mean disagreement or divergence of the samples.
        bound: its upper confidence bound.
    """

    share: float
    observed: float
    bound: float


@dataclass(frozen=True)
class Certificate:
    """The test of budgets from mild to hard on samples that nothing else has seen.

    Attributes:
        limit: the largest mean that is allowed, over all inputs like the samples.
        confidence: the probability with which the chosen model keeps the limit.
        measure: the cost that was minimised.
        samples: the number of samples.
        tried: all budgets that were tested, in turn; the first that misses the limit is the last.
    """

    mistakes: Mistakes
    limit: float
    confidence: float
    measure: Measure
    samples: int
    tried: tuple[Tried, ...]

    @property
    def chosen(self) -> Tried | None:
        """The last budget that keeps the limit; None if none does, so that nothing was removed that matters."""
        kept = [each for each in self.tried if each.bound <= self.limit]
        return kept[-1] if kept else None
