"""The out-of-place form of every operation that changes a tensor in place."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from balf_fx.graph.operators import AUGMENTED, aten, has_inplace_flag, operation, set_inplace_flag
from balf_fx.graph.views import Index, write_through

_SET_SHAPE = ("squeeze", "unsqueeze", "t", "transpose", "detach")


def view_instead(node: fx.Node) -> bool:
    """Let an operation return a view that makes its argument another view of its elements, and changes none of them.

    Returns:
        Whether the node is such an operation.
    """
    other = _counterpart(node) if operation(node) in _SET_SHAPE else None
    if other is not None:
        node.target = other
    return other is not None


def out_of_place(
    graph_module: fx.GraphModule, node: fx.Node, target: fx.Node, shapes: Mapping[fx.Node, Any]
) -> fx.Node:
    """The node that computes what another one writes; it is the same node where only the operation is another one.

    An operation without an out-of-place form writes to a copy, as random numbers do, for instance.

    Args:
        target: the argument that the node changes.
        shapes: the shape and the dtype of every tensor of the graph.
    """
    if node.op == "call_module":
        module: Any = graph_module.get_submodule(str(node.target))
        if hasattr(module, "inplace"):  # perhaps cleared already, for another call
            module.inplace = False
            return node
    if node.target is operator.setitem:
        return _set_items(node, target, shapes) or _on_copy(node, target)
    if node.target in AUGMENTED:
        node.target = AUGMENTED[node.target]
        return node
    if "out" in node.kwargs:
        node.target = _without_out(node.target)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "out"}
        return node
    if operation(node) == "copy" and len(node.args) > 1:
        return _copied(node.graph, node.args[1], target)
    if has_inplace_flag(node):
        set_inplace_flag(node, False)
        return node
    other = _counterpart(node)
    if other is not None:
        node.op, node.target = ("call_method" if isinstance(other, str) else "call_function"), other
        return node
    return _on_copy(node, target)


def _on_copy(node: fx.Node, target: fx.Node) -> fx.Node:
    """Let a node change a copy that nothing else reads; returns the copy."""
    with node.graph.inserting_before(node):
        copied = node.graph.call_method("clone", (target,))
    node.replace_input_with(target, copied)
    return copied


def _without_out(function: Any) -> Any:
    """The function, or the overload of an operator, that returns what this one writes to `out`."""
    if not isinstance(function, torch._ops.OpOverload):
        return function
    wanted = _arguments(function)
    return next(each for each in _overloads(function.overloadpacket) if _arguments(each) == wanted)


def _overloads(packet: Any) -> Iterator[torch._ops.OpOverload]:
    """The overloads of an operator that change none of their arguments; none for None."""
    found = () if packet is None else (getattr(packet, name) for name in packet.overloads())
    yield from (each for each in found if not each._schema.is_mutable)


def _arguments(operator: torch._ops.OpOverload) -> list[tuple[str, str]]:
    """The names and types of an operator's arguments, without `out`."""
    return [(each.name, str(each.type)) for each in operator._schema.arguments if not each.is_out]


def _counterpart(node: fx.Node) -> Any:
    """The out-of-place function or method by the name of a call; None if there is none."""
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = node.target._schema.name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), name.rstrip("_"), None)
        wanted = _arguments(node.target)
        return next((each for each in _overloads(packet) if _arguments(each) == wanted), None)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if not name.endswith("_") or name.endswith("__"):
        return None
    plain = name.rstrip("_")
    if plain == "fill":
        return torch.fill
    if plain == "zero":
        return torch.zeros_like
    if node.op == "call_method":
        return plain if hasattr(Tensor, plain) else None
    owners = [owner for owner in (torch, F) if getattr(owner, name, None) is node.target]
    return next((getattr(owner, plain) for owner in (*owners, F) if owners and hasattr(owner, plain)), None)


def _set_items(node: fx.Node, target: fx.Node, shapes: Mapping[fx.Node, Any]) -> fx.Node | None:
    """`target[index] = value` as a new tensor; None for an index or a value of another kind."""
    graph, (_, index, value) = node.graph, node.args
    items = index if isinstance(index, tuple) else (index,)
    items = tuple(
        graph.call_method("new_tensor", (target, item), {"dtype": torch.int64}) if isinstance(item, list) else item
        for item in items
    )
    covered = {item: _covered(item, shapes) for item in items if isinstance(item, fx.Node) and _covered(item, shapes)}
    parsed = Index.parse(items, len(shapes[node.args[0]].shape), covered)  # type: ignore[index]
    if parsed is None or not isinstance(value, fx.Node | int | float | complex):
        return None
    view = target
    for step in parsed.steps:
        view = step.take(graph, view)
    is_tensor = isinstance(value, fx.Node) and value in shapes
    if parsed.tensors:
        if is_tensor:
            given = graph.call_method("type_as", (value, view))
        else:
            given = graph.call_method("new_full", (view, (), value))
        new = graph.call_function(aten.index_put.default, (view, list(parsed.tensors), given))
    elif is_tensor:
        new = _copied(graph, value, view)
    else:
        new = graph.call_function(torch.full_like, (view, value))
    return write_through(graph, target, parsed.steps, new)


def _copied(graph: fx.Graph, value: Any, like: fx.Node) -> fx.Node:
    """A value with the shape, the dtype and the memory format of another one."""
    expanded = graph.call_method("expand_as", (graph.call_method("type_as", (value, like)), like))
    return graph.call_function(
        torch.where, (graph.call_function(torch.ones_like, (like,), {"dtype": torch.bool}), expanded, like)
    )


def _covered(item: fx.Node, shapes: Mapping[fx.Node, Any]) -> int:
    """The number of dimensions that a node indexes if its value is a tensor, else 0."""
    if item not in shapes and item.op == "call_method" and item.target == "new_tensor":
        return 1
    if item not in shapes:
        return 0
    is_mask = shapes[item].dtype in (torch.bool, torch.uint8)
    return len(shapes[item].shape) if is_mask else 1
