"""The modules that compute a low-rank map with some of its own rows or columns, and their calls."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from balf_fx.graph.curves import PartRanks, Solution
from balf_fx.graph.layers import site_input
from balf_fx.graph.site import Site

ORDER = "order"
"""The name of the buffer that holds the indices of a gather."""


ROWS = "rows"
"""The name of the buffer that holds the indices of a gather of the outputs, where there is one of the inputs, too."""


@dataclass(frozen=True)
class Rows:
    """p = first(x), and each part's output is [p, second(p)] in the order of its rows.

    Attributes:
        module: an nn.ModuleList of `first`, and of the second layer or an nn.ModuleList of those of the parts. Where
            a gather brings the outputs into the layer's order, its buffer `order` [G * O] holds the indices.
        first: the layer from D inputs to the pivots of all parts together.
        second: for each part the layer from its pivots to its other rows, or from D inputs if it is dense.
        ranks: the rank of each part; None if it is dense.
        axis: the axis of the features, counted from the end.
    """

    module: nn.Module
    first: nn.Module
    second: tuple[nn.Module, ...]
    ranks: PartRanks
    axis: int

    @property
    def biased(self) -> tuple[bool, ...]:
        """Whether each part has a bias."""
        return tuple(layer.bias is not None for layer in self.second)

    def insert_calls(self, graph: fx.Graph, path: str, node: fx.Node) -> fx.Node:
        """Insert calls of the modules at the graph's insertion point; returns the node of the layer's output."""
        source = site_input(node)
        pivots = graph.call_module(f"{path}.0", (source,))
        values: list[fx.Node] = []
        if len(self.second) == 1:
            values = [pivots, graph.call_module(f"{path}.1", (pivots,))]
        else:
            sizes = [rank for rank in self.ranks if rank is not None]
            split = graph.call_function(torch.split, (pivots, sizes, self.axis))
            pieces = iter([graph.call_function(operator.getitem, (split, i)) for i in range(len(sizes))])
            for index, rank in enumerate(self.ranks):
                own = source if rank is None else next(pieces)
                values += [] if rank is None else [own]
                values.append(graph.call_module(f"{path}.1.{index}", (own,)))
        output = graph.call_function(torch.cat, (values, self.axis))
        if not hasattr(self.module, ORDER):
            return output
        indices = graph.get_attr(f"{path}.{ORDER}")
        return graph.call_function(torch.index_select, (output, self.axis, indices))


@dataclass(frozen=True)
class Columns:
    """y = second(x_P + first(x_rest)).

    Pointwise convolutions are computed as products, with the features last: a convolution would copy x_rest.

    Attributes:
        module: an nn.ModuleList of `first` (D - r -> r) and `second` (r -> O). Where a gather brings the inputs into
            the order [P, rest], its buffer `order` [D] holds the indices.
        rank, others: r and D - r.
        axis: the axis of the features, counted from the end.
    """

    module: nn.Module
    first: nn.Linear
    second: nn.Linear
    rank: int
    others: int
    axis: int

    @property
    def biased(self) -> tuple[bool, ...]:
        """Whether it has a bias."""
        return (self.second.bias is not None,)

    def insert_calls(self, graph: fx.Graph, path: str, node: fx.Node) -> fx.Node:
        """Insert calls of the modules at the graph's insertion point; returns the node of the layer's output."""
        source = site_input(node)
        if self.axis != -1:
            source = graph.call_function(torch.movedim, (source, self.axis, -1))
        if hasattr(self.module, ORDER):
            indices = graph.get_attr(f"{path}.{ORDER}")
            source = graph.call_function(torch.index_select, (source, -1, indices))
        split = graph.call_function(torch.split, (source, [self.rank, self.others], -1))
        pivots, rest = (graph.call_function(operator.getitem, (split, i)) for i in range(2))
        thin = _insert_sum(graph, graph.call_module(f"{path}.0", (rest,)), pivots)
        output = graph.call_module(f"{path}.1", (thin,))
        return output if self.axis == -1 else graph.call_function(torch.movedim, (output, -1, self.axis))


@dataclass(frozen=True)
class Blocks:
    """Heads y = x_P + layer(x_rest), with the same features P of the input for each head of a set.

    Attributes:
        module: an nn.ModuleList of the layer of all other outputs, if there are any, and of one layer for each set of
            heads. Where a gather brings the inputs into the order [P, rest], its buffer `order` [D] holds the indices;
            where one brings the outputs into the layer's order, its buffer `rows` [O] does.
        biased: whether the layer has a bias.
        heads: the number of heads and r for each set.
        features: D.
        rest: whether there are other outputs.
    """

    module: nn.ModuleList
    biased: tuple[bool, ...]
    heads: tuple[tuple[int, int], ...]
    features: int
    rest: bool

    def insert_calls(self, graph: fx.Graph, path: str, node: fx.Node) -> fx.Node:
        """Insert calls of the modules at the graph's insertion point; returns the node of the layer's output."""
        source = site_input(node)
        values = [graph.call_module(f"{path}.0", (source,))] if self.rest else []
        ordered = source
        if hasattr(self.module, ORDER):
            ordered = graph.call_function(torch.index_select, (source, -1, graph.get_attr(f"{path}.{ORDER}")))
        pieces: dict[int, tuple[fx.Node, fx.Node]] = {}
        for index, (count, size) in enumerate(self.heads, start=len(values)):
            if size not in pieces:
                split = graph.call_function(torch.split, (ordered, [size, self.features - size], -1))
                first, others = (graph.call_function(operator.getitem, (split, i)) for i in range(2))
                pieces[size] = first, others
            pivots, others = pieces[size]
            tiled = graph.call_function(torch.tile, (pivots, (count,))) if count > 1 else pivots
            values.append(_insert_sum(graph, graph.call_module(f"{path}.{index}", (others,)), tiled))
        output = values[0] if len(values) == 1 else graph.call_function(torch.cat, (values, -1))
        if not hasattr(self.module, ROWS):
            return output
        return graph.call_function(torch.index_select, (output, -1, graph.get_attr(f"{path}.{ROWS}")))


def _insert_sum(graph: fx.Graph, product: fx.Node, pivots: fx.Node) -> fx.Node:
    """Insert the sum of a layer's outputs and of pivots, which are a part of a value.

    It is written as a difference. Quantizers fuse a sum with the layer, and oneDNN has no kernel for that in int8 where
    the other value is a part: its reference code takes hundreds of times as long as the layer.
    """
    return graph.call_function(torch.sub, (product, pivots), {"alpha": -1})


def feature_axis(site: Site) -> int:
    """The axis of a site's features, counted from the end."""
    return -1 if site.conv is None else -1 - len(site.conv.kernel_size)


def gather_rows(solution: Sequence[Solution], groups: int) -> Tensor | None:
    """The places of a layer's outputs [G * O] among the values that `Rows` concatenates; None if these are in order."""
    if all(part.order is None for part in solution):
        return None
    places, start = [], 0
    for part in solution:
        outputs = part.right.shape[1] if part.left is None else sum(part.left.shape[1:])
        identity = torch.arange(outputs, device="cpu").expand(groups, -1)
        order = identity if part.order is None or part.left is None else part.order.cpu()
        place = torch.argsort(order, dim=1)
        rank = outputs if part.left is None else part.left.shape[-1]
        group = torch.arange(groups, device="cpu").unsqueeze(-1)
        pivots, others = group * rank + place, groups * rank + group * (outputs - rank) + place - rank
        places.append(start + torch.where(place < rank, pivots, others).flatten())
        start += groups * outputs
    return torch.cat(places)


def holder(layers: Sequence[nn.Module], order: Tensor | None, device: torch.device) -> nn.ModuleList:
    """A list of layers, with the indices of a gather if there is one."""
    module = nn.ModuleList(layers)
    if order is not None:
        module.register_buffer(ORDER, order.to(device))
    return module
