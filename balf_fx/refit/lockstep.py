"""Runs the original and the compressed model side by side: each node for all batches before the next node.

Where the two models do not differ, they share one value. A value is freed when its last reader has run. A walk
therefore takes about as long as two forward passes, and only the values of one layer are alive for all batches. Beyond
a limit in bytes these values are kept in files and mapped into memory one batch at a time (`refit.offload`).
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from balf_fx.calibration.batches import MEMORY, sample_count
from balf_fx.calibration.weights import Weights
from balf_fx.distributed.group import ALONE, Group
from balf_fx.distributed.shares import others_in_turn
from balf_fx.graph.experts import leads_to_experts
from balf_fx.graph.masks import mask_names
from balf_fx.graph.operators import changes_in_place, operation
from balf_fx.graph.parameters import is_quantized
from balf_fx.graph.routers import PLACES_ONLY, chooses
from balf_fx.refit.offload import Shelf, resident

_T = TypeVar("_T")


class Batch:
    """The values of one batch that are alive, by node.

    Attributes:
        index: the index of the batch.
        original: values of the original model.
        compressed: values of the compressed model, where these differ.
    """

    def __init__(self, index: int, shelf: Shelf, late: Callable[[fx.Node, Batch], Any]) -> None:
        self.index = index
        self.original: dict[fx.Node, Any] = {}
        self.compressed: dict[fx.Node, Any] = {}
        self._shelf = shelf
        self._late = late
        self._found: dict[Hashable, Any] = {}

    def before(self, node: fx.Node) -> Any:
        """The original model's value; of a layer that no node reads, computed the first time in a turn."""
        if node not in self.original:
            self.original[node] = self._late(node, self)
        return self.original[node]

    def current(self, node: fx.Node) -> Any:
        """The compressed model's value."""
        return self.compressed[node] if node in self.compressed else self.before(node)

    def once(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        """What a function of the batch's values returns, computed the first time in a turn."""
        if key not in self._found:
            self._found[key] = compute()
        found: _T = self._found[key]
        return found

    def free(self, nodes: Iterable[fx.Node]) -> None:
        """Free the values of some nodes."""
        for node in nodes:
            self.original.pop(node, None)
            self.compressed.pop(node, None)

    def load(self) -> None:
        """Load the values into memory."""
        if self._shelf.used:
            self.original, self.compressed = self._shelf.load((self.original, self.compressed))

    def leave(self, room: int) -> int:
        """Move the values to files if they were there before or exceed `room`; returns the bytes left in memory."""
        self._found.clear()
        nbytes = self._shelf.nbytes((self.original, self.compressed))
        if not self._shelf.used and nbytes <= room:
            return nbytes
        self.original, self.compressed = self._shelf.park((self.original, self.compressed))
        return 0


class Lockstep:
    """Runs the nodes of a graph, in all processes of a group at once.

    Args:
        inputs: the values of the graph's placeholders by name, for each batch; an item is read once for its size, and
            when one of its values is needed.
        handed: the values that the compressed model has in place of some of `inputs`, for each batch; empty if there
            are none.
        memory: bytes of values that may be in memory, apart from those of the batch that is being run.
        weights: {name of a mask: the weights of values with its positions} for each batch; empty if all count.
        group: the processes that walk together, each over its own batches.
        turns: the turn of each batch (`distributed.shares.starts_in_turn`); by default, one after the other.

    Attributes:
        inputs, handed, group: as above.
        runs, samples: the number of batches and of samples in all processes.
        others: for each batch, the samples in the batches of other processes that have their turn just before it.
        moved: the nodes whose values differ between the models.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        inputs: Sequence[Mapping[str, Any]],
        handed: Sequence[Mapping[str, Any]] = (),
        memory: int = MEMORY,
        weights: Sequence[Mapping[str, Weights]] = (),
        group: Group = ALONE,
        turns: Sequence[int] = (),
    ) -> None:
        self.graph_module = graph_module
        self.moved: set[fx.Node] = set()
        self.inputs = inputs
        self.handed = handed
        self._unread: fx.Node | None = None
        self._memory = memory
        self._weights = weights
        self._mask_names = mask_names(graph_module) if len(weights) else {}
        self._interpreter = fx.Interpreter(graph_module)
        self._batches: list[Batch] = []
        self._nbytes: list[int] = []
        self.group = group
        self._counts = [sample_count(values) for values in inputs]
        own = list(turns) or list(range(len(inputs)))
        found = group.gathered((self._counts, own, {name for values in handed for name in values}))
        counts = [each for each, _, _ in found]
        self.runs, self.samples = sum(map(len, counts)), sum(map(sum, counts))
        self.others = others_in_turn(counts, [each for _, each, _ in found], group.rank)
        self._handed_names = {name for _, _, names in found for name in names}

    def is_handed(self, node: fx.Node) -> bool:
        """Whether a node is a placeholder whose value differs in the compressed model."""
        return node.op == "placeholder" and node.target in self._handed_names

    def samples_like(self, batch: Batch, count: int) -> int:
        """The samples of a value in all batches and processes, if a batch has so many."""
        own = self._counts[batch.index]
        return round(self.samples * count / own) if own else self.runs * count

    def rows_of_others(self, batch: Batch, count: int) -> list[int]:
        """For each of the `others` of a batch, the samples of a value of which this batch has so many."""
        own = self._counts[batch.index]
        return [round(other * count / own) if own else count for other in self.others[batch.index]]

    def weights(self, node: fx.Node, batch: Batch) -> Weights | None:
        """The weights of the positions of a node's value; None if all count."""
        name = self._mask_names.get(node)
        return None if name is None else self._weights[batch.index].get(name)

    def run(
        self,
        nodes: Sequence[fx.Node],
        layers: Set[fx.Node],
        replace: Callable[[fx.Node], None],
        track: Callable[[Sequence[fx.Node]], Iterable[fx.Node]] = iter,
    ) -> None:
        """Run the nodes in their order.

        Args:
            nodes: without those that only select matrices of experts, which are large: the products compute them.
            layers: the nodes that the compressed model may replace.
            replace: called with each of the layers once the original model has run it for all batches; it stores the
                compressed model's values, unless they are the same or no node reads them.
            track: yields the nodes one by one, and may show the progress.
        """
        last_reads = _last_reads(nodes)
        with tempfile.TemporaryDirectory(prefix="balf_fx-") as folder:
            pinned = self._pinned()
            count = len(self.inputs)
            self._batches = [Batch(index, Shelf(Path(folder), pinned), self._late) for index in range(count)]
            self._nbytes = [0] * count
            for node in track(nodes):
                self._separate(node)
                moves = node not in layers and not self.moved.isdisjoint(sources_of(node))
                moves = moves or self.is_handed(node)
                unread = node in layers and node in last_reads[node]
                for batch in () if unread else self.batches():
                    batch.original[node] = self._original(node, batch)
                    if moves:
                        batch.compressed[node] = self.compressed(node, batch)
                    if node not in layers:  # at once, so that the next batch's values can reuse the memory
                        batch.free(last_reads[node])
                if moves:
                    self.moved.add(node)
                if node in layers:
                    self._unread = node if unread else None
                    replace(node)
                    self._unread = None
                    for batch in self._batches:
                        batch.free(last_reads[node])

    def batches(self) -> Iterator[Batch]:
        """Yield one batch after the other; the caller may keep no value of a batch beyond its turn.

        A layer that no node reads, such as the head of a language model, is only run at a turn that asks for its value,
        which is not kept.
        """
        total = sum(self._nbytes)
        for index, batch in enumerate(self._batches):
            batch.load()
            yield batch
            if self._unread is not None:
                batch.original.pop(self._unread, None)
            total -= self._nbytes[index]
            self._nbytes[index] = batch.leave(self._memory - total)
            total += self._nbytes[index]

    def store(self, node: fx.Node, value: Callable[[Batch], Any]) -> None:
        """Store a node's value for the compressed model."""
        for batch in self.batches():
            batch.compressed[node] = value(batch)
        self.moved.add(node)

    def finish(self, node: fx.Node, value: Callable[[Batch], Any]) -> None:
        """Store the final value of a layer for the compressed model, unless no node reads it."""
        if node is not self._unread:
            self.store(node, value)

    def _pinned(self) -> set[int]:
        """The storages that stay in memory in any case: those of the caller and of the model."""
        tensors = [*resident(self.inputs), *resident(self.handed)]
        tensors += [*self.graph_module.parameters(), *self.graph_module.buffers()]
        plain = [tensor for tensor in tensors if tensor.layout is torch.strided and not is_quantized(tensor)]
        return {tensor.untyped_storage().data_ptr() for tensor in plain}

    def _separate(self, node: fx.Node) -> None:
        """Copy values so that a node of one model does not change the other's values in place."""
        if not self.moved.isdisjoint(sources_of(node)) and changes_in_place(self.graph_module, node):
            for source in node.all_input_nodes:
                if source not in self.moved:
                    self.store(source, partial(_cloned, source))

    def _late(self, node: fx.Node, batch: Batch) -> Any:
        if node is not self._unread:
            raise KeyError(node)
        return self._original(node, batch)

    def _original(self, node: fx.Node, batch: Batch) -> Any:
        """The value of a node in the original model."""
        if node.op == "placeholder":
            return self.inputs[batch.index][str(node.target)]
        return self._call(node, batch.before)

    def compressed(self, node: fx.Node, batch: Batch) -> Any:
        """The value of a node in the compressed model, or the one handed to it in its place."""
        if node.op == "placeholder":
            values, name = self.handed[batch.index], str(node.target)
            return values[name] if name in values else _cloned(node, batch)
        if chooses(node):
            return _same_choice(node, batch.original[node], batch.current)
        return self._call(node, batch.current)

    def _call(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        def value(source: fx.Node) -> Any:
            return self._call(source, value_of) if leads_to_experts(source) else value_of(source)

        args, kwargs = map_arg((node.args, node.kwargs), value)
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)


def _same_choice(node: fx.Node, original: Any, value_of: Callable[[fx.Node], Any]) -> Any:
    """A node's value in the compressed model, if it chooses as in the original.

    Then what follows can be compared: an expert gets the same rows in both models.
    """
    if operation(node) in PLACES_ONLY:
        return original.clone()
    values, places = original
    position = 2 if operation(node) == "topk" else 1
    dim = node.kwargs.get("dim", node.args[position] if len(node.args) > position else -1)
    source = value_of(node.all_input_nodes[0])
    chosen = source.gather(dim if isinstance(dim, int) else -1, places) if source.dim() else values
    return type(original)((chosen, places.clone()))


def _cloned(node: fx.Node, batch: Batch) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, batch.original[node])


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a node reads, itself or through nodes that select matrices of experts."""
    sources = (sources_of(each) if leads_to_experts(each) else [each] for each in node.all_input_nodes)
    return list(dict.fromkeys(source for found in sources for source in found))


def without_ends(
    graph_module: fx.GraphModule, nodes: Sequence[fx.Node], layers: Set[fx.Node], ends: Set[fx.Node]
) -> list[fx.Node]:
    """The nodes without those that only make what a graph returns of one value, such as the class of an output.

    No layer is solved for what they compute, which may be large: the logits of a language model.

    Args:
        nodes: in their order.
        ends: nodes behind them that read values, and compute none.
    """
    found = set(ends)
    for node in reversed(nodes):
        plain = node.op in ("call_function", "call_method") and node not in layers and not node.is_impure()
        unary = plain and len(set(node.all_input_nodes)) == 1 and not changes_in_place(graph_module, node)
        if unary and found.issuperset(node.users):
            found.add(node)
    return [node for node in nodes if node not in found]


def _last_reads(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the nodes whose values it is the last to read."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last[node] = node
        for source in sources_of(node):
            last[source] = node
    found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for source, node in last.items():
        found[node].append(source)
    return found
