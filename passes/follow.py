"""Allocate the ranks and sizes of a plan, in place of solving a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.budget.problem import Problem
from balf_fx.errors import PlanError
from balf_fx.graph.allocation import Allocation, Choice, scaled_flops
from balf_fx.graph.annotation import annotate, annotation, graph_record, record_graph
from balf_fx.graph.curves import Rank
from balf_fx.graph.plan import Plan
from balf_fx.graph.site import Site
from balf_fx.graph.widths import Width
from balf_fx.passes.base import Pass


@dataclass(frozen=True)
class Follow(Pass):
    """Give every site its rank and every width its size in a plan.

    Attributes:
        plan: made for a model of the same architecture.

    Raises:
        PlanError: the graph's sites or widths differ from the plan's, or cannot have its ranks or sizes.
    """

    plan: Plan

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.require_sites(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        record, found = graph_record(graph_module), self.require_sites(graph_module)
        widths = {width.key: width for width in record.widths}
        curves = zip(widths, record.width_curves, strict=False)
        allocation = self._allocation(found, widths, {key for key, curve in curves if curve is not None})
        for nodes, choice in zip(found.values(), allocation.choices, strict=True):
            for node in nodes:
                annotate(node, choice=choice)
        marks = [annotation(node) for node in graph_module.graph.nodes]
        record_graph(
            graph_module,
            allocation=allocation,
            params_after=self.plan.params_after,
            refusals=tuple((mark.refusal, mark.flops) for mark in marks if mark.refusal is not None),
        )
        return PassResult(graph_module, False)

    def solve(self, problem: Problem) -> Allocation:
        """The plan's allocation for all graphs together, in place of `Allocate.solve`.

        Its FLOPs are those of this example batch, which may have another shape than the plan's.
        """
        widths = {width.key: width for cluster in problem.clusters for width in cluster.widths}
        found = self._allocation(problem.curves, widths, widths)
        dense = {site.name: curve.dense.flops for site, curve in problem.curves.items()}
        choices = tuple(choice.scaled(dense[choice.site.name], choice.dense.flops) for choice in found.choices)
        flops = scaled_flops(found.saved_elsewhere.flops, problem.totals.flops, self.plan.flops or 0)
        elsewhere = dataclasses.replace(found.saved_elsewhere, flops=flops)
        return dataclasses.replace(found, choices=choices, saved_elsewhere=elsewhere)

    def _allocation(self, found: Iterable[Site], widths: Mapping[str, Width], scored: Collection[str]) -> Allocation:
        """The plan's allocation for these sites.

        Args:
            scored: keys of the widths that can be narrowed.
        """
        choices = {choice.site.name: choice for choice in self.plan.allocation.choices}
        divided = self.plan.divided
        listed = [dataclasses.replace(site, divided=divided.get(site.name)) for site in found]
        unlike = [s.name for s in listed if s.name not in choices or choices[s.name].site.shape != s.shape]
        unlike += sorted(set(choices) - {site.name for site in listed})
        if unlike:
            raise PlanError(
                f"the plan was made for another model: {', '.join(unlike[:5])}{', ...' if len(unlike) > 5 else ''} "
                "differ"
            )
        for site in listed:
            _check_rank(site, choices[site.name].chosen.rank)
        narrowed = [planned for planned in self.plan.widths if planned.size != planned.features]
        for planned in narrowed:
            width = widths.get(planned.key)
            if width is None or planned.key not in scored:
                raise PlanError(
                    f"the plan narrows {planned.kind} at {planned.name}, for which there are no statistics here: they "
                    "require gradients, so use factors='sensitivity' and widths=True"
                )
            if planned.features != width.features or not width.least <= planned.size <= width.features:
                raise PlanError(
                    f"the plan leaves {planned.size} of {planned.features} {planned.kind} at {planned.name}, which has "
                    f"{width.features}"
                )
        own = tuple(_with_site(choices[site.name], site) for site in listed)
        sizes = {planned.key: planned.size for planned in narrowed}
        return dataclasses.replace(self.plan.allocation, choices=own, sizes=sizes)


def _with_site(choice: Choice, site: Site) -> Choice:
    """The plan's choice for the graph's own site, in the form for which it was priced."""
    return dataclasses.replace(choice, site=dataclasses.replace(site, pivots=choice.site.pivots, move=choice.site.move))


def _check_rank(site: Site, rank: Rank) -> None:
    """Raise PlanError for a rank that the site cannot have, as a plan edited by hand may contain."""
    if rank is None:
        return
    ranks, parts = (rank, site.parts) if isinstance(rank, tuple) else ((rank,), 1)
    outputs, inputs = site.factor_sizes
    limit = min(outputs // parts, inputs)
    numbers = [each for each in ranks if each is not None]
    whole = all(isinstance(each, int) and 1 <= each <= limit and each % site.rank_step == 0 for each in numbers)
    if not numbers or len(ranks) != parts or not whole:
        raise PlanError(f"the plan has rank {rank} for {site.name!r}, which is {site.shape_in_words}")
