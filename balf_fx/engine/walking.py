"""Runs a graph block by block: one block for all calls, then the next.

What crosses a cut is kept for all calls, in temporary files beyond a limit. All that is alive besides are the values of
one call in one block, and all that is read are the weights of one block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from balf_fx.graph.blocks import Block
from balf_fx.refit.offload import Shelved

Values = dict[fx.Node, Any]
"""The values of one call by node."""


def walk(
    graph_module: fx.GraphModule,
    blocks: Sequence[Block],
    calls: Iterable[Mapping[str, Any]],
    memory: int,
    finish: Callable[[Block], None],
    around: Callable[[int], AbstractContextManager[Any]],
) -> Shelved:
    """Run all calls through one block after another, without gradients.

    Args:
        blocks: those of the graph (`graph.blocks.find_blocks`).
        calls: the values of the graph's placeholders by name, for each call; read once.
        memory: bytes of values that may stay in memory between blocks.
        finish: called after each block.
        around: the context in which the call of an index runs.

    Returns:
        The graph's output for each call.
    """
    interpreter = fx.Interpreter(graph_module)
    sources = [_sources(blocks, index) for index in range(len(blocks))]
    shelves: dict[int, Shelved] = {}
    for index, block in enumerate(blocks):
        shelf = Shelved(max(memory - sum(each.nbytes for each in shelves.values()), 0))
        given = _given(block, calls) if index == 0 else _handed(block, [shelves[place] for place in sources[index]])
        with torch.no_grad():
            for call, values in enumerate(given):
                with around(call):
                    _run(interpreter, block, values)
                written = {node: values[node] for node in block.writes}
                shelf.append(written if index < len(blocks) - 1 else written.popitem()[1])
        shelves[index] = shelf
        needed = {place for later in sources[index + 1 :] for place in later}
        for place in [place for place in shelves if place not in needed and place < len(blocks) - 1]:
            shelves.pop(place).close()
        finish(block)
    return shelves[len(blocks) - 1]


def _sources(blocks: Sequence[Block], index: int) -> list[int]:
    """The blocks whose values a block reads, and the one before it, which has as many calls."""
    reads = set(blocks[index].reads)
    return [place for place in range(index) if place == index - 1 or not reads.isdisjoint(blocks[place].writes)]


def _given(block: Block, calls: Iterable[Mapping[str, Any]]) -> Iterator[Values]:
    """The values of the placeholders in each call; all are in the first block."""
    placeholders = [node for node in block.nodes if node.op == "placeholder"]
    for call in calls:
        yield {node: call[str(node.target)] for node in placeholders}


def _handed(block: Block, shelves: Sequence[Shelved]) -> Iterator[Values]:
    """The values of earlier blocks that a block reads, for each call."""
    for index in range(len(shelves[0])):
        handed = [item for shelf in shelves for item in shelf[index].items()]
        yield {node: value for node, value in handed if node in block.reads}


def _run(interpreter: fx.Interpreter, block: Block, values: Values) -> None:
    """Compute what a block writes; other values are freed with their last reader."""
    nodes = [node for node in (*block.constants, *block.nodes) if node not in values]
    kept, last = set(block.writes), dict[fx.Node, fx.Node]()
    for node in nodes:
        last |= dict.fromkeys((node, *node.all_input_nodes), node)
    freed: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for source, node in last.items():
        if source not in kept:
            freed[node].append(source)
    for node in nodes:
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
        for source in freed[node]:
            del values[source]
