"""Choose one candidate for every site under one budget on the whole model."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.budget.explicit import explicit_candidates
from balf_fx.budget.knapsack import dual, minimum_cost, solve
from balf_fx.budget.options import Option, Options
from balf_fx.budget.problem import Problem, Totals, drawn, pose, settle
from balf_fx.errors import BudgetError, OptionError, PassError
from balf_fx.graph.allocation import Allocation, Choice
from balf_fx.graph.annotation import annotation, graph_record
from balf_fx.graph.curves import FREE, Candidate, Cost, Measure, Rank, RankCurve
from balf_fx.graph.parameters import count_parameters
from balf_fx.graph.site import Site
from balf_fx.passes.base import Pass

Method = Literal["budget", "uniform", "energy", "free"]

_ROUNDING = torch.finfo(torch.float32).eps ** 2
"""The share of a weight's energy below which singular values are rounding errors of single precision."""


IMPORTANCE = 0.6
"""Default of `Allocate.importance` where gradients have been observed and no trials are measured."""


@dataclass(frozen=True)
class Allocate(Pass):
    """Choose ranks and widths under a budget, or use explicit ranks.

    Attributes:
        flops, params, latency: the fraction of the whole model's cost to keep, in (0, 1]; at most one of them. For
            latency, times must be known (`Time`).
        method: "budget" minimises the sum over sites of distortion divided by the site's energy, with the Lagrangian
            dual followed by an exact search (`budget.knapsack`). "uniform" keeps the same share of every site's cost.
            "energy" keeps the same share of every site's energy. "free" takes no budget, but the fewest FLOPs at which
            the weights change by their own rounding.
        energy: the share of energy to keep, in (0, 1]; with method="energy" and no budget.
        importance: with method="budget", each site's normalised distortion is multiplied by `RankCurve.loss` to this
            power, where gradients are known.
        caution: with method="budget", a factor by which the losses of widths are multiplied.
        evenness: with method="budget", every site, or cluster of sites and widths, keeps at least this fraction of the
            share of the cost that all of them keep together, in [0, 1]. A few directions of very large variance make
            other directions look dispensable, which no loss without gradients shows.
        strict: whether a budget that cannot be reached is an error; False takes the closest reachable choice instead.
        ranks: {site name: rank}, None for dense, a tuple for one rank per part. Sites that are not named stay dense.
            Cannot be combined with the options above.

    Raises:
        OptionError: there is no budget, more than one, or a wrong value.
        BudgetError: the budget cannot be reached.
        PassError: a site has no curve, or no time for a budget of time.
    """

    flops: float | None = None
    params: float | None = None
    method: Method = "budget"
    energy: float | None = None
    ranks: Mapping[str, Rank] | None = None
    strict: bool = True
    importance: float = 0.0
    caution: float = 1.0
    evenness: float = 0.0
    latency: float | None = None

    def __post_init__(self) -> None:
        names = ("flops", "params", "latency", "energy")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.method not in get_args(Method):
            listed = ", ".join(map(repr, get_args(Method)))
            raise OptionError(f"allocation must be one of {listed}, or a mapping of ranks, not {self.method!r}")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise OptionError(f"{name} must be a fraction in (0, 1], such as 0.55 for 55 %, not {value!r}")
        if self.energy is not None and self.method != "energy":
            raise OptionError("energy= requires allocation='energy'")
        if self.ranks is not None and given:
            raise OptionError(f"explicit ranks cannot be combined with a budget: drop {', '.join(given)}")
        if self.method == "free" and given:
            raise OptionError(f"allocation='free' takes no budget: drop {', '.join(given)}")
        if self.ranks is None and self.method != "free" and len(given) != 1:
            wanted = "flops=0.55, params=0.55 or latency=0.7"
            wanted += " or energy=0.95" if self.method == "energy" else ""
            raise OptionError(f"give exactly one budget, {wanted}; got {', '.join(given) or 'none'}")

    @property
    def measure(self) -> Measure:
        if self.latency is not None:
            return "latency"
        return "params" if self.params is not None else "flops"

    @property
    def target(self) -> float | None:
        return float(target) if (target := getattr(self, self.measure)) is not None else None

    def requires(self, graph_module: fx.GraphModule) -> None:
        for site, nodes in self.require_sites(graph_module).items():
            if annotation(nodes[0]).curve is None:
                raise PassError(f"Allocate: site {site.name!r} has no curve; run Score first")
        if self.flops is not None and graph_record(graph_module).flops is None:
            raise PassError("Allocate: the graph's FLOPs were not counted; run graph.flops.profile, or use params=")
        if self.latency is not None and graph_record(graph_module).nanoseconds is None:
            raise PassError("Allocate: latency= needs times; run Time first")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        record, now = graph_record(graph_module), count_parameters(graph_module)
        totals = Totals(record.flops or 0, record.params or now, now, record.nanoseconds or 0)
        problem = pose([(graph_module, 1)], totals)
        settle([(graph_module, 1)], problem, drawn(problem, self.solve(problem)))
        return PassResult(graph_module, False)

    def solve(self, problem: Problem) -> Allocation:
        """Choose one candidate for each site, and a size for each width.

        Raises:
            BudgetError: the budget cannot be reached.
        """
        weights = _weights(list(problem.curves.values()), self.importance)
        if self.method == "budget" and self.ranks is None:
            outcome = self._least_loss(problem, weights)
        elif self.method == "free":
            groups, _ = self._groups(problem, weights)
            outcome = _Outcome(list(map(_cheapest_without_loss, groups)))
        elif self.ranks is not None:
            outcome = _Outcome(explicit_candidates(problem.curves, self.ranks))
        elif self.target is None:
            outcome = _Outcome([_first_with_energy(curve, self.energy or 1.0) for curve in problem.curves.values()])
        else:
            outcome = _Outcome(self._by_level(list(problem.curves.values()), problem.totals))
        pairs = zip(problem.curves.items(), outcome.chosen, strict=True)
        choices = tuple(
            Choice(site, candidate, curve.dense, 1.0 - curve.normalised(candidate.distortion))
            for (site, curve), candidate in pairs
        )
        lost = sum(weight * (1.0 - choice.energy_kept) for weight, choice in zip(weights, choices, strict=True))
        return Allocation(
            method="ranks" if self.ranks is not None else self.method,
            measure=self.measure,
            target=self.target,
            choices=choices,
            primal=lost if outcome.loss is None else outcome.loss,
            bound=outcome.bound,
            sizes=outcome.sizes,
            saved_elsewhere=outcome.saved_elsewhere,
        )

    def _least_loss(self, problem: Problem, weights: Sequence[float]) -> _Outcome:
        """The least total loss within the budget."""
        groups, fixed = self._groups(problem, weights)
        budget = self._reachable([group.options.costs for group in groups], fixed, problem.totals)
        groups = self._evenly(groups, budget)
        picked, multiplier = self._cheapest(groups, budget)
        grids, multipliers = [groups], [multiplier]
        if problem.clusters:  # a second, finer grid around the chosen sizes spends the rest of the budget
            near = {group.widths: option for group, option in picked if group.widths}
            groups = self._evenly(self._groups(problem, weights, near)[0], budget)
            picked, multiplier = self._cheapest(groups, budget)
            grids, multipliers = [*grids, groups], [*multipliers, multiplier]
        by_site = {site: c for group, option in picked for site, c in zip(group.sites, option.ranks, strict=True)}
        return _Outcome(
            chosen=[by_site[site] for site in problem.curves],
            loss=sum(option.loss for _, option in picked),
            bound=self._bound(grids, budget, multipliers),
            sizes={w: size for group, option in picked for w, size in zip(group.widths, option.sizes, strict=True)},
            saved_elsewhere=sum((group.full - option.others for group, option in picked), FREE),
        )

    def _groups(
        self,
        problem: Problem,
        weights: Sequence[float],
        near: Mapping[tuple[str, ...], Option] | None = None,
    ) -> tuple[list[_Group], int]:
        """The options of each cluster and of each remaining site, and the cost of the rest of the model."""
        curves, totals = problem.curves, problem.totals
        weight_of = dict(zip(curves, weights, strict=True))
        mean = _mean_loss(list(curves.values()))
        groups = []
        for cluster in problem.clusters:
            own = tuple(member.site for member in cluster.members)
            width_weights = [self.caution * (curve.loss / mean) ** self.importance for curve in cluster.curves]
            options = cluster.options(
                [curves[s] for s in own],
                [weight_of[s] for s in own],
                width_weights,
                self.measure,
                None if near is None else near[cluster.keys],
            )
            groups.append(_Group(own, cluster.keys, options, cluster.full))
        taken = {site for group in groups for site in group.sites}
        groups += [
            _group_of(site, curve, weight_of[site], self.measure) for site, curve in curves.items() if site not in taken
        ]
        dense = sum(curve.dense.cost(self.measure) for curve in curves.values())
        return groups, totals.now(self.measure) - dense - sum(group.full.of(self.measure) for group in groups)

    def _evenly(self, groups: list[_Group], budget: int) -> list[_Group]:
        """The groups without options below `evenness`, or unchanged where the budget could not be reached then."""
        share = self.evenness * min(budget / max(sum(group.options.costs[-1] for group in groups), 1), 1.0)
        kept = [group.from_cost(share * group.options.costs[-1]) for group in groups] if share > 0 else groups
        return kept if minimum_cost([group.options.costs for group in kept]) <= budget else groups

    def _cheapest(self, groups: Sequence[_Group], budget: int) -> tuple[list[tuple[_Group, Option]], float]:
        """The options with the least total loss within the budget, and the Lagrangian multiplier."""
        if sum(group.options.costs[-1] for group in groups) <= budget:
            return [(group, group.options[-1]) for group in groups], 0.0
        solution = solve([group.options.costs for group in groups], [group.options.losses for group in groups], budget)
        return [
            (group, group.options[i]) for group, i in zip(groups, solution.choice, strict=True)
        ], solution.multiplier

    def _bound(self, grids: Sequence[Sequence[_Group]], budget: int, multipliers: Sequence[float]) -> float:
        """A lower bound, from the dual, on the loss of every choice among the options of all grids."""
        costs = [[cost for group in same for cost in group.options.costs] for same in zip(*grids, strict=True)]
        losses = [[loss for group in same for loss in group.options.losses] for same in zip(*grids, strict=True)]
        return max(dual(costs, losses, budget, multiplier) for multiplier in multipliers)

    def _reachable(self, costs: Sequence[Sequence[int]], fixed: int, totals: Totals) -> int:
        total = totals.of(self.measure)
        budget = math.floor((self.target or 1.0) * total) - fixed
        if minimum_cost(costs) > budget and self.strict:
            minimum = math.ceil((minimum_cost(costs) + fixed) / total * 1e4) / 1e4
            raise BudgetError(
                f"{self.measure}={self.target} is out of reach: with every site at rank 1 the model keeps {minimum:.4f}"
                f" of its {self.measure} ({fixed / total:.4f} outside the sites). Ask for "
                f"{self.measure}={minimum:.4f} or more, or pass strict=False to get the closest reachable model",
                minimum,
            )
        return max(budget, minimum_cost(costs))

    def _by_level(self, curves: Sequence[RankCurve], totals: Totals) -> list[Candidate]:
        """Choose the same share of cost or energy at every site, as large as the budget allows."""
        # Raising step by step requires candidates in a single order, so ranks of parts are left out.
        options = [
            [c for c in _cheaper_than_dense(curve, self.measure) if not isinstance(c.rank, tuple)] for curve in curves
        ]
        costs = [[candidate.cost(self.measure) for candidate in row] for row in options]
        rest = totals.now(self.measure) - sum(curve.dense.cost(self.measure) for curve in curves)
        budget = self._reachable(costs, rest, totals)
        if sum(row[-1] for row in costs) <= budget:
            return [curve.dense for curve in curves]
        if self.method == "uniform":
            levels = [[cost / max(row[-1], 1) for cost in row] for row in costs]
        else:
            levels = [
                [1.0 - curve.normalised(c.distortion) for c in row] for curve, row in zip(curves, options, strict=True)
            ]
        choice = _raise_lowest(costs, levels, budget)
        return [row[index] for row, index in zip(options, choice, strict=True)]


def allocate_for(
    allocation: Method | Mapping[str, Rank],
    *,
    flops: float | None,
    params: float | None,
    latency: float | None = None,
    energy: float | None,
    strict: bool,
    sensitive: bool,
) -> Allocate:
    """Return the pass for a user's options; arguments as in `balf_fx.compile`.

    Args:
        sensitive: whether gradients are known.
    """
    if isinstance(allocation, Mapping):
        return Allocate(flops, params, energy=energy, ranks=allocation, strict=strict, latency=latency)
    importance = IMPORTANCE if sensitive else 0.0
    return Allocate(flops, params, allocation, energy, strict=strict, importance=importance, latency=latency)


@dataclass(frozen=True)
class _Outcome:
    """What a method chose.

    Attributes:
        chosen: a candidate for each site.
        loss, bound: the value of the objective and its lower bound, where it was minimised.
        sizes: the size of each width, where widths were chosen too.
        saved_elsewhere: what those sizes save in operations that are not sites.
    """

    chosen: list[Candidate]
    loss: float | None = None
    bound: float | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    saved_elsewhere: Cost = FREE


@dataclass(frozen=True)
class _Group:
    """Sites and widths that are chosen together: one class of the multiple-choice knapsack problem.

    Attributes:
        options: the last one is dense.
        full: the current cost of operations that are not sites but whose cost depends on the widths.
    """

    sites: tuple[Site, ...]
    widths: tuple[str, ...]
    options: Options
    full: Cost = FREE

    def from_cost(self, least: float) -> _Group:
        """The group without the options that cost less."""
        kept = [index for index, cost in enumerate(self.options.costs) if cost >= least]
        return dataclasses.replace(self, options=self.options.only(kept))


def _group_of(site: Site, curve: RankCurve, weight: float, measure: Measure) -> _Group:
    """One site with its candidates."""
    candidates = _cheaper_than_dense(curve, measure)
    costs = [candidate.cost(measure) for candidate in candidates]
    losses = [weight * curve.normalised(candidate.distortion) for candidate in candidates]

    def make(index: int, loss: float) -> Option:
        chosen = candidates[index]
        return Option((chosen,), (), chosen.total, FREE, loss)

    return _Group((site,), (), Options(range(len(candidates)), costs, losses, make))


def _weights(curves: Sequence[RankCurve], importance: float) -> list[float]:
    """The weight of each site's normalised distortion: (loss / geometric mean)^importance, 1 without a gradient."""
    mean = _mean_loss(curves)
    return [1.0 if curve.loss is None else (curve.loss / mean) ** importance for curve in curves]


def _mean_loss(curves: Sequence[RankCurve]) -> float:
    known = [curve.loss for curve in curves if curve.loss is not None and curve.loss > 0]
    return statistics.geometric_mean(known) if known else 1.0


def _cheaper_than_dense(curve: RankCurve, measure: Measure) -> list[Candidate]:
    """The ranks that cost less than dense in this measure, ascending, then dense."""
    return [c for c in curve.candidates[:-1] if c.cost(measure) < curve.dense.cost(measure)] + [curve.dense]


def _cheapest_without_loss(group: _Group) -> Candidate:
    """The cheapest candidate of a site that changes no more than rounding does."""
    free = (index for index, loss in enumerate(group.options.losses) if loss <= _ROUNDING)
    cheapest: Option = group.options[min(free, key=group.options.costs.__getitem__)]
    return cheapest.ranks[0]


def _first_with_energy(curve: RankCurve, energy: float) -> Candidate:
    """The smallest rank that keeps this share of the energy, or dense if none does."""
    joint = (c for c in curve.candidates if not isinstance(c.rank, tuple))
    return next(c for c in joint if 1 - curve.normalised(c.distortion) >= energy)


def _raise_lowest(costs: Sequence[Sequence[int]], levels: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Start every site at its cheapest candidate and keep raising the site with the lowest level while it fits."""
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
