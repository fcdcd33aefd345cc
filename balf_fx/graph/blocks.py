"""Cuts a graph into blocks: runs of nodes between positions at which few bytes are alive.

A value is alive at a cut if a node before it computes the value and a node behind it reads it. What depends on the
model's own tensors alone is not alive there: each block computes it again. So a chain or a residual network is cut
between its layers, and a U-Net where few skip connections are open.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import fx, nn

from balf_fx.graph.annotation import annotation
from balf_fx.graph.parameters import constant_nodes, get_tensor


@dataclass(frozen=True)
class Block:
    """Nodes that run one after another.

    Attributes:
        nodes: in their order, without those that depend on the model's own tensors alone.
        constants: the nodes of this kind that the block reads, in their order.
        reads: the nodes of earlier blocks whose values it reads.
        writes: its nodes whose values later blocks read; in the last block, the graph's output.
    """

    nodes: tuple[fx.Node, ...]
    constants: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]


def find_blocks(
    graph_module: fx.GraphModule, sizes: Mapping[fx.Node, int], bound: int, bonds: Set[fx.Node] = frozenset()
) -> list[Block]:
    """Cut an annotated graph into blocks of limited size.

    Args:
        sizes: the bytes that each node takes for itself, such as its weights; 0 where it is missing.
        bound: the bytes that all nodes of a block may take. A node that takes more is a block of its own.
        bonds: the nodes that stay in the block of the node before them.

    Returns:
        The blocks in their order, with the fewest bytes alive at all cuts together.
    """
    fixed = constant_nodes(graph_module)
    nodes = [node for node in graph_module.graph.nodes if node not in fixed]
    nodes.sort(key=lambda node: node.op != "placeholder")  # the first block has all of them
    starts = [place for place, node in enumerate(nodes) if not place or node not in bonds]
    ends = [*starts[1:], len(nodes)]
    alive = alive_bytes(graph_module, nodes)
    units = [nodes[start:stop] for start, stop in zip(starts, ends, strict=True)]
    own = [sum(sizes.get(node, 0) for node in unit) for unit in units]
    positions = cut_positions([alive[place] for place in (*starts, len(nodes))], own, bound)
    edges = [0, *(starts[position] for position in positions), len(nodes)]
    return _blocks([nodes[start:stop] for start, stop in itertools.pairwise(edges)], fixed)


def cut_positions(alive: Sequence[int], sizes: Sequence[int], bound: int) -> list[int]:
    """Choose cuts so that the nodes between two of them are of limited size, and the bytes alive at all cuts fewest.

    Args:
        alive: [n + 1], the bytes alive before each node, and behind the last.
        sizes: [n], the size of each node, at least 0.
        bound: the largest size between two cuts; a larger node stands alone between two cuts.

    Returns:
        The positions of the cuts, ascending, in 1 .. n - 1: one at p is before node p.
    """
    totals = [0, *itertools.accumulate(sizes)]
    least, before = [0], [0]  # up to each position: the fewest bytes, and the cut before it
    window: deque[int] = deque([0])  # positions in reach of the next one, with ascending `least`
    start = 0
    for position in range(1, len(totals)):
        while start < position - 1 and totals[position] - totals[start] > bound:
            start += 1
        while window[0] < start:
            window.popleft()
        best = window[0]
        least.append(least[best] + (alive[position] if position < len(sizes) else 0))
        before.append(best)
        while window and least[window[-1]] > least[position]:
            window.pop()
        window.append(position)
    cuts, position = [], before[-1]
    while position > 0:
        cuts.append(position)
        position = before[position]
    return cuts[::-1]


def alive_bytes(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[int]:
    """[n + 1], the bytes of values of `nodes` that are alive before each of them on the example batch, and at the end.

    The elements of all values count as large as those of the model's largest parameter.
    """
    element = max((parameter.element_size() for parameter in graph_module.parameters()), default=4)
    places = {node: place for place, node in enumerate(nodes)}
    changes = [0] * (len(nodes) + 2)
    for node, place in places.items():
        last = max((places[user] for user in node.users if user in places), default=place)
        nbytes = element * _elements(node)
        changes[place + 1] += nbytes
        changes[last + 1] -= nbytes
    return list(itertools.accumulate(changes[:-1]))


def _elements(node: fx.Node) -> int:
    """The number of elements of a node's value on the example batch; of a tuple, those of the items that are read."""
    shape = annotation(node).shape
    if shape is not None:
        return math.prod(shape)
    return sum(math.prod(annotation(user).shape or (0,)) for user in node.users)


def weight_bytes(graph_module: fx.GraphModule) -> dict[fx.Node, int]:
    """The bytes of the model's own tensors that each node reads, itself or through nodes that compute constants."""
    fixed = constant_nodes(graph_module)
    own: dict[fx.Node, dict[int, int]] = {}
    found: dict[fx.Node, int] = {}
    for node in graph_module.graph.nodes:
        held = dict(itertools.chain.from_iterable(own[each].items() for each in node.all_input_nodes if each in own))
        held |= {id(each): each.numel() * each.element_size() for each in _tensors(graph_module, node)}
        if node in fixed:
            own[node] = held
        elif held:
            found[node] = sum(held.values())
    return found


def _tensors(graph_module: fx.GraphModule, node: fx.Node) -> list[torch.Tensor]:
    if node.op == "call_module":
        module: nn.Module = graph_module.get_submodule(str(node.target))
        return [*module.parameters(), *module.buffers()]
    value = get_tensor(graph_module, str(node.target)) if node.op == "get_attr" else None
    return [value] if isinstance(value, torch.Tensor) else []


def _blocks(parts: Sequence[Sequence[fx.Node]], fixed: set[fx.Node]) -> list[Block]:
    """The blocks of these nodes."""
    home = {node: index for index, nodes in enumerate(parts) for node in nodes}
    found = []
    for index, nodes in enumerate(parts):
        constants = _constants(nodes, fixed)
        sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes)
        reads = tuple(source for source in sources if source in home and home[source] < index)
        last = index == len(parts) - 1
        writes = tuple(
            node
            for node in nodes
            if (last and node.op == "output") or any(home.get(user, 0) > index for user in node.users)
        )
        found.append(Block(tuple(nodes), constants, reads, writes))
    return found


def _constants(nodes: Sequence[fx.Node], fixed: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The constant nodes that some nodes read, and those from which these are computed, sources first."""
    found: dict[fx.Node, None] = {}
    pending = [source for node in nodes for source in node.all_input_nodes if source in fixed]
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending += node.all_input_nodes
    return tuple(sorted(found))
