"""What can be chosen for sites and widths that are chosen together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from balf_fx.graph.curves import Candidate, Cost, Measure


@dataclass(frozen=True)
class Option:
    """One choice for a cluster.

    Attributes:
        ranks: a candidate for each member.
        sizes: the size of each width.
        total: the cost of everything in the cluster.
        others: the part of this cost that belongs to the shares.
        loss: the weighted sum of normalised distortions.
    """

    ranks: tuple[Candidate, ...]
    sizes: tuple[int, ...]
    total: Cost
    others: Cost
    loss: float

    def cost(self, measure: Measure) -> int:
        return self.total.of(measure)

    def changed(self, index: int, new: Candidate, loss: float) -> Option:
        """The same option with another candidate for one of the members."""
        old = self.ranks[index]
        ranks = (*self.ranks[:index], new, *self.ranks[index + 1 :])
        return Option(ranks, self.sizes, self.total - old.total + new.total, self.others, loss)


@dataclass(frozen=True, eq=False)
class Options(Sequence[Option]):
    """What can be chosen together. There may be thousands, of which few are read, so each is made when it is.

    Attributes:
        numbers: what `make` is given for each.
        costs, losses: those of each.
        make: makes an option from its number and its loss.
    """

    numbers: Sequence[int]
    costs: Sequence[int]
    losses: Sequence[float]
    make: Callable[[int, float], Option]

    def __len__(self) -> int:
        return len(self.costs)

    def __getitem__(self, index: Any) -> Any:
        return self.make(self.numbers[index], self.losses[index])

    def only(self, kept: Sequence[int]) -> Options:
        """Those at some indices."""
        numbers, costs = ([row[index] for index in kept] for row in (self.numbers, self.costs))
        return Options(numbers, costs, [self.losses[index] for index in kept], self.make)
