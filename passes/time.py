"""Measure the time of every candidate of every site."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.calibration.observers import OBSERVERS
from balf_fx.errors import PassError
from balf_fx.graph.annotation import annotate, annotation, record_graph
from balf_fx.graph.curves import Clock, Form, Rank, RankCurve
from balf_fx.graph.parameters import get_tensor
from balf_fx.graph.site import Site
from balf_fx.latency.operations import Operation, Run, Use
from balf_fx.latency.profile import node_seconds
from balf_fx.latency.stopwatch import Task
from balf_fx.latency.table import Table
from balf_fx.latency.uses import use_of
from balf_fx.passes.base import Pass
from balf_fx.progress import SILENT, Progress
from balf_fx.ranks.costs import rank_flops, timed


@dataclass(frozen=True)
class Time(Pass):
    """Measure what each rank of each site costs in time here, and what all other nodes do.

    The time of a dense site is that of its nodes. At a rank, it is in proportion to the sum of the operations that the
    site runs (`latency.operations`), which are measured one by one for its positions, type and device
    (`latency.table`); that of experts, whose positions the inputs decide, is in proportion to FLOPs. A convolution
    whose kernel may be divided takes the form that loses least at half of its time.

    In a graph that inductor compiles, what is between the layers is fused: all nodes that are not sites share what the
    sites leave of the graph's time.

    Attributes:
        inputs: a value for each placeholder, of the shapes on which FLOPs were counted; nodes are timed on them.
        table: the known times; new ones are added to it.
        progress: shows the progress over the operations.
        compiled: runs the graph compiled by inductor, on the same inputs; None where the nodes run one by one.
        timed: the same graph without observers, as the user runs it (`Overwrite`), whose nodes are timed; None for the
            graph itself.
    """

    inputs: Sequence[Any]
    table: Table
    progress: Progress = field(default=SILENT, repr=False, compare=False)
    compiled: Task | None = None
    timed: fx.GraphModule | None = field(default=None, repr=False, compare=False)

    def requires(self, graph_module: fx.GraphModule) -> None:
        for site, nodes in self.require_sites(graph_module).items():
            if annotation(nodes[0]).curve is None:
                raise PassError(f"Time: site {site.name!r} has no curve; run Score first")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        layers = self.require_sites(graph_module)
        device = next(get_tensor(graph_module, site.weight).device for site in layers)
        plain = graph_module if self.timed is None else self.timed
        times, whole = self.table.group.once(
            lambda: node_seconds(plain, self.inputs, device, f"{OBSERVERS}.", self.compiled)
        )
        if whole is not None:
            times = _fused(times, {node.name for nodes in layers.values() for node in nodes}, whole)
        for node in graph_module.graph.nodes:
            annotate(node, nanoseconds=round(1e9 * times.get(node.name, 0.0)))
        record_graph(graph_module, nanoseconds=round(1e9 * sum(times.values())))
        compiled = self.compiled is not None
        uses = {site: [use_of(graph_module, site, node, compiled) for node in nodes] for site, nodes in layers.items()}
        forms = {site: _forms(site, nodes) for site, nodes in layers.items()}
        largest = [run for site in layers for form in forms[site] for run in _largest(*form, uses[site])]
        self.table.measure(largest, self.progress)
        for site, nodes in layers.items():
            measured = sum(annotation(node).nanoseconds or 0 for node in nodes)
            curves = [(form, self._timed(form, curve, measured, uses[site])) for form, curve in forms[site]]
            chosen, *others = sorted(curves, key=lambda item: item[1].least_at_half("latency"))
            for node in nodes:
                annotate(node, site=chosen[0], curve=chosen[1], others=tuple(others))
        return PassResult(graph_module, False)

    def _timed(self, site: Site, curve: RankCurve, measured: int, uses: Sequence[Use]) -> RankCurve:
        """The curve with the times of its candidates, given that of the site's nodes."""
        clock = _of_experts(measured, curve) if site.has_experts else self._clock(site, measured, uses)
        return dataclasses.replace(curve, candidates=tuple(timed(curve.candidates, site, clock)), clock=clock)

    def _clock(self, whole: Site, measured: int, uses: Sequence[Use]) -> Clock:
        """The time of a site, given that of its nodes."""

        def by_table(site: Site, rank: Rank) -> float:
            return sum(self.table.nanoseconds(run) for use in uses for run in use.runs(site, rank))

        dense = by_table(whole, None)

        def clock(site: Site, rank: Rank) -> int:
            return round(measured * by_table(site, rank) / dense)

        return clock


def _fused(times: Mapping[str, float], layers: Collection[str], whole: float) -> Mapping[str, float]:
    """The seconds of nodes in a compiled graph.

    Args:
        times: those of nodes that run one by one.
        layers: the names of those that are not fused.
        whole: the seconds of the graph.
    """
    others = sum(seconds for name, seconds in times.items() if name not in layers)
    left = max(whole - sum(times[name] for name in layers), 0.0)
    return {name: seconds if name in layers else left * seconds / others for name, seconds in times.items()}


def _of_experts(measured: int, curve: RankCurve) -> Clock:
    """The time of a site with experts, given that of its nodes."""

    def clock(site: Site, rank: Rank) -> int:
        flops = rank_flops(site, rank, curve.dense.flops, curve.output_elements)
        return round(measured * flops / max(curve.dense.flops, 1))

    return clock


def _forms(site: Site, nodes: Sequence[fx.Node]) -> list[tuple[Site, RankCurve]]:
    """The forms that a site may have, each with its curve."""
    mark = annotation(nodes[0])
    if mark.curve is None:
        raise PassError(f"Time: {nodes[0].name} has no curve; run Score first")
    return [(site, mark.curve), *mark.others]


def _largest(site: Site, curve: RankCurve, uses: Sequence[Use]) -> Iterator[Run]:
    """The dense runs of a site, and for each operation of its candidates the largest sizes.

    A narrower site may be written in another form, so both are counted.
    """
    if site.has_experts:
        return
    ranks = [candidate.rank for candidate in curve.candidates]
    forms: list[Form] = [site.divided or "pair"]
    if site.pivots is not None and site.divided is None:
        forms += ["rows", "columns"] if site.reads_each_once else ["rows"]
    ordered = site if site.pivots is None else dataclasses.replace(site, pivots="none")  # which may take gathers
    sizes: dict[Operation, tuple[int, int]] = {}
    for use in uses:
        yield from use.runs(site, None)
        for run in (run for form in forms for rank in ranks for run in use.runs_as(ordered, rank, form)):
            inputs, outputs = sizes.get(run.operation, (0, 0))
            sizes[run.operation] = max(inputs, run.inputs), max(outputs, run.outputs)
    yield from (Run(operation, *size) for operation, size in sizes.items())
