"""Clusters: sites and widths that are chosen together, since the size of a width changes the cost of layers around it.

The options of a cluster are all combinations of sizes of its widths and, for each of them, combinations of ranks of
its sites: all of them if there are few, else those on the lower convex hull of cost and loss. The loss of a rank is
assumed to be the same at every size, and losses are added, as squared errors that are independent.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from balf_fx.budget.members import Member, Ranks, Share
from balf_fx.budget.options import Option, Options
from balf_fx.graph.annotation import annotation, graph_record
from balf_fx.graph.curves import FREE, Candidate, Cost, Measure, RankCurve
from balf_fx.graph.flops import flops_and_outputs
from balf_fx.graph.layers import read_layer
from balf_fx.graph.parameters import get_tensor
from balf_fx.graph.site import Site
from balf_fx.graph.widths import Width, WidthCurve, joint_widths
from balf_fx.ranks.costs import rank_params
from balf_fx.widths.heads import is_attention, requires_equal_heads

_SIZES = {1: 32, 2: 12}  # the number of sizes tried for each width, by the number of widths in the cluster
_PRODUCTS = 512  # up to so many choices of ranks at one size are all tried; else those on the convex hull

_Build = Callable[[int, float], Option]
"""Makes an option from its index and its loss."""


class _Priced(NamedTuple):
    """Choices of one candidate per member at one choice of sizes.

    Attributes:
        costs, losses: [n] int64 and [n] float64.
        picks: [n, members] int64, the indices of the candidates; None for all choices in the order of
            `itertools.product`.
    """

    costs: Tensor
    losses: Tensor
    picks: Tensor | None = None


@dataclass(frozen=True)
class _Menu:
    """The candidates at one choice of sizes.

    Attributes:
        others: the cost of the shares.
        rows: the candidates of each member.
    """

    others: Cost
    rows: tuple[Ranks, ...]

    @property
    def choices(self) -> int:
        """The number of choices of one candidate per member."""
        return math.prod(len(row.candidates) for row in self.rows)

    def all_choices(self, weights: Sequence[float]) -> _Priced:
        """All choices, in the order of `itertools.product`."""
        costs = [row.costs for row in self.rows]
        losses = [weight * row.losses for row, weight in zip(self.rows, weights, strict=True)]
        return _Priced(_all_sums(costs, torch.int64), _all_sums(losses, torch.float64))

    def pick(self, index: int) -> tuple[int, ...]:
        """The choice with this index among all choices."""
        found: list[int] = []
        for row in reversed(self.rows):
            index, own = divmod(index, len(row.candidates))
            found.append(own)
        return tuple(reversed(found))

    def option(self, picked: Sequence[int], sizes: tuple[int, ...], loss: float) -> Option:
        """The option of one choice at these sizes."""
        ranks = tuple(row.candidates[own] for row, own in zip(self.rows, picked, strict=True))
        return Option(ranks, sizes, sum((each.total for each in ranks), self.others), self.others, loss)


@dataclass(frozen=True)
class Cluster:
    """Widths that share layers, the sites among these layers, and other operations whose cost depends on their sizes.

    The costs of the members' candidates do not depend on the weights and are cached: to try several weights, keep the
    cluster.
    """

    widths: tuple[Width, ...]
    curves: tuple[WidthCurve, ...]
    members: tuple[Member, ...]
    shares: tuple[Share, ...]
    _known: dict[tuple[Measure, int, tuple[float, ...]], Ranks] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def options(
        self,
        curves: Sequence[RankCurve],
        weights: Sequence[float],
        width_weights: Sequence[float],
        measure: Measure,
        near: Option | None = None,
    ) -> Options:
        """The Pareto-optimal options, ascending in cost; without `near`, the last one is the unchanged model.

        Args:
            curves, weights: the curve and the weight of each member, in their order.
            width_weights: the loss of each width when all its features are removed.
            near: an earlier option; sizes between its own and the next larger ones are tried.
        """
        losses = [
            [weight * curve.normalised(d) for d in curve.distortion]
            for curve, weight in zip(self.curves, width_weights, strict=True)
        ]
        tried = [_sizes(width, len(self.widths)) for width in self.widths]
        if near is not None:
            tried = list(map(_between_sizes, near.sizes, tried, (width.step for width in self.widths)))
        costs: list[Tensor] = []
        lost: list[Tensor] = []
        builders: list[_Build] = []
        all_sizes = list(itertools.product(*tried))
        menus = [self._menu(sizes, curves, measure) for sizes in all_sizes]
        for sizes, menu, priced in zip(all_sizes, menus, _priced(menus, weights), strict=True):
            kept = sum(loss[size] for loss, size in zip(losses, sizes, strict=True))
            costs.append(menu.others.of(measure) + priced.costs)
            lost.append(kept + priced.losses)
            builders.append(partial(_built, menu, priced.picks, sizes))
        if near is not None:
            for cost, loss, build in self._neighbours(near, curves, weights, measure):
                costs.append(cost)
                lost.append(loss)
                builders.append(build)
        starts = [0, *itertools.accumulate(map(len, costs))]
        cost, loss = torch.cat(costs), torch.cat(lost)
        efficient = _efficient(cost, loss)

        def make(index: int, loss: float) -> Option:
            own = bisect.bisect_right(starts, index) - 1
            return builders[own](index - starts[own], loss)

        return Options(efficient.tolist(), cost[efficient].tolist(), loss[efficient].tolist(), make)

    def _menu(self, sizes: tuple[int, ...], curves: Sequence[RankCurve], measure: Measure) -> _Menu:
        kept = [size / width.features for size, width in zip(sizes, self.widths, strict=True)]
        rows = (self._ranks(index, curve, kept, measure) for index, curve in enumerate(curves))
        return _Menu(sum((share.cost(kept) for share in self.shares), FREE), tuple(rows))

    def _ranks(self, index: int, curve: RankCurve, kept: Sequence[float], measure: Measure) -> Ranks:
        """The candidates of one member, which depend on the sizes of few of the widths."""
        member = self.members[index]
        key = measure, index, tuple(kept[width] for width in member.depends_on)
        known = self._known.get(key)
        if known is None or known.curve is not curve:
            known = self._known[key] = Ranks.of(member, curve, kept, measure)
        return known

    def _neighbours(
        self, near: Option, curves: Sequence[RankCurve], weights: Sequence[float], measure: Measure
    ) -> Iterator[tuple[Tensor, Tensor, _Build]]:
        """Costs and losses of options that differ from `near` in one member's rank, for each member, over all ranks."""
        kept = [size / width.features for size, width in zip(near.sizes, self.widths, strict=True)]
        for index, (member, curve, weight) in enumerate(zip(self.members, curves, weights, strict=True)):
            old = near.ranks[index]
            row = Ranks.of(member, curve, kept, measure, every=True)
            cost = near.cost(measure) - old.cost(measure) + row.costs
            loss = near.loss + weight * (row.losses - curve.normalised(old.distortion))
            yield cost, loss, partial(_changed, near, index, row.candidates)

    def repeated(self, calls: int) -> Cluster:
        """The same cluster in a graph that is run several times."""
        members = tuple(
            dataclasses.replace(each, flops=calls * each.flops, output_elements=calls * each.output_elements)
            for each in self.members
        )
        shares = tuple(dataclasses.replace(each, full=each.full.repeated(calls)) for each in self.shares)
        return dataclasses.replace(self, members=members, shares=shares)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its widths."""
        return tuple(width.key for width in self.widths)

    @property
    def full(self) -> Cost:
        """The cost of the shares at full size."""
        return sum((share.full for share in self.shares), FREE)


def find_clusters(graph_module: fx.GraphModule, calls: int = 1) -> list[Cluster]:
    """The clusters of a graph whose widths have been scored, with costs for this number of calls."""
    record = graph_record(graph_module)
    pairs = zip(record.widths, record.width_curves, strict=False)
    known = [(width, curve) for width, curve in pairs if curve is not None]
    nodes = {node.name: node for node in graph_module.graph.nodes}
    groups = joint_widths([width for width, _ in known])
    found = [_cluster(graph_module, nodes, [known[i] for i in group]) for group in groups]
    return found if calls == 1 else [cluster.repeated(calls) for cluster in found]


def _cluster(
    graph_module: fx.GraphModule,
    nodes: dict[str, fx.Node],
    known: Sequence[tuple[Width, WidthCurve]],
) -> Cluster:
    widths, curves = (tuple(width for width, _ in known), tuple(curve for _, curve in known))
    hosts = graph_record(graph_module).hosts
    written: dict[str, list[tuple[int, int]]] = {}
    read: dict[str, int] = {}
    products: dict[str, list[tuple[int, float]]] = {}
    shares: list[Share] = []
    mixed: set[str] = set()
    for index, width in enumerate(widths):
        for name, rows in zip(width.producers, width.rows, strict=True):
            written.setdefault(name, []).append((index, len(set(rows))))
        read.update(dict.fromkeys(width.consumers, index))
        if width.product is not None:
            mixed.update(width.producers)
            share = 0.5 if is_attention(nodes[width.product]) else 1.0
            if not width.padded:
                products.setdefault(width.product, []).append((index, share))
        along = [_between(graph_module, nodes[name], index, width.padded) for name in width.between]
        shares += [share for share in along if share is not None]
        if graph_record(graph_module).nanoseconds is not None:
            shares.append(Share(Cost(latency=_passing(width, nodes)), ((index, 1.0),)))
    for name, parts in products.items():
        shares.append(Share(_cost(nodes[name]), tuple(parts), requires_equal_heads(nodes[name])))
    members = []
    for name in dict.fromkeys((*written, *read)):
        node = nodes[name]
        site = annotation(node).site
        outputs = tuple(written.get(name, ()))
        if site is None:  # a layer that factors would not make cheaper
            layer = read_layer(graph_module, node)
            if not isinstance(layer, Site):
                raise TypeError(f"{name} is not a layer")
            shrinks = tuple((index, rows / layer.out_features) for index, rows in outputs)
            params = rank_params(layer, None, False)
            shares.append(Share(_cost(node, params), shrinks))
            continue
        gains_bias = name in read and bool(curves[read[name]].means)
        bias = site.bias is not None or gains_bias
        heads = tuple((index, width.heads) for index, width in enumerate(widths) if hosts.get(width.key) == name)
        members.append(Member(site, *flops_and_outputs([node]), outputs, read.get(name), name in mixed, bias, heads))
    return Cluster(widths, curves, tuple(members), tuple(shares))


def _between(graph_module: fx.GraphModule, node: fx.Node, index: int, padded: bool) -> Share | None:
    """What becomes cheaper beside the layers; None for entries that stay, since the model's code has all features."""
    layer = read_layer(graph_module, node)
    if isinstance(layer, Site):
        return Share(_cost(node, rank_params(layer, None, False)), ((index, 1.0),))
    held = get_tensor(graph_module, str(node.target))
    tensors = held.parameters() if isinstance(held, nn.Module) else [held] if isinstance(held, nn.Parameter) else []
    return None if padded else Share(_cost(node, sum(tensor.numel() for tensor in tensors)), ((index, 1.0),))


def _passing(width: Width, nodes: Mapping[str, fx.Node]) -> int:
    """The nanoseconds of the operations without parameters that a width's features pass on their way."""
    ends = {*width.consumers, width.product}
    counted = {*width.layers, *width.between, width.product}
    ahead = _reached([nodes[name] for name in width.producers], ends, lambda node: node.users)
    behind = _reached([nodes[name] for name in ends if name is not None], set(width.producers), _sources)
    passed = (node for node in ahead & behind if node.name not in counted and annotation(node).site is None)
    return sum(annotation(node).nanoseconds or 0 for node in passed)


def _sources(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def _reached(
    starts: Iterable[fx.Node], ends: Collection[str | None], following: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    """The nodes that are reached from some, but not through `ends`."""
    found: set[fx.Node] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node.name in ends else following(node)
    return found


def _cost(node: fx.Node, params: int = 0) -> Cost:
    """The cost of a node at full size."""
    mark = annotation(node)
    return Cost(mark.flops or 0, params, mark.nanoseconds or 0)


def _sizes(width: Width, together: int) -> list[int]:
    """The sizes to try, the full one last: multiples of eight, which suit the hardware, if there are enough."""
    count = _SIZES.get(together, 8)
    step = math.lcm(width.step, 8 if width.features >= 8 * count else 4 if width.features >= 4 * count else 1)
    exact = [width.features * k / count for k in range(1, count)]
    rounded = {min(max(round(size / step) * step, step), width.features) for size in exact}
    return [*sorted(rounded - {width.features}), width.features]


def _between_sizes(size: int, tried: Sequence[int], step: int) -> list[int]:
    """A few sizes from this one up to the next larger one that was tried, in steps of a multiple of `step`."""
    following = next((other for other in tried if other > size), size)
    step *= max((following - size) // (8 * step), 1)
    return list(range(size, following, step)) or [size]


def _priced(menus: Sequence[_Menu], weights: Sequence[float]) -> Iterator[_Priced]:
    """The choices at each menu: all if they are few, else those on the lower convex hull of cost and weighted loss."""
    on_hulls = iter(_on_hulls([menu for menu in menus if menu.choices > _PRODUCTS], weights))
    for menu in menus:
        yield next(on_hulls) if menu.choices > _PRODUCTS else menu.all_choices(weights)


def _on_hulls(menus: Sequence[_Menu], weights: Sequence[float]) -> list[_Priced]:
    """The choices on the lower convex hull of each menu, for all menus at once.

    They begin with the cheapest; each next one takes the steepest segment that is left of any member, as
    `hulls.steepest_first` orders them.
    """
    if not menus:
        return []
    tables = [_Table.of([menu.rows[member] for menu in menus]) for member in range(len(weights))]
    slopes = torch.cat([weight * table.slopes for table, weight in zip(tables, weights, strict=True)], 1)
    members = torch.repeat_interleave(torch.tensor([table.slopes.shape[1] for table in tables], device="cpu"))
    steepest = torch.argsort(-slopes, dim=1, stable=True)
    taken = F.pad(F.one_hot(members[steepest], len(tables)).cumsum(1), (0, 0, 1, 0))  # segments of each member so far
    picks = [table.points.gather(1, own) for table, own in zip(tables, taken.unbind(2), strict=True)]
    pairs = list(zip(tables, picks, strict=True))
    costs = torch.stack([table.costs.gather(1, own) for table, own in pairs]).sum(0)
    losses = [weight * table.losses.gather(1, own) for weight, (table, own) in zip(weights, pairs, strict=True)]
    rows = zip(costs, torch.stack(losses).sum(0), torch.stack(picks, 2), strict=True)
    counts = (1 + torch.isfinite(slopes).sum(1)).tolist()  # what follows is of menus with longer hulls
    return [_Priced(*(each[:count] for each in row)) for row, count in zip(rows, counts, strict=True)]


class _Table(NamedTuple):
    """The candidates of one member at some sizes and their hulls, as rows that are filled up to one length.

    Attributes:
        costs, losses: [sizes, n] int64 and float64.
        points: [sizes, k + 1] int64, filled up with 0.
        slopes: [sizes, k] float64, filled up with minus infinity.
    """

    costs: Tensor
    losses: Tensor
    points: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, rows: Sequence[Ranks]) -> _Table:
        distinct = list({id(row): row for row in rows}.values())
        number = {id(row): index for index, row in enumerate(distinct)}
        at = torch.tensor([number[id(row)] for row in rows], device="cpu")
        columns = zip(*((row.costs, row.losses, *row.hull) for row in distinct), strict=True)
        fills = (0, 0.0, 0, -math.inf)
        return cls(*(pad_sequence(list(own), True, fill)[at] for own, fill in zip(columns, fills, strict=True)))


def _built(menu: _Menu, picks: Tensor | None, sizes: tuple[int, ...], index: int, loss: float) -> Option:
    return menu.option(menu.pick(index) if picks is None else picks[index].tolist(), sizes, loss)


def _changed(near: Option, member: int, candidates: Sequence[Candidate], index: int, loss: float) -> Option:
    return near.changed(member, candidates[index], loss)


def _all_sums(rows: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sums of one item from each row, [product of lengths], in the order of `itertools.product`."""
    return reduce(lambda total, row: (total[:, None] + row).flatten(), rows, torch.zeros(1, dtype=dtype, device="cpu"))


def _efficient(costs: Tensor, losses: Tensor) -> Tensor:
    """The indices of the Pareto-optimal choices, ascending in cost.

    Choices with the same loss are all kept, so that the rest of a budget can go to the more expensive one.
    """
    order = torch.argsort(losses, stable=True)
    order = order[torch.argsort(costs[order], stable=True)]
    ordered = losses[order]
    least = torch.cat([ordered.new_full((1,), math.inf), ordered.cummin(0).values[:-1]])
    return order[ordered <= least]
