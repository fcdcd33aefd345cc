"""Allocate what a plan says, in place of solving a budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.errors import PlanError
from balf_fx.graph.allocation import Allocation, Choice
from balf_fx.graph.annotation import annotate, annotation, graph_record, record_graph
from balf_fx.graph.curves import Candidate, Rank
from balf_fx.graph.plan import Plan
from balf_fx.graph.site import Site
from balf_fx.passes.base import Pass
from balf_fx.reporting.report import SiteRow


@dataclass(frozen=True)
class Follow(Pass):
    """Give every site and width what it has in a plan.

    Attributes:
        plan: made for a model of the same architecture.

    Raises:
        PlanError: the graph's sites or widths are others than the plan's, or cannot have what it says.
    """

    plan: Plan

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.require_sites(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        report, found = self.plan.report, self.require_sites(graph_module)
        choices = tuple(_choice(site, row) for site, row in self._matched(list(found)))
        for nodes, choice in zip(found.values(), choices, strict=True):
            for node in nodes:
                annotate(node, choice=choice)
        marks = [annotation(node) for node in graph_module.graph.nodes]
        allocation = Allocation(
            report.method,
            "params" if report.measure == "params" else "flops",
            report.target,
            choices,
            report.primal,
            report.bound,
            self._sizes(graph_module),
            (report.flops_saved_elsewhere, report.params_saved_elsewhere),
        )
        record_graph(
            graph_module,
            allocation=allocation,
            params_after=report.params_after,
            refusals=tuple((mark.refusal, mark.flops) for mark in marks if mark.refusal is not None),
        )
        return PassResult(graph_module, False)

    def _matched(self, found: list[Site]) -> Iterator[tuple[Site, SiteRow]]:
        rows = {row.name: row for row in self.plan.report.sites}
        unlike = [site.name for site in found if site.name not in rows or rows[site.name].shape != site.shape]
        unlike += sorted(set(rows) - {site.name for site in found})
        if unlike:
            raise PlanError(
                f"the plan was made for another model: {', '.join(unlike[:5])}{', ...' if len(unlike) > 5 else ''} "
                "are not the same in both"
            )
        for site in found:
            _check_rank(site, rows[site.name].rank)
        return ((site, rows[site.name]) for site in found)

    def _sizes(self, graph_module: fx.GraphModule) -> dict[str, int]:
        record = graph_record(graph_module)
        found = {width.key: width for width in record.widths}
        curves = {width.key: curve for width, curve in zip(record.widths, record.width_curves, strict=False)}
        for planned in self.plan.widths:
            width = found.get(planned.key)
            if width is None:
                raise PlanError(f"the plan narrows {planned.kind} at {planned.name}, of which this graph knows nothing")
            if curves.get(planned.key) is None:
                raise PlanError(
                    f"the plan narrows {planned.kind} at {planned.name}, which takes gradients: use "
                    "factors='sensitivity' and widths=True"
                )
            if not 1 <= planned.size <= width.features:
                raise PlanError(f"the plan leaves {planned.size} of {width.features} {planned.kind} at {planned.name}")
        return {planned.key: planned.size for planned in self.plan.widths}


def _check_rank(site: Site, rank: Rank) -> None:
    """Refuse what somebody may have written into a plan by hand."""
    if rank is None:
        return
    ranks, parts = (rank, site.parts) if isinstance(rank, tuple) else ((rank,), 1)
    limit = min(site.out_features // parts, site.in_features)
    numbers = [each for each in ranks if each is not None]
    if not numbers or len(ranks) != parts or not all(1 <= each <= limit for each in numbers):
        raise PlanError(f"the plan has rank {rank} for {site.name!r}, which is {site.shape}")


def _choice(site: Site, row: SiteRow) -> Choice:
    chosen = Candidate(row.rank, row.flops_after, row.params_after, row.distortion)
    dense = Candidate(None, row.flops_before, row.params_before, 0.0)
    return Choice(site, chosen, dense, row.energy_kept, row.spectrum)
