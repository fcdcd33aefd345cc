"""Makes a graph functional: no operation changes a value that another one may read.

In-place operations become out-of-place ones, and their results take the place of the values that they changed. A write
to a view changes its base, and with it all other views of the base. Which values share memory, and which operations
write to them, is seen when the graph runs once on the example, so that this holds for operations of every kind.

What a graph writes to its inputs and buffers is held back until the graph is finished (`graph.effects`).
"""

from __future__ import annotations

import logging
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from balf_fx.calibration.batches import MODEL_ERRORS, sample_count, some_samples
from balf_fx.capture.arguments import copied
from balf_fx.capture.outofplace import out_of_place, view_instead
from balf_fx.errors import CaptureError
from balf_fx.graph.annotation import annotate
from balf_fx.graph.effects import add_effect
from balf_fx.graph.operators import AUGMENTED, changes_in_place, has_inplace_flag, is_opaque_call, operation
from balf_fx.graph.views import view_steps, write_through

_FEW = 2  # samples; with one, more values would share memory
_LOGGER = logging.getLogger(__name__)
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logical_not")
"""Operations that return truth values, but keep the dtype of what they change."""

_PIECES = {"chunk": 2, "split": 2, "split_with_sizes": 2, "tensor_split": 2, "unbind": 1}
"""Functions that return a tuple of views, with the position of their argument `dim`."""


def make_functional(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Make a graph functional, in place.

    Args:
        inputs: an example, one for each placeholder; it is not changed.

    Raises:
        CaptureError: an operation has no functional form.
    """
    nodes = graph_module.graph.nodes
    if not any(changes_in_place(graph_module, node) or is_opaque_call(node) for node in nodes):
        return
    _Rewriter(graph_module, _watched(graph_module, inputs)).run()
    graph_module.graph.lint()
    graph_module.recompile()


def _watched(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> _Watch:
    """Run the graph on the example, or on two of its samples if these show as much."""
    if _writes_plainly(graph_module) and sample_count(inputs) > _FEW:
        try:
            return _run(graph_module, some_samples(tuple(inputs), 0, _FEW))
        except MODEL_ERRORS:
            _LOGGER.debug("the graph does not run on fewer samples than the example has", exc_info=True)
    return _run(graph_module, inputs)


def _writes_plainly(graph_module: fx.GraphModule) -> bool:
    """Whether all writes are element by element, to whole values: the number of samples then does not matter."""
    for node in graph_module.graph.nodes:
        plain = node.op == "call_module" or node.target in AUGMENTED or has_inplace_flag(node)
        if operation(node) in _PIECES or is_opaque_call(node):
            return False
        if changes_in_place(graph_module, node) and not plain:
            return False
    return True


def _run(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> _Watch:
    seen = _Watch(graph_module)
    with torch.no_grad():
        seen.run(*copied(tuple(inputs)))
    return seen


class _Alias(NamedTuple):
    """A value that shares the memory of `source`, one of the node's arguments; `same` if it is the same tensor."""

    source: fx.Node
    same: bool


class _Fact(NamedTuple):
    """The shape and the dtype of a value."""

    shape: torch.Size
    dtype: torch.dtype


class _Watch(fx.Interpreter):
    """Runs a graph and notes which values share memory, and which nodes write to them.

    Attributes:
        aliases: the values that share the memory of an argument.
        writes: for each node that writes, the argument to which it does.
        facts: the shape and the dtype of each tensor.
        lengths: the number of items of each tuple.
        mixed: tuples of which only some items share the memory of an argument.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.aliases: dict[fx.Node, _Alias] = {}
        self.writes: dict[fx.Node, fx.Node] = {}
        self.facts: dict[fx.Node, _Fact] = {}
        self.lengths: dict[fx.Node, int] = {}
        self.mixed: set[fx.Node] = set()
        self._items: dict[tuple[fx.Node, str], fx.Node] = {}
        self._attributes: dict[int, fx.Node] = {}

    def run_node(self, n: fx.Node) -> Any:
        held = [(source, leaf) for source in n.all_input_nodes for leaf in _tensors(self.env[source])]
        versions = [leaf._version for _, leaf in held]
        result = super().run_node(n)
        changed = [source for (source, leaf), then in zip(held, versions, strict=True) if leaf._version != then]
        if changed:
            self.writes[n] = _target(n, changed)
        self._note_alias(n, result, held)
        if isinstance(result, Tensor):
            self.facts[n] = _Fact(result.shape, result.dtype)
        elif isinstance(result, tuple | list):
            self.lengths[n] = len(result)
        return result

    def _note_alias(self, node: fx.Node, result: Any, held: Sequence[tuple[fx.Node, Tensor]]) -> None:
        if node.op == "get_attr":
            first = self._attributes.setdefault(id(result), node)
            if first is not node:
                self.aliases[node] = _Alias(first, same=True)
            return
        if self._is_item(node):
            first = self._items.setdefault((node.all_input_nodes[0], str(node.args[1])), node)
            if first is not node:
                self.aliases[node] = _Alias(first, same=True)
                return
            if node.all_input_nodes[0] not in self.aliases:  # an item of an input, or of a tuple of new tensors
                return
        sources = [[source for source, leaf in held if _share(leaf, mine)] for mine in _tensors(result)]
        if not any(sources) or node.op == "output":
            return
        if not all(sources):
            self.mixed.add(node)
            return
        whole = [source for source, leaf in held if isinstance(self.env[source], Tensor) and _same(leaf, result)]
        same = whole[0] if whole else None
        self.aliases[node] = _Alias(sources[0][0] if same is None else same, same is not None)

    def _is_item(self, node: fx.Node) -> bool:
        """Whether a node takes an item of a container."""
        if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
            return False
        return not isinstance(self.env[node.args[0]], Tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The ordinary tensors in a value."""
    for leaf in pytree.tree_leaves(value):
        if type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided:
            yield leaf


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors share memory."""
    return one.numel() > 0 and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _same(one: Tensor, other: Any) -> bool:
    """Whether two tensors are the same elements in the same order."""
    if one is other or not isinstance(other, Tensor):
        return one is other
    alike = one.shape == other.shape and one.dtype == other.dtype and one.stride() == other.stride()
    return alike and _share(one, other) and bool(one.storage_offset() == other.storage_offset())


def _target(node: fx.Node, changed: Sequence[fx.Node]) -> fx.Node:
    """The argument to which a node writes, among those whose values have changed."""
    for argument in (node.kwargs.get("out"), *node.args[:1]):
        if isinstance(argument, fx.Node) and argument in changed:
            return argument
    return changed[0]


class _Rewriter:
    """Replaces writes by new values, in the order of the graph.

    Every write makes a new generation of the base that it changes: the first value with that memory. Views of the base
    from an older generation are taken again when they are read.
    """

    def __init__(self, graph_module: fx.GraphModule, seen: _Watch) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.seen = seen
        self._current: dict[fx.Node, fx.Node] = {}
        self._made: dict[fx.Node, int] = defaultdict(int)  # the generation of the base from which a view was taken
        self._generation: dict[fx.Node, int] = defaultdict(int)
        self._renamed: dict[fx.Node, fx.Node] = {}
        self._replaced: set[fx.Node] = set()

    def run(self) -> None:
        order = list(self.graph.nodes)
        for node in order:
            with self.graph.inserting_before(node):
                if node.op == "output":
                    self._hold_back_effects()
                alias = self.seen.aliases.get(node)
                reads = alias is not None and alias.source in node.all_input_nodes
                node.args = map_arg(node.args, self._argument)
                node.kwargs = map_arg(node.kwargs, self._argument)
                if reads:
                    self._made[node] = self._generation[self._base(node)]
                if node in self.seen.writes:
                    self._replace(node, self.seen.writes[node])
                elif node.target in AUGMENTED:  # of numbers
                    node.target = AUGMENTED[node.target]
        for node in reversed(order):
            if not node.users and (node in self.seen.aliases or node in self.seen.writes) and not self._acts(node):
                self.graph.erase_node(node)

    def _acts(self, node: fx.Node) -> bool:
        """Whether a node does more than return a value: it changes a copy, or may do anything."""
        return node not in self._replaced and (
            changes_in_place(self.graph_module, node) or is_opaque_call(node) or node.is_impure()
        )

    def _replace(self, node: fx.Node, target: fx.Node) -> None:
        """Replace a write by a new value for its target."""
        if view_instead(node):
            self._renamed = {old: node if new is target else new for old, new in self._renamed.items()} | {target: node}
            self.seen.aliases[node] = _Alias(target, same=False)
            return
        target = self._renamed.get(target, target)
        source = self._now(target)
        was = None if "out" in node.kwargs else (node.op, node.target)
        with self.graph.inserting_before(node.next):
            value = out_of_place(self.graph_module, node, source, self.seen.facts)
            if self._promotes(node, target):
                value = self.graph.call_method("type_as", (value, source))
            elif value is node and node.args[:1] == (source,):
                annotate(node, overwrites=was)
            if value is not node and value not in node.all_input_nodes:
                self._replaced.add(node)
            self._write(target, value)
            if node in self.seen.aliases:
                self._set(node, value, self._generation[self._base(node)])

    def _promotes(self, node: fx.Node, target: fx.Node) -> bool:
        """Whether an out-of-place operation would return another dtype than that of the value that it changed."""
        facts = self.seen.facts
        read = [facts[source].dtype for source in node.all_input_nodes if source in facts]
        own = facts[target].dtype
        compares = operation(node) in _COMPARISONS and own != torch.bool
        return compares or any(torch.promote_types(own, dtype) != own for dtype in read)

    def _write(self, view: fx.Node, value: fx.Node) -> None:
        """Make `value` the present value of a view, and write it through to the base."""
        found = [(view, value)]
        while view in self.seen.aliases:
            source, same = self.seen.aliases[view]
            if not same:
                source, value = self._written_through(view, source, value)
            found.append((source, value))
            view = source
        if self._is_parameter(view):
            raise CaptureError(f"forward changes the parameter {view.target!r}: make it a buffer")
        self._generation[view] += 1
        for node, new in found:
            self._set(node, new, self._generation[view])

    def _set(self, node: fx.Node, value: fx.Node, generation: int) -> None:
        """Make a new node the present value of another one, with the same shape and dtype."""
        self._current[node], self._made[node] = value, generation
        if node in self.seen.facts:
            self.seen.facts[value] = self.seen.facts[node]

    def _written_through(self, view: fx.Node, source: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The value from which a view is taken, and its new value."""
        if source in self.seen.lengths:  # an item of a tuple of views
            return self._joined(view, source, value)
        base = self._now(source)
        steps = view_steps(view, len(self.seen.facts[source].shape))
        if steps is not None:
            return source, write_through(self.graph, base, steps, value)
        ones = self.graph.call_function(torch.ones_like, (base,), {"dtype": torch.int64})
        flat = self.graph.call_method("flatten", (ones,))
        counted = self.graph.call_function(torch.sub, (self.graph.call_method("cumsum", (flat, 0)), 1))
        places = self.graph.call_method("reshape_as", (counted, base))
        taken = self.graph.node_copy(view, lambda argument: places if argument is source else self._now(argument))
        return source, self.graph.call_function(torch.put, (base, taken, value))

    def _joined(self, item: fx.Node, pieces: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The tensor that was cut into pieces, and its new value with `value` in place of one of them."""
        name = operation(pieces)
        if name not in _PIECES or pieces not in self.seen.aliases:
            raise CaptureError(f"an item of {pieces.name} ({pieces.target}) is changed in place: clone it before")
        now = self._now(pieces)
        parts = [self.graph.call_function(operator.getitem, (now, index)) for index in range(self.seen.lengths[pieces])]
        parts[item.args[1]] = value  # type: ignore[index]
        position = _PIECES[name]
        dim = pieces.kwargs.get("dim", pieces.args[position] if len(pieces.args) > position else 0)
        join = torch.stack if name == "unbind" else torch.cat
        return self.seen.aliases[pieces].source, self.graph.call_function(join, (parts, dim))

    def _argument(self, node: fx.Node) -> fx.Node:
        return self._now(self._renamed.get(node, node))

    def _now(self, node: fx.Node) -> fx.Node:
        """The present value of a node."""
        if node in self.seen.aliases:
            source, same = self.seen.aliases[node]
            generation = self._generation[self._base(node)]
            if self._made[node] < generation:
                value = self._now(source)
                if not same:
                    swap = {source: value}
                    value = self.graph.node_copy(node, lambda each: swap[each] if each in swap else self._now(each))
                self._set(node, value, generation)
        return self._current.get(node, node)

    def _base(self, node: fx.Node) -> fx.Node:
        while node in self.seen.aliases:
            node = self.seen.aliases[node].source
        return node

    def _is_parameter(self, node: fx.Node) -> bool:
        if node.op != "get_attr":
            return False
        owner, _, name = str(node.target).rpartition(".")
        return isinstance(getattr(self.graph_module.get_submodule(owner), name), nn.Parameter)

    def _hold_back_effects(self) -> None:
        """Hold back what is written to inputs and buffers."""
        for base, generation in self._generation.items():
            if generation and self._is_outside(base):
                add_effect(self.graph_module, base, self._current[base])

    def _is_outside(self, node: fx.Node) -> bool:
        if node.op in ("placeholder", "get_attr"):
            return True
        return node.target is operator.getitem and self._is_outside(node.all_input_nodes[0])
