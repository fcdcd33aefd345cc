"""Views of tensors as sequences of primitive steps, each of which can be written through without changing its source.

A write to a view changes its base. Written without side effects, it makes a new base: `put` of a step returns the
source with a new value in place of the part that the step takes.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from balf_fx.graph.operators import aten, operation

_SAME_ORDER = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel")


class ViewStep(ABC):
    """One primitive view."""

    @abstractmethod
    def take(self, graph: fx.Graph, source: fx.Node) -> fx.Node:
        """The view of a source."""

    @abstractmethod
    def put(self, graph: fx.Graph, source: fx.Node, value: fx.Node) -> fx.Node:
        """The source with `value` in place of the view."""


@dataclass(frozen=True)
class Select(ViewStep):
    """`source[:, ..., index]` in dimension `dim`."""

    dim: int
    index: Any

    def take(self, graph: fx.Graph, source: fx.Node) -> fx.Node:
        return graph.call_function(aten.select.int, (source, self.dim, self.index))

    def put(self, graph: fx.Graph, source: fx.Node, value: fx.Node) -> fx.Node:
        return graph.call_function(aten.select_scatter.default, (source, value, self.dim, self.index))


@dataclass(frozen=True)
class Slice(ViewStep):
    """`source[:, ..., start:stop:step]` in dimension `dim`."""

    dim: int
    start: Any = None
    stop: Any = None
    step: Any = 1

    def take(self, graph: fx.Graph, source: fx.Node) -> fx.Node:
        return graph.call_function(aten.slice.Tensor, (source, self.dim, self.start, self.stop, self.step))

    def put(self, graph: fx.Graph, source: fx.Node, value: fx.Node) -> fx.Node:
        where = (self.dim, self.start, self.stop, self.step)
        return graph.call_function(aten.slice_scatter.default, (source, value, *where))


@dataclass(frozen=True)
class Unsqueeze(ViewStep):
    """`source[:, ..., None]` in dimension `dim`."""

    dim: int

    def take(self, graph: fx.Graph, source: fx.Node) -> fx.Node:
        return graph.call_method("unsqueeze", (source, self.dim))

    def put(self, graph: fx.Graph, source: fx.Node, value: fx.Node) -> fx.Node:  # noqa: ARG002
        return graph.call_method("squeeze", (value, self.dim))


@dataclass(frozen=True)
class Whole(ViewStep):
    """A view of all elements.

    Attributes:
        node: the node that takes it.
        back: the method that restores the order of the elements, with its arguments; None if the order is the same.
    """

    node: fx.Node
    back: tuple[Any, ...] | None = None

    def take(self, graph: fx.Graph, source: fx.Node) -> fx.Node:
        return graph.node_copy(self.node, lambda argument: source if argument is self.node.args[0] else argument)

    def put(self, graph: fx.Graph, source: fx.Node, value: fx.Node) -> fx.Node:
        if self.back is not None:
            return graph.call_method(self.back[0], (value, *self.back[1:]))
        return graph.call_method("reshape_as", (value, source))


def view_steps(node: fx.Node, dims: int) -> list[ViewStep] | None:
    """The steps of a node that views its first argument; None if they are not known.

    Args:
        dims: the number of dimensions of that argument.
    """
    name, args = operation(node), node.args[1:]
    if node.op == "call_module" or name in _SAME_ORDER:  # modules that return views: nn.Flatten and nn.Unflatten
        return [Whole(node)]
    if node.kwargs:
        return None
    if name == "getitem" and node.target is operator.getitem:
        found = Index.parse(args[0], dims, {})
        return None if found is None else list(found.steps)
    if name == "select":
        return [Select(*args)]  # type: ignore[arg-type]
    if name == "slice" and args:
        return [Slice(*args)]  # type: ignore[arg-type]
    if name == "transpose":
        return [Whole(node, (name, *args))]
    if name == "t":
        return [Whole(node, ("t",))]
    if name == "permute":
        order: Any = args[0] if len(args) == 1 else args
        positive = [axis % dims for axis in order]
        return [Whole(node, ("permute", [positive.index(axis) for axis in range(dims)]))]
    return None


@dataclass(frozen=True)
class Index:
    """An index `[...]` as torch applies it: first the steps of a view, then tensors.

    Attributes:
        steps: the view.
        tensors: for each of its first dimensions the tensor that indexes it, or None; empty if there are no tensors.
    """

    steps: tuple[ViewStep, ...]
    tensors: tuple[Any, ...] = ()

    @classmethod
    def parse(cls, index: Any, dims: int, tensors: dict[fx.Node, int]) -> Index | None:
        """The parts of an index; None if it has items of other kinds.

        Args:
            index: integers, slices, None, Ellipsis and nodes, or a tuple of them.
            dims: the number of dimensions of the indexed tensor.
            tensors: the nodes whose values are tensors, each with the number of dimensions that it indexes.
        """
        items = index if isinstance(index, tuple) else (index,)
        steps: list[ViewStep] = []
        chosen: list[Any] = []
        dim = 0
        for item in _expanded(items, dims, tensors):
            if isinstance(item, fx.Node) and item in tensors:
                chosen.append(item)
                dim += tensors[item]
                continue
            if isinstance(item, int | fx.Node) and not isinstance(item, bool):
                steps.append(Select(dim, item))
                continue
            if item is None:
                steps.append(Unsqueeze(dim))
            elif not isinstance(item, slice):
                return None
            elif item != slice(None):
                steps.append(Slice(dim, item.start, item.stop, 1 if item.step is None else item.step))
            chosen.append(None)
            dim += 1
        return cls(tuple(steps), tuple(chosen) if any(item is not None for item in chosen) else ())


def _expanded(items: Sequence[Any], dims: int, tensors: dict[fx.Node, int]) -> list[Any]:
    """The items with full slices in place of an Ellipsis."""
    if not any(item is Ellipsis for item in items):
        return list(items)
    used = sum(
        tensors.get(item, 1) if isinstance(item, fx.Node) else int(item is not None and item is not Ellipsis)
        for item in items
    )
    place = next(position for position, item in enumerate(items) if item is Ellipsis)
    return [*items[:place], *[slice(None)] * (dims - used), *items[place + 1 :]]


def write_through(graph: fx.Graph, source: fx.Node, steps: Sequence[ViewStep], value: fx.Node) -> fx.Node:
    """The source with `value` in place of a view of it."""
    if not steps:
        return value
    first, *rest = steps
    if rest:
        value = write_through(graph, first.take(graph, source), rest, value)
    return first.put(graph, source, value)
