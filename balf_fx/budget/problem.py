"""The allocation problem: one budget for the sites and widths of one or more graphs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from balf_fx.budget.clusters import Cluster
from balf_fx.budget.finding import find_clusters
from balf_fx.errors import PassError
from balf_fx.graph.allocation import Allocation
from balf_fx.graph.annotation import annotate, annotation, graph_record, record_graph, sites
from balf_fx.graph.curves import Clock, Measure, Rank, RankCurve
from balf_fx.graph.site import Refusal, Site
from balf_fx.ranks.costs import energy_curve


@dataclass(frozen=True)
class Totals:
    """The cost of the whole model.

    Attributes:
        flops, params: the cost of the user's model; budgets are fractions of it.
        params_now: the parameters after the passes so far, which may have folded some of them.
        latency: nanoseconds of one call; 0 where times have not been measured.
    """

    flops: int
    params: int
    params_now: int
    latency: int = 0

    def of(self, measure: Measure) -> int:
        """The cost of the user's model."""
        return int(getattr(self, measure))

    def now(self, measure: Measure) -> int:
        """The cost after the passes so far."""
        return self.params_now if measure == "params" else self.of(measure)

    def params_after(self, allocation: Allocation) -> int:
        """Parameters once the chosen sites are factorized."""
        changed = sum(choice.chosen.params - choice.dense.params for choice in allocation.choices)
        return self.params_now + changed - allocation.saved_elsewhere.params


Part = tuple[fx.GraphModule, int]
"""A scored graph, and how often one call of the model runs it."""


@dataclass(frozen=True)
class Problem:
    """The sites and widths that share one budget, in one or more graphs.

    Attributes:
        curves: the curve of each site, with costs for one call of the model.
        clusters: sites and widths that are chosen together.
    """

    curves: Mapping[Site, RankCurve]
    totals: Totals
    clusters: tuple[Cluster, ...]


def pose(parts: Sequence[Part], totals: Totals) -> Problem:
    """Build the problem of all graphs together; sites with the same name are one site that all of them use."""
    curves: dict[str, tuple[Site, RankCurve]] = {}
    for graph_module, calls in parts:
        for site, nodes in sites(graph_module).items():
            curve = annotation(nodes[0]).curve
            if curve is None:
                raise PassError(f"Allocate: site {site.name!r} has no curve; run Score first")
            curve = _repeated(curve, calls)
            if site.name in curves:
                site, other = curves[site.name]
                curve = _joined(other, curve)
            curves[site.name] = site, curve
    clusters = [cluster for graph_module, calls in parts for cluster in find_clusters(graph_module, calls)]
    return Problem(dict(curves.values()), totals, tuple(clusters))


@dataclass(frozen=True)
class Loss:
    """The loss of a sample, to second order.

    Attributes:
        fitted: on the samples by which ranks and features were chosen.
        optimism: how much more it is on others.
    """

    fitted: float
    optimism: float


def predicted_loss(problem: Problem, allocation: Allocation) -> Loss:
    """The loss of an allocation, as the sum over sites and widths; none of sites without gradients."""
    lost = []
    for choice in allocation.choices:
        site = problem.curves[choice.site]
        share = site.normalised(choice.chosen.distortion)
        lost.append((site.loss or 0.0, share, site.optimism(choice.chosen.rank)))
    for cluster in problem.clusters:
        for width, curve in zip(cluster.widths, cluster.curves, strict=True):
            size = allocation.size_of(width)
            lost.append((curve.loss, curve.normalised(curve.distortion[size]), curve.optimism(size)))
    fitted = math.fsum(loss * (share - optimism) for loss, share, optimism in lost)
    return Loss(fitted, math.fsum(loss * optimism for loss, _, optimism in lost))


def settle(parts: Sequence[Part], problem: Problem, allocation: Allocation) -> None:
    """Record an allocation in all graphs, for the passes that carry it out, for plans and for reports."""
    by_name = {choice.site.name: choice for choice in allocation.choices}
    for graph_module, _ in parts:
        for site, nodes in sites(graph_module).items():
            for node in nodes:
                annotate(node, choice=by_name[site.name])
        record_graph(
            graph_module,
            flops=problem.totals.flops if graph_record(graph_module).flops is not None else None,
            params=problem.totals.params,
            params_after=problem.totals.params_after(allocation),
            allocation=allocation,
            refusals=tuple(_refusals(parts)),
        )


def drawn(problem: Problem, allocation: Allocation) -> Allocation:
    """The allocation with the energy that other ranks would keep, for plots."""
    curves = {site.name: curve for site, curve in problem.curves.items()}
    choices = tuple(
        dataclasses.replace(choice, spectrum=energy_curve(choice.site, curves[choice.site.name]))
        for choice in allocation.choices
    )
    return dataclasses.replace(allocation, choices=choices)


def _refusals(parts: Sequence[Part]) -> Iterator[tuple[Refusal, int | None]]:
    """The refusals of all graphs, with their FLOPs in one call of the model."""
    for graph_module, calls in parts:
        for mark in map(annotation, graph_module.graph.nodes):
            if mark.refusal is not None:
                yield mark.refusal, None if mark.flops is None else calls * mark.flops


def _repeated(curve: RankCurve, calls: int) -> RankCurve:
    """The curve of a site that is run several times in one call of the model."""
    if calls == 1:
        return curve
    candidates = tuple(
        dataclasses.replace(each, flops=calls * each.flops, latency=calls * each.latency) for each in curve.candidates
    )
    clock = None if curve.clock is None else _together([curve.clock] * calls)
    return dataclasses.replace(curve, candidates=candidates, output_elements=calls * curve.output_elements, clock=clock)


def _joined(first: RankCurve, second: RankCurve) -> RankCurve:
    """The curve of a site that two graphs use: its factors are stored once and run in both."""
    pairs = zip(first.candidates, second.candidates, strict=True)
    candidates = tuple(
        dataclasses.replace(one, flops=one.flops + other.flops, latency=one.latency + other.latency)
        for one, other in pairs
    )
    elements = first.output_elements + second.output_elements
    clocks = [curve.clock for curve in (first, second) if curve.clock is not None]
    clock = _together(clocks) if clocks else None
    return dataclasses.replace(first, candidates=candidates, output_elements=elements, clock=clock)


def _together(clocks: Sequence[Clock]) -> Clock:
    """The time of several uses of a site."""

    def time(site: Site, rank: Rank) -> int:
        return sum(clock(site, rank) for clock in clocks)

    return time
