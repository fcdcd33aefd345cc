"""Calls that only bring the entries of a value into another layout: views, `roll`, and copies in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from balf_fx.graph.operators import is_transposition, operation

ValueOf = Callable[[fx.Node], Any]
"""A function that returns the value of a node."""

_CALLS = (
    *("view", "_unsafe_view", "reshape", "view_as", "reshape_as", "ravel", "flatten", "unflatten"),
    *("squeeze", "unsqueeze", "contiguous"),
    *("permute", "transpose", "movedim", "t", "mT", "numpy_T"),
    *("getitem", "slice", "narrow", "roll"),
)

_MODULES = (nn.Flatten, nn.Unflatten)


def is_relayout(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node only brings entries of its first argument into another layout; it may leave some out."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))) in _MODULES
    known = operation(node) in _CALLS or is_transposition(node)
    return known and not any(isinstance(value, torch.dtype) for value in node.args)


def sizes_of(relayouts: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that relayouts read besides the values that they bring into another layout."""
    return {source for node in relayouts for source in node.all_input_nodes[1:]}


def relaid(graph_module: fx.GraphModule, node: fx.Node, value: Tensor, value_of: ValueOf) -> Tensor:
    """A value in the layout that a node makes of it.

    Args:
        value: in the place of the node's first argument.
        value_of: for the other arguments, such as sizes.
    """
    args, kwargs = _others(node, value_of)
    value = value.contiguous()  # of one that is not, a view may be impossible
    if node.op == "call_method":
        found = getattr(value, str(node.target))(*args, **kwargs)
    elif node.op == "call_module":
        found = graph_module.get_submodule(str(node.target))(value)
    else:
        function: Any = node.target
        found = function(value, *args, **kwargs)
    return cast(Tensor, found)


def laid_back(
    graph_module: fx.GraphModule, node: fx.Node, value: Tensor, shape: Sequence[int], value_of: ValueOf
) -> Tensor | None:
    """The inverse of `relaid`: a value in the layout from which a node makes its own; what the node leaves out is 0.

    Args:
        value: in the layout that the node makes.
        shape: the layout before the node.
        value_of: as in `relaid`.

    Returns:
        None if the entries have no places there, as those that tensors select.
    """
    if operation(node) == "contiguous":  # of any order in memory
        return value
    if operation(node) == "roll":
        shifts, *dims = _bound(node, value_of)
        back = [-shift for shift in shifts] if isinstance(shifts, list | tuple) else -shifts
        return value.roll(back, *dims)
    whole = value.new_zeros(tuple(shape))
    part = relaid(graph_module, node, whole, value_of)
    if part.shape != value.shape or part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return None
    part.copy_(value)
    return whole


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a value of one shape can be expanded to another shape."""
    own = (1,) * (len(to) - len(shape)) + tuple(shape)
    return len(own) == len(to) and all(size in (1, wanted) for size, wanted in zip(own, to, strict=True))


def _others(node: fx.Node, value_of: ValueOf) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node but the first."""
    return cast(tuple[tuple[Any, ...], dict[str, Any]], map_arg((node.args[1:], node.kwargs), value_of))


def _bound(node: fx.Node, value_of: ValueOf) -> list[Any]:
    """Shifts and, if given, dimensions of `roll`."""
    args, kwargs = _others(node, value_of)
    named = {**dict(zip(("shifts", "dims"), args, strict=False)), **kwargs}
    return [named[name] for name in ("shifts", "dims") if name in named]
