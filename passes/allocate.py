"""Choose one candidate for every site under one budget on the whole model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.costs import largest_part_rank, parts_candidate
from balf_fx.errors import BudgetError, OptionError, PassError, UnknownSiteError
from balf_fx.knapsack import minimum_cost, solve
from balf_fx.passes.base import Pass
from balf_fx.sites import (
    Allocation,
    Candidate,
    Choice,
    Measure,
    PartRanks,
    Rank,
    RankCurve,
    Site,
    annotate,
    annotation,
    count_parameters,
    graph_record,
    record_graph,
)

Method = Literal["budget", "uniform", "energy"]


@dataclass(frozen=True)
class Totals:
    """What the whole model costs.

    Attributes:
        flops, params: as the user gave it; budgets are fractions of these.
        params_now: after the passes so far, which may have folded some into others.
    """

    flops: int
    params: int
    params_now: int

    def params_after(self, allocation: Allocation) -> int:
        """Parameters once the chosen sites are factorized."""
        return self.params_now + sum(choice.chosen.params - choice.dense.params for choice in allocation.choices)


@dataclass(frozen=True)
class Allocate(Pass):
    """Spend a budget, or follow explicit ranks.

    Attributes:
        flops, params: the fraction of the whole model's cost to keep, in (0, 1]; at most one of them.
        method: "budget" minimises the sum over sites of distortion as a share of the site's energy, by Lagrangian
            dual and exact spend (`knapsack`); "uniform" keeps the same share of every site's cost; "energy" keeps the
            same share of every site's energy.
        energy: with method="energy" and no budget, the share of energy to keep, in (0, 1].
        importance: with method="budget", how much a site's share in the loss counts: its normalised distortion is
            multiplied by this power of `RankCurve.loss`, where gradients are known.
        strict: a budget below what is reachable is an error; False takes the closest reachable choice instead.
        ranks: {site name: rank}, None for dense, a tuple for one rank in each part; sites that are not named stay
            dense. Excludes all of the above.
    """

    flops: float | None = None
    params: float | None = None
    method: Method = "budget"
    energy: float | None = None
    ranks: Mapping[str, Rank] | None = None
    strict: bool = True
    importance: float = 0.0

    def __post_init__(self) -> None:
        given = {
            name: value
            for name, value in (("flops", self.flops), ("params", self.params), ("energy", self.energy))
            if value is not None
        }
        if self.method not in ("budget", "uniform", "energy"):
            raise OptionError(f"allocation is 'budget', 'uniform', 'energy' or a mapping of ranks, not {self.method!r}")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise OptionError(f"{name} is a fraction in (0, 1], 0.55 for 55 %, not {value!r}")
        if self.energy is not None and self.method != "energy":
            raise OptionError("an energy threshold needs allocation='energy'")
        if self.ranks is not None and given:
            raise OptionError(f"explicit ranks leave nothing to a budget: drop {', '.join(given)}")
        if self.ranks is None and len(given) != 1:
            wanted = "flops=0.55 or params=0.55" + (" or energy=0.95" if self.method == "energy" else "")
            raise OptionError(f"give exactly one budget, {wanted}; got {', '.join(given) or 'none'}")

    @property
    def measure(self) -> Measure:
        return "params" if self.params is not None else "flops"

    @property
    def target(self) -> float | None:
        return self.params if self.params is not None else self.flops

    def requires(self, graph_module: fx.GraphModule) -> None:
        for site, nodes in self.require_sites(graph_module).items():
            if annotation(nodes[0]).curve is None:
                raise PassError(f"Allocate: site {site.name!r} has no curve; run Score first")
        if self.flops is not None and graph_record(graph_module).flops is None:
            raise PassError("Allocate: nobody counted the graph's FLOPs; run balf_fx.costs.profile, or use params=")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = self.require_sites(graph_module)
        curves = {site: curve for site, nodes in found.items() if (curve := annotation(nodes[0]).curve) is not None}
        record = graph_record(graph_module)
        params_now = count_parameters(graph_module)
        totals = Totals(record.flops or 0, record.params or params_now, params_now)
        allocation = self.solve(curves, totals)
        for nodes, choice in zip(found.values(), allocation.choices, strict=True):
            for node in nodes:
                annotate(node, choice=choice)
        marks = [annotation(node) for node in graph_module.graph.nodes]
        record_graph(
            graph_module,
            params=totals.params,
            params_after=totals.params_after(allocation),
            allocation=allocation,
            refusals=tuple((mark.refusal, mark.flops) for mark in marks if mark.refusal is not None),
        )
        return PassResult(graph_module, False)

    def solve(self, curves: Mapping[Site, RankCurve], totals: Totals) -> Allocation:
        """Choose one candidate for each site, wherever the sites lie: in one graph or in several.

        Raises:
            BudgetError: the budget cannot be reached.
        """
        bound = None
        if self.ranks is not None:
            chosen = _explicit(curves, self.ranks)
        elif self.target is None:
            chosen = [_first_with_energy(curve, self.energy or 1.0) for curve in curves.values()]
        else:
            chosen, bound = self._within_budget(list(curves.values()), self.target, totals)
        choices = tuple(
            Choice(site, candidate, curve.dense, 1.0 - curve.normalised(candidate.distortion))
            for (site, curve), candidate in zip(curves.items(), chosen, strict=True)
        )
        weights = _weights(list(curves.values()), self.importance)
        primal = sum(weight * (1.0 - choice.energy_kept) for weight, choice in zip(weights, choices, strict=True))
        method = "ranks" if self.ranks is not None else self.method
        return Allocation(method, self.measure, self.target, choices, primal, bound)

    def _within_budget(
        self, curves: Sequence[RankCurve], target: float, totals: Totals
    ) -> tuple[list[Candidate], float | None]:
        """The candidates chosen, and the dual bound of method "budget"."""
        total = totals.flops if self.measure == "flops" else totals.params
        now = totals.flops if self.measure == "flops" else totals.params_now
        fixed = now - sum(curve.dense.cost(self.measure) for curve in curves)
        options = [_cheaper_than_dense(curve, self.measure) for curve in curves]
        if self.method != "budget":  # what is raised step by step needs one order
            options = [[c for c in row if not isinstance(c.rank, tuple)] for row in options]
        costs = [[candidate.cost(self.measure) for candidate in row] for row in options]
        budget = math.floor(target * total) - fixed
        if minimum_cost(costs) > budget and self.strict:
            minimum = math.ceil((minimum_cost(costs) + fixed) / total * 1e4) / 1e4
            raise BudgetError(
                f"{self.measure}={target} is out of reach: with every site at rank 1 the model keeps {minimum:.4f} of "
                f"them, {fixed / total:.4f} outside of sites. Ask for {self.measure}={minimum:.4f} or more, or pass "
                "strict=False to get the closest reachable model",
                minimum,
            )
        budget = max(budget, minimum_cost(costs))
        if sum(row[-1] for row in costs) <= budget:
            return [curve.dense for curve in curves], 0.0 if self.method == "budget" else None
        lost = [[curve.normalised(c.distortion) for c in row] for curve, row in zip(curves, options, strict=True)]
        if self.method == "budget":
            lost = [[w * loss for loss in row] for w, row in zip(_weights(curves, self.importance), lost, strict=True)]
            solution = solve(costs, lost, budget)
            return [row[index] for row, index in zip(options, solution.choice, strict=True)], solution.bound
        if self.method == "uniform":
            levels = [[cost / max(row[-1], 1) for cost in row] for row in costs]
        else:
            levels = [[1.0 - loss for loss in row] for row in lost]
        choice = _raise_lowest(costs, levels, budget)
        return [row[index] for row, index in zip(options, choice, strict=True)], None


def _weights(curves: Sequence[RankCurve], importance: float) -> list[float]:
    """What the sites' normalised distortions count, 1 on average; a site without a gradient counts as the average."""
    known = [curve.loss for curve in curves if curve.loss is not None and curve.loss > 0]
    mean = statistics.geometric_mean(known) if known else 1.0
    return [1.0 if curve.loss is None else (curve.loss / mean) ** importance for curve in curves]


def _cheaper_than_dense(curve: RankCurve, measure: Measure) -> list[Candidate]:
    """Ranks that save something in this currency, ascending, then dense."""
    return [c for c in curve.candidates[:-1] if c.cost(measure) < curve.dense.cost(measure)] + [curve.dense]


def _first_with_energy(curve: RankCurve, energy: float) -> Candidate:
    """The smallest rank that keeps this share of the energy, dense where none does."""
    joint = (c for c in curve.candidates if not isinstance(c.rank, tuple))
    return next(c for c in joint if 1 - curve.normalised(c.distortion) >= energy)


def _raise_lowest(costs: Sequence[Sequence[int]], levels: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Start everywhere at the cheapest and keep raising the site of the lowest level, until nothing more fits."""
    choice = [0] * len(costs)
    left = budget - sum(row[0] for row in costs)
    growing = set(range(len(costs)))
    while growing:
        row = min(growing, key=lambda i: (levels[i][choice[i]], i))
        index = choice[row] + 1
        if index == len(costs[row]) or costs[row][index] - costs[row][choice[row]] > left:
            growing.discard(row)
            continue
        left -= costs[row][index] - costs[row][choice[row]]
        choice[row] = index
    return choice


def _explicit(curves: Mapping[Site, RankCurve], ranks: Mapping[str, Rank]) -> list[Candidate]:
    """The candidates that a mapping names."""
    names = [site.name for site in curves]
    unknown = sorted(set(ranks) - set(names))
    if unknown:
        raise UnknownSiteError(f"no site is called {', '.join(unknown)}; sites are: {', '.join(names)}")
    return [_explicit_candidate(site, curve, ranks.get(site.name)) for site, curve in curves.items()]


def _explicit_candidate(site: Site, curve: RankCurve, rank: Rank) -> Candidate:
    if rank is None:
        return curve.dense
    if isinstance(rank, tuple):
        return _explicit_parts(site, curve, rank)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= site.break_even:
        raise OptionError(
            f"the rank of {site.name!r} is a whole number from 1 to {site.break_even}, above which the dense layer "
            f"is cheaper, or None for dense; not {rank!r}"
        )
    return curve.candidates[rank - 1]


def _explicit_parts(site: Site, curve: RankCurve, ranks: PartRanks) -> Candidate:
    if curve.parts is None:
        raise OptionError(f"{site.name!r} has no parts to give ranks of their own: pass one whole number or None")
    limit = largest_part_rank(site)
    numbers = [rank for rank in ranks if rank is not None]
    whole = all(isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= limit for rank in numbers)
    if not whole or not numbers or len(ranks) != site.parts:
        raise OptionError(
            f"the ranks of the parts of {site.name!r} are {site.parts} whole numbers from 1 to {limit}, some of which "
            f"may be None for dense, not {ranks!r}"
        )
    return parts_candidate(site, curve.parts, ranks, curve.dense.flops, curve.output_elements)
