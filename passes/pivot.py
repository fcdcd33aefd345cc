"""Write each low-rank map with some of its own rows or columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.graph.annotation import Pivots, annotate, annotation, graph_record, record_graph, sites
from balf_fx.graph.curves import Form, Solution
from balf_fx.graph.widths import Width
from balf_fx.passes.base import Pass
from balf_fx.passes.factorize import solution_of
from balf_fx.passes.find_pivots import writers_and_readers
from balf_fx.ranks.bases import basis_of, largest_entry, shared_columns
from balf_fx.ranks.pivots import pivot_rows
from balf_fx.widths.narrowing import Cut, find_cuts, hosted_rows


@dataclass(frozen=True)
class Pivot(Pass):
    """Choose the pivots of each low-rank map, and an order for the features of each width around such maps.

    Runs between `Refit` and `Narrow`, which reorders the constants between layers; `Factorize` writes the maps. All
    layers around a width share its order. It starts with the pivots of the smallest rank, and those of a larger rank
    contain them. Where some coefficient of such a layer exceeds the bound, it has pivots of its own, and a gather
    brings its outputs into order.

    Heads of attention get new bases first, where the allocation has chosen identity blocks (`ranks.bases`).

    Attributes:
        bound: the largest coefficient by which pivots in a shared order are combined, at least 1 (`ranks.pivots`).
    """

    bound: float = 3.0

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        self._choose_bases(graph_module)
        record, cuts = graph_record(graph_module), find_cuts(graph_module)
        widths = {width.key: width for width in (*record.widths, *record.orderable)}
        written, read = writers_and_readers(graph_module)
        members: dict[str, list[_Member]] = defaultdict(list)
        for site, nodes in sites(graph_module).items():
            node = nodes[0]
            choice, cut = annotation(node).choice, cuts.get(node.name, Cut())
            if choice is None:
                continue
            form = cut.outputs(cut.inputs(choice.site)).form(choice.chosen.rank)
            if form == "pair":
                continue
            solution = solution_of(graph_module, node, site, cut)
            width = (written if form == "rows" else read).get(node.name)
            if width is not None and choice.site.pivots != "gather":
                members[width.key].append(_Member(tuple(nodes), form, solution[0]))
                continue
            _annotate(nodes, Pivots("rows", tuple(map(_own_order, solution))))
        orders = {key: self._order(list(own)) for key, own in members.items()}
        kept = {key: _kept(graph_module, widths[key])[order] for key, order in orders.items()}
        record_graph(graph_module, orders=kept)
        return PassResult(graph_module, False)

    def _choose_bases(self, graph_module: fx.GraphModule) -> None:
        """Give the heads for which the allocation says so a basis with identity blocks."""
        record, cuts = graph_record(graph_module), find_cuts(graph_module)
        bases: dict[str, Tensor] = {}
        for site, nodes in sites(graph_module).items():
            node, choice = nodes[0], annotation(nodes[0]).choice
            if choice is None or not choice.chosen.blocks:
                continue
            cut = cuts.get(node.name, Cut())
            (solution,) = solution_of(graph_module, node, site, cut)
            heads = [solution.right[0, rows].detach().cpu() for rows in hosted_rows(graph_module, node.name, cut)]
            order = shared_columns(heads)
            _annotate(nodes, Pivots("blocks", (order.unsqueeze(0),)))
            widths = [width.key for width in record.widths if record.hosts.get(width.key) == node.name]
            bases |= {key: basis_of(own, order) for key, own in zip(widths, heads, strict=True)}
        record_graph(graph_module, bases=bases)

    def _order(self, members: list[_Member]) -> Tensor:
        """The order of a width's features that serves the layers on both sides."""
        while len(members) > 1:
            order = shared_columns([member.rows for member in members])
            largest = [largest_entry(member.rows, order) for member in members]
            worst = max(range(len(members)), key=largest.__getitem__)
            if largest[worst] <= self.bound:
                break
            outside = members.pop(worst)
            _annotate(outside.nodes, Pivots("rows", (_own_order(outside.solution),)))
        else:
            order = pivot_rows(members[0].factor)
        for member in members:
            _annotate(member.nodes, Pivots(member.form, (None,)))
        return order


@dataclass(frozen=True)
class _Member:
    """A site that reads or outputs a width, with a rank."""

    nodes: tuple[fx.Node, ...]
    form: Form
    solution: Solution

    @property
    def factor(self) -> Tensor:
        """The factor [features, r] whose rows belong to the width's features."""
        left, right = self.solution.left, self.solution.right
        factor = right[0].mT if self.form == "columns" or left is None else left[0]
        return factor.detach().cpu()

    @property
    def rows(self) -> Tensor:
        """The factor as one head, [1, r, features]."""
        return self.factor.mT.unsqueeze(0)


def _annotate(nodes: Sequence[fx.Node], pivots: Pivots) -> None:
    for node in nodes:
        annotate(node, pivots=pivots)


def _own_order(part: Solution) -> Tensor | None:
    """The order of a part's rows in each group; None if it is dense."""
    return None if part.left is None else torch.stack([pivot_rows(left) for left in part.left])


def _kept(graph_module: fx.GraphModule, width: Width) -> Tensor:
    """The features of a width that the allocation keeps, ascending."""
    record = graph_record(graph_module)
    size = width.features if record.allocation is None else record.allocation.sizes.get(width.key, width.features)
    if size == width.features:
        return torch.arange(size)
    curves = dict(zip((own.key for own in record.widths), record.width_curves, strict=False))
    curve = curves[width.key]
    kept = None if curve is None else curve.kept(size)
    if kept is None:
        raise ValueError(f"{width.key} has no order of its features")
    return kept.cpu()
