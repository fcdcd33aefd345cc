"""The solution of one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from balf_fx.graph.curves import FREE, Candidate, Cost, EnergyCurve, Measure
from balf_fx.graph.site import Site
from balf_fx.graph.widths import Width


def scaled_flops(flops: int, now: int, before: int) -> int:
    """FLOPs on other batches, on which what took `before` takes `now`."""
    return flops * now // before if before else flops


@dataclass(frozen=True)
class Choice:
    """The candidate chosen for a site."""

    site: Site
    chosen: Candidate
    dense: Candidate
    energy_kept: float
    spectrum: EnergyCurve | None = None

    def scaled(self, now: int, before: int) -> Choice:
        """The choice on other batches, on which a layer takes `now` FLOPs where it took `before`, in any form."""
        chosen, dense = (
            replace(each, flops=scaled_flops(each.flops, now, before)) for each in (self.chosen, self.dense)
        )
        return replace(self, chosen=chosen, dense=dense)


@dataclass(frozen=True)
class Allocation:
    """The solution of one global budget.

    Attributes:
        method: "budget", "uniform", "energy" or "ranks".
        measure, target: what the budget limits, and the fraction to keep; target is None if no budget was given.
        choices: one for each site, in graph order.
        primal: the value of the objective, the sum over sites of normalised distortion.
        bound: a lower bound on the objective of all allocations within the budget; None if nothing was optimised.
        sizes: the sizes of widths by `Width.key`; those that are not listed keep all features.
        saved_elsewhere: the cost that the sizes save outside the sites.
    """

    method: str
    measure: Measure
    target: float | None
    choices: tuple[Choice, ...]
    primal: float
    bound: float | None
    sizes: Mapping[str, int] = field(default_factory=dict)
    saved_elsewhere: Cost = FREE

    def size_of(self, width: Width) -> int:
        """The features of a width that are kept."""
        return self.sizes.get(width.key, width.features)

    @property
    def gap(self) -> float | None:
        """primal - bound: the most by which a better allocation could reduce the objective."""
        return None if self.bound is None else max(self.primal - self.bound, 0.0)
