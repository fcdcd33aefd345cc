"""Write each low-rank map with some of its own rows or columns, and heads of attention with identity blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.graph.annotation import Pivots, annotate, annotation, graph_record, record_graph, sites
from balf_fx.graph.curves import DIVIDED, Form, Solution
from balf_fx.graph.parameters import get_tensor
from balf_fx.graph.site import Site
from balf_fx.graph.widths import Width
from balf_fx.passes.base import Pass
from balf_fx.passes.factorize import solution_of
from balf_fx.passes.find_pivots import writers_and_readers
from balf_fx.ranks.bases import BOUND, SharedColumns, basis_of, row_space
from balf_fx.ranks.pivots import pivot_rows
from balf_fx.widths.narrowing import Cut, find_cuts, hosted_rows

_HALF = 3.0  # the largest coefficient for weights in half precision


@dataclass(frozen=True)
class Pivot(Pass):
    """Choose the pivots of each low-rank map (`ranks.pivots`), and an order for the features of each width around them.

    Runs between `Refit` and `Narrow`, which reorders the constants between layers; `Factorize` writes the maps. All
    layers around a width share its order. It starts with the pivots of the smallest rank, and those of a larger rank
    contain them. Where some coefficient of such a layer exceeds the bound, it has pivots of its own, and a gather
    brings its features into order.

    Heads for which the allocation has chosen identity blocks get new bases (`ranks.bases`); the columns of the blocks
    are pivots in the same order.

    Attributes:
        bound: the largest coefficient by which pivots in a shared order are combined, at least 1 (`ranks.pivots`). For
            weights in half precision, it is at most 3.
    """

    bound: float = 32.0

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        record = graph_record(graph_module)
        widths = {width.key: width for width in record.all_widths}
        # 1. Orders of widths, for the pivots of all layers around each.
        shared: dict[str, list[_Member]] = defaultdict(list)
        for member in self._members(graph_module):
            if member.width is not None:
                shared[member.width].append(member)
        found = {key: _shared_order(shared.pop(key)) for key in list(shared)}  # one width's solutions at a time
        orders = {key: _kept(graph_module, widths[key])[order] for key, (order, _) in found.items()}
        record_graph(graph_module, orders=orders)
        for _, served in found.values():
            for nodes, form in served:
                _annotate(nodes, Pivots(form, (None,)))
        # 2. Orders of other layers, for their features in the new order; and bases of heads, which change rows.
        self._give_own_orders(graph_module, {"blocks"})
        record_graph(graph_module, bases=dict(_bases(graph_module)))
        self._give_own_orders(graph_module, {"rows", "columns"})
        return PassResult(graph_module, False)

    def _give_own_orders(self, graph_module: fx.GraphModule, forms: set[Form]) -> None:
        for member in self._members(graph_module):
            if member.form in forms:
                _annotate(member.nodes, Pivots(member.form, member.own_orders()))

    def _members(self, graph_module: fx.GraphModule) -> Iterator[_Member]:
        """The sites that the allocation writes with pivots or with identity blocks, without those that have pivots."""
        cuts = find_cuts(graph_module)
        written, read = writers_and_readers(graph_module)
        for site, nodes in sites(graph_module).items():
            node, choice = nodes[0], annotation(nodes[0]).choice
            if choice is None or annotation(node).pivots is not None:
                continue
            cut = cuts.get(node.name, Cut())
            form = cut.outputs(cut.inputs(choice.site)).form(choice.chosen.rank)
            form = "blocks" if choice.chosen.blocks else form
            if form == "pair" or form in DIVIDED:
                continue
            width = (written if form == "rows" else read).get(node.name)
            free = width is not None and (form == "blocks" or choice.site.pivots == form)
            heads = hosted_rows(graph_module, node.name, cut) if form == "blocks" else ()
            yield _Member(
                tuple(nodes),
                form,
                partial(solution_of, graph_module, node, site, cut),
                self._limit(graph_module, site, form),
                heads,
                width.key if width is not None and free else None,
            )

    def _limit(self, graph_module: fx.GraphModule, site: Site, form: Form) -> float:
        half = get_tensor(graph_module, site.weight).dtype in (torch.float16, torch.bfloat16)
        return BOUND if form == "blocks" else min(self.bound, _HALF) if half else self.bound


@dataclass(frozen=True, eq=False)
class _Member:
    """A site that is written with pivots.

    Attributes:
        solve: returns its solution.
        limit: the largest coefficient in a shared order.
        heads: for blocks, the rows of each set of heads.
        width: the key of the width in whose order the pivots are; None if they have an order of their own.
    """

    nodes: tuple[fx.Node, ...]
    form: Form
    solve: Callable[[], tuple[Solution, ...]]
    limit: float
    heads: tuple[Tensor, ...] = ()
    width: str | None = None

    @cached_property
    def bases(self) -> list[Tensor]:
        """Q [heads, features, r] of matrices that need r independent columns in common (`ranks.bases.row_space`)."""
        solution = self.solve()[0]  # not kept: those of all layers around a residual stream take much memory
        if self.form == "blocks":
            return [row_space(solution.right[0, rows]) for rows in self.heads]
        return [row_space(solution.right if self.form == "columns" or solution.left is None else solution.left.mT)]

    def own_orders(self) -> tuple[Tensor | None, ...]:
        """The order of the features for each part, pivots first; None for a dense part."""
        if self.form == "blocks":
            return (SharedColumns(self.bases).order.unsqueeze(0),)
        return tuple(_own_order(part, self.form) for part in self.solve())


def _shared_order(members: Sequence[_Member]) -> tuple[Tensor, list[tuple[tuple[fx.Node, ...], Form]]]:
    """An order of a width's features, and the members around it whose coefficients are bounded in this order."""
    served, begun = list(members), len(members)
    columns: SharedColumns | None = None
    while len(served) > 1 or served[0].form == "blocks":
        if columns is None:
            columns, begun = SharedColumns([basis for member in served for basis in member.bases]), len(served)
        owners = [member for member in served for _ in member.bases]
        excess = dict.fromkeys(served, 0.0)
        for owner, largest in zip(owners, columns.largest(), strict=True):
            excess[owner] = max(excess[owner], largest / owner.limit)
        beyond = sorted((member for member in served if excess[member] > 1), key=excess.__getitem__, reverse=True)
        if not beyond or len(served) == 1:
            return columns.order, _forms(served)
        leaving = set(beyond[: -(-len(beyond) // 2)])  # half of them: there may be hundreds around a residual stream
        served = [member for member in served if member not in leaving]
        if 2 * len(served) > begun:
            columns.keep([owner not in leaving for owner in owners])
        else:  # too many have left for their order to be a good start
            columns = None
    return pivot_rows(served[0].bases[0][0]), _forms(served)


def _forms(members: Sequence[_Member]) -> list[tuple[tuple[fx.Node, ...], Form]]:
    return [(member.nodes, member.form) for member in members]


def _bases(graph_module: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """The new bases of heads in layers whose pivots have been chosen, by `Width.key`."""
    record, cuts = graph_record(graph_module), find_cuts(graph_module)
    for site, nodes in sites(graph_module).items():
        node, pivots = nodes[0], annotation(nodes[0]).pivots
        if pivots is None or pivots.form != "blocks":
            continue
        cut = cuts.get(node.name, Cut())
        (solution,) = solution_of(graph_module, node, site, cut)
        right = solution.right[0].detach()
        order = torch.arange(right.shape[1], device="cpu") if pivots.orders[0] is None else pivots.orders[0][0]
        for width, rows in zip(record.hosted(node.name), hosted_rows(graph_module, node.name, cut), strict=True):
            yield width.key, basis_of(right[rows], order)


def _annotate(nodes: Sequence[fx.Node], pivots: Pivots) -> None:
    for node in nodes:
        annotate(node, pivots=pivots)


def _own_order(part: Solution, form: Form) -> Tensor | None:
    """The order of a part's rows in each group, or of its columns; None if it is dense."""
    if part.left is None:
        return None
    return torch.stack([pivot_rows(factor) for factor in (part.left if form == "rows" else part.right.mT)])


def _kept(graph_module: fx.GraphModule, width: Width) -> Tensor:
    """The features of a width that the allocation keeps, ascending."""
    record = graph_record(graph_module)
    size = record.size_of(width)
    if size == width.features:
        return torch.arange(size, device="cpu")
    curves = dict(zip((own.key for own in record.widths), record.width_curves, strict=False))
    curve = curves[width.key]
    kept = None if curve is None else curve.kept(size)
    if kept is None:
        raise ValueError(f"{width.key} has no order of its features")
    return kept.cpu()
