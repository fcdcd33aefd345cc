"""The original and the compressed model side by side: every node is run for all batches before the next one is.

Where the two do not differ there is one value for both. A value is freed when its last reader has run, so that a walk
costs about two forward passes, and what is alive at once is what one layer of each batch is. Beyond a number of bytes
these values wait in files: the files of one batch at a time are mapped into memory.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from balf_fx.linear_maps import changes_in_place

MEMORY = 2 << 30
"""Bytes of intermediate values that are kept in memory unless the user says otherwise."""


class Batch:
    """The values of one batch that are alive, by node.

    Attributes:
        original: of the original model.
        compressed: of the compressed model, where these differ.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = inputs
        self.original: dict[fx.Node, Any] = {}
        self.compressed: dict[fx.Node, Any] = {}

    def before(self, node: fx.Node) -> Any:
        """The original model's value."""
        return self.original[node]

    def current(self, node: fx.Node) -> Any:
        """The compressed model's value."""
        return self.compressed[node] if node in self.compressed else self.original[node]


class Lockstep:
    """Runs the nodes of a graph.

    Args:
        inputs: of each batch, the values of the graph's placeholders by name.
        memory: bytes of values that may be in memory, apart from those of the batch that is being run.

    Attributes:
        moved: the nodes whose values differ between the models.
    """

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Mapping[str, Any]], memory: int = MEMORY) -> None:
        self.graph_module = graph_module
        self.memory = memory
        self.moved: set[fx.Node] = set()
        self._batches = [Batch(values) for values in inputs]
        self._interpreter = fx.Interpreter(graph_module)
        self._folder = Path()
        tensors = [leaf for leaf in pytree.tree_leaves(list(map(dict, inputs))) if isinstance(leaf, Tensor)]
        tensors += [*graph_module.parameters(), *graph_module.buffers()]
        self._pinned = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.layout is torch.strided}

    def run(self, nodes: Sequence[fx.Node], replace: Callable[[fx.Node], bool]) -> None:
        """Run the nodes in their order.

        Args:
            replace: called with each node when the original model has run it, for all batches; True where it has
                stored the compressed model's values itself, or left them as they are.
        """
        last_reads = _last_reads(nodes)
        with tempfile.TemporaryDirectory(prefix="balf_fx-") as folder:
            self._folder = Path(folder)
            for node in nodes:
                self._run_original(node)
                if not replace(node) and not self.moved.isdisjoint(node.all_input_nodes):
                    self.store(node, partial(self._value, node, Batch.current))
                for batch in self._batches:
                    for source in last_reads[node]:
                        batch.original.pop(source, None)
                        batch.compressed.pop(source, None)

    def batches(self) -> Iterator[Batch]:
        """One batch after the other; nothing of a batch may be kept when the next one comes."""
        yield from self._batches

    def store(self, node: fx.Node, value: Callable[[Batch], Any]) -> None:
        """Give the compressed model a value of its own."""
        for batch in self.batches():
            batch.compressed[node] = value(batch)
        self.moved.add(node)

    def _run_original(self, node: fx.Node) -> None:
        if not self.moved.isdisjoint(node.all_input_nodes) and changes_in_place(self.graph_module, node):
            for source in set(node.all_input_nodes) - self.moved:  # or one model would change the other's values
                self.store(source, partial(_cloned, source))
        for batch in self.batches():
            placeholder = node.op == "placeholder"
            batch.original[node] = (
                batch.inputs[str(node.target)] if placeholder else self._value(node, Batch.before, batch)
            )

    def _value(self, node: fx.Node, value_of: Callable[[Batch, fx.Node], Any], batch: Batch) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), partial(value_of, batch))
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)


def _cloned(node: fx.Node, batch: Batch) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, batch.original[node])


def _last_reads(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The nodes whose values nobody reads after a node, by that node."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for source, node in last.items():
        found[node].append(source)
    return found
