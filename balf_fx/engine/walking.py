"""Runs a graph block by block, all calls through one block before the next; and backward, for gradients.

Only what crosses a cut is kept for all calls, in temporary files beyond a limit. Beside it, memory holds the values of
one call in one block, and the weights of that block. The backward pass computes each block again from what it reads,
and differentiates it (gradient checkpointing, Chen et al. 2016, arXiv 1604.06174, for all calls at once).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from balf_fx.calibration.gradients import Wanted, take_gradients
from balf_fx.graph.blocks import Block
from balf_fx.graph.parameters import get_tensor, is_quantized
from balf_fx.refit.offload import Shelved

Values = dict[fx.Node, Any]
"""The values of one call by node."""


def walk(
    graph_module: fx.GraphModule,
    blocks: Sequence[Block],
    calls: Iterable[Mapping[str, Any]],
    memory: int,
    finish: Callable[[int], None],
    around: Callable[[int], AbstractContextManager[Any]],
    kept: dict[int, Shelved] | None = None,
) -> Iterator[Any]:
    """Run all calls through one block after another, without gradients, and yield the graph's output for each.

    Each output is computed when it is asked for, in the last block: those of all calls, as of a language model, are
    never held at once.

    Args:
        blocks: those of the graph (`graph.blocks.find_blocks`).
        calls: the values of the graph's placeholders by name, for each call; read once.
        memory: bytes of values that may stay in memory between blocks.
        finish: called with the index of each block after it.
        around: the context in which the call of an index runs.
        kept: where to keep, for the backward pass, what each block but the last has written in each call, by node, and
            the values of the placeholders, at -1.
    """
    interpreter, last = fx.Interpreter(graph_module), len(blocks) - 1
    sources, keep = _sources(blocks), kept is not None
    shelves: dict[int, Shelved] = {} if kept is None else kept
    if keep:
        shelves[-1] = Shelved(memory)
    for index, block in enumerate(blocks):
        given = _handed(block, [shelves[place] for place in sources[index]]) if index else _given(block, calls)
        given = _recorded(given, shelves[-1]) if keep and not index else given
        written = _written(interpreter, block, given, around)
        if index == last:
            yield from (value for values in written for value in values.values())
        else:
            shelf = _shelf(memory, shelves.values())
            for values in written:
                shelf.append(values)
            shelves[index] = shelf
        if not keep:
            _close(shelves, set[int]().union(*sources[index + 1 :]))
        finish(index)


def _recorded(given: Iterable[Values], shelf: Shelved) -> Iterator[Values]:
    """The values that calls are given, which are kept, too."""
    for values in given:
        shelf.append(dict(values))
        yield values


def _written(
    interpreter: fx.Interpreter,
    block: Block,
    given: Iterable[Values],
    around: Callable[[int], AbstractContextManager[Any]],
) -> Iterator[Values]:
    """What a block writes in each call."""
    for call, values in enumerate(given):
        with torch.no_grad(), around(call):
            _run(interpreter, block, values)
        yield {node: values[node] for node in block.writes}


def walk_backward(
    graph_module: fx.GraphModule,
    blocks: Sequence[Block],
    shelves: dict[int, Shelved],
    memory: int,
    finish: Callable[[int], None],
    around: Callable[[Block, int], AbstractContextManager[Callable[[], Iterable[Wanted]]]],
    loss: Callable[[int, Any], Tensor],
) -> None:
    """Run all calls backward through the blocks, from the last to the first, with gradients.

    Args:
        shelves: what `walk` has kept; each is closed once it has been read.
        memory: as in `walk`, for what was kept and the gradients at it.
        around: the context in which a block runs for the call of an index. It gives a function that returns the tensors
            in the block whose gradients are wanted, once it has run.
        loss: `loss(call, output)` returns the scalar to differentiate.
    """
    interpreter, last = fx.Interpreter(graph_module), len(blocks) - 1
    sources, trained = [[-1], *_sources(blocks)[1:]], _trained(graph_module)
    gradients: dict[int, Shelved] = {}  # for each block, the gradients at what it reads
    for index in reversed(range(len(blocks))):
        block = blocks[index]
        found = _shelf(memory, (*shelves.values(), *gradients.values()))
        for call, handed in enumerate(_handed(block, [shelves[place] for place in sources[index]], every=not index)):
            values = {
                node: pytree.tree_map_only(Tensor, _leaf if node in trained else Tensor.detach, value)
                for node, value in handed.items()
            }
            read = {node: values[node] for node in block.reads}
            with around(block, call) as wanted, torch.enable_grad():
                _run(interpreter, block, values)
                written = {node: values[node] for node in block.writes}
                ends = list(_ends(written, [shelf[call] for shelf in gradients.values()]))
                if index == last:
                    ends = [(loss(call, written.popitem()[1]), None)]
                found.append(_differentiated(ends, wanted(), read))
        gradients[index] = found
        _close(shelves, set[int]().union(*sources[:index]))
        before = {node for earlier in blocks[:index] for node in earlier.nodes}
        _close(gradients, {place for place in gradients if not before.isdisjoint(blocks[place].reads)})
        finish(index)


def _shelf(memory: int, shelves: Iterable[Shelved]) -> Shelved:
    """A shelf for what others leave of the memory."""
    return Shelved(max(memory - sum(shelf.nbytes for shelf in shelves), 0))


def _close(shelves: dict[int, Shelved], needed: Set[int]) -> None:
    """Release the shelves that are not needed."""
    for place in shelves.keys() - needed:
        shelves.pop(place).close()


def _sources(blocks: Sequence[Block]) -> list[list[int]]:
    """For each block, those whose values it reads, and the one before it, which has as many calls."""
    return [
        [place for place in range(index) if place == index - 1 or not set(block.reads).isdisjoint(blocks[place].writes)]
        for index, block in enumerate(blocks)
    ]


def _given(block: Block, calls: Iterable[Mapping[str, Any]]) -> Iterator[Values]:
    """The values of the placeholders in each call; all are in the first block."""
    placeholders = [node for node in block.nodes if node.op == "placeholder"]
    for call in calls:
        yield {node: call[str(node.target)] for node in placeholders}


def _handed(block: Block, shelves: Sequence[Shelved], every: bool = False) -> Iterator[Values]:
    """The values on some shelves that a block reads, or all of them, for each call."""
    reads = set(block.reads)
    for index in range(len(shelves[0])):
        handed = [item for shelf in shelves for item in shelf[index].items()]
        yield {node: value for node, value in handed if every or node in reads}


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


def _trained(graph_module: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values depend on parameters that can have gradients."""
    found = set[fx.Node]()
    for node in graph_module.graph.nodes:
        own: list[Any] = []
        if node.op == "call_module":
            own = list(graph_module.get_submodule(str(node.target)).parameters())
        elif node.op == "get_attr":
            own = [get_tensor(graph_module, str(node.target))]
        taken = (isinstance(each, nn.Parameter) and each.is_floating_point() and not is_quantized(each) for each in own)
        if any(taken) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _leaf(tensor: Tensor) -> Tensor:
    """A leaf with the values of a tensor, which requires gradients where it can have some."""
    return tensor.detach().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


_Gradients = dict[fx.Node, dict[int, Tensor]]
"""The gradients at the tensors of a node's value, by their places among its leaves."""


def _ends(written: Values, gradients: Sequence[_Gradients]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The tensors that a block has written with the gradients at them: the sums over the blocks that read them."""
    for node, value in written.items():
        for place, leaf in enumerate(pytree.tree_leaves(value)):
            found = [own[node][place] for own in gradients if place in own.get(node, {})]
            if found and leaf.requires_grad:
                yield leaf, sum(found[1:], found[0])


def _differentiated(ends: Sequence[tuple[Tensor, Tensor | None]], wanted: Iterable[Wanted], read: Values) -> _Gradients:
    """Hand over the gradients that are wanted, and return those at what a block reads."""
    found: _Gradients = {node: {} for node in read}
    leaves = [
        (leaf, partial(found[node].__setitem__, place))
        for node, value in read.items()
        for place, leaf in enumerate(pytree.tree_leaves(value))
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    take_gradients(ends, [*wanted, *leaves])
    return found
