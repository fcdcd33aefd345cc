"""The target output of a layer, given the errors made before it and the limits that follow it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from balf_fx.calibration.moments import by_sample
from balf_fx.calibration.observers import OBSERVERS
from balf_fx.graph.operators import aten, is_identity, operation, reads_metadata
from balf_fx.graph.relayouts import ValueOf, broadcasts, is_relayout, laid_back, relaid, sizes_of
from balf_fx.graph.site import Site
from balf_fx.refit.lockstep import Batch, sources_of
from balf_fx.refit.windows import Window

_ADDITIONS = (
    operator.add,
    operator.iadd,
    torch.add,
    aten.add.Tensor,
    aten.add_.Tensor,
    "add",
    "add_",
)

_LIMITS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0), "hardsigmoid": (-3.0, 3.0), "hardswish": (-3.0, math.inf)}

_CLIPPING = (nn.ReLU, nn.Hardsigmoid, nn.Hardswish)


@dataclass(frozen=True)
class Summand:
    """A value to which the output of a layer is added.

    Attributes:
        node: the value.
        total: the sum.
        relayouts: the nodes that bring the output into the layout of the sum, in their order.
    """

    node: fx.Node
    total: fx.Node
    relayouts: tuple[fx.Node, ...] = ()

    def laid_back(
        self, graph_module: fx.GraphModule, value: Tensor, shape: torch.Size, value_of: ValueOf
    ) -> Tensor | None:
        """The value in the layout of the layer's output, whose shape is given; None if the value is larger."""
        shapes = [shape]
        for node in self.relayouts:
            shapes.append(relaid(graph_module, node, torch.empty(shapes[-1], device="meta"), value_of).shape)
        *earlier, last = shapes
        if not broadcasts(value.shape, last):
            return None
        found: Tensor | None = value.expand(last)
        for node, before in zip(reversed(self.relayouts), reversed(earlier), strict=True):
            found = None if found is None else laid_back(graph_module, node, found, before, value_of)
        return found


@dataclass(frozen=True)
class Target:
    """The target output of a layer in the compressed model.

    Where the output is added to other values, the errors of these are added to the target, as far as they are known.
    Where the following operation clips the output to limits, differences beyond the limits do not count as errors.

    Attributes:
        graph_module: the graph.
        node: the layer.
        site: its weight and geometry.
        additions: the values to which its output is added, one after the other.
        limits: the limits to which its output, or the sum, is clipped; None if it is not clipped.
    """

    graph_module: fx.GraphModule
    node: fx.Node
    site: Site
    additions: tuple[Summand, ...]
    limits: tuple[float, float] | None

    @classmethod
    def of(cls, graph_module: fx.GraphModule, node: fx.Node, site: Site) -> Target:
        """The target of a layer, from the readers of its output in the graph."""
        return cls(graph_module, node, site, tuple(additions_of(graph_module, node)), limits_of(graph_module, node))

    def outputs(
        self, batch: Batch, window: Window, cut: Callable[[Tensor], Tensor], predicted: Tensor | None
    ) -> Tensor:
        """The target output in a window, [G, O, n].

        Args:
            cut: extracts [G, O, n] from a value of the shape of the layer's output.
            predicted: [G, O, n], the output of an earlier solution, from which the target is made beyond the limits;
                None to ignore the limits.
        """
        wanted = window.of(by_sample(batch.before(self.node), self.site))
        others = list(self._others(batch))
        if len(others) < len(self.additions):  # limits of the sum say nothing of a part of it
            predicted = None
        if not others:
            return self._seen(cut(wanted), predicted)
        parts = ((window.of(by_sample(each, self.site)) for each in side) for side in zip(*others, strict=True))
        before, now = (reduce(torch.add, side) for side in parts)
        added = cut(now)
        return self._seen(cut(wanted + before), None if predicted is None else predicted + added) - added

    def _others(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """The values to which the output is added that are known, in the original and in the compressed model."""
        for addition in self.additions:
            found = batch.once((self.node, addition), partial(self._other, batch, addition))
            if found is not None:
                yield found

    def _other(self, batch: Batch, addition: Summand) -> tuple[Tensor, Tensor] | None:
        """A value to which the output is added, of both models and in the layout of the output; None if unknown."""
        before, sizes = batch.original.get(addition.node), map(batch.original.get, sizes_of(addition.relayouts))
        if not isinstance(before, Tensor) or any(size is None or isinstance(size, Tensor) for size in sizes):
            return None  # entries that tensors select have no single place
        shape = batch.before(self.node).shape
        values = (before, batch.current(addition.node))
        found = [addition.laid_back(self.graph_module, value, shape, batch.before) for value in values]
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    def _seen(self, wanted: Tensor, predicted: Tensor | None) -> Tensor:
        return wanted if predicted is None or self.limits is None else within_limits(wanted, predicted, self.limits)


def within_limits(target: Tensor, predicted: Tensor, limits: tuple[float, float]) -> Tensor:
    """The target where it is within the limits; below them min(predicted, low), above them max(predicted, high).

    Args:
        target, predicted: tensors of the same shape.
        limits: low and high, which may be infinite.
    """
    low, high = limits
    # several times faster than where()
    seen = torch.maximum(F.threshold(target, low, -math.inf), predicted.clamp_max(low))
    if high == math.inf:
        return seen
    return -torch.maximum(F.threshold(-seen, -high, -math.inf), (-predicted).clamp_max(-high))


def observes(node: fx.Node) -> bool:
    """Whether a node only calls an observer."""
    return str(node.target).startswith(f"{OBSERVERS}.")


def _readers(graph_module: fx.GraphModule, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The nodes that read a node's values, each with the node it reads: the node itself or one that forwards it."""
    found = []
    for user in node.users:
        if is_identity(graph_module, user):
            found += _readers(graph_module, user)
        elif not reads_metadata(user) and not observes(user):
            found.append((user, node))
    return found


def _behind(graph_module: fx.GraphModule, node: fx.Node) -> tuple[list[fx.Node], list[tuple[fx.Node, fx.Node]]]:
    """The relayouts of a node's values, one behind the other, and the readers of what the last one makes."""
    found, readers = [], _readers(graph_module, node)
    while len(readers) == 1 and is_relayout(graph_module, readers[0][0]) and readers[0][0].args[0] is readers[0][1]:
        found.append(readers[0][0])
        readers = _readers(graph_module, found[-1])
    return found, readers


def additions_of(graph_module: fx.GraphModule, node: fx.Node) -> Iterator[Summand]:
    """The values to which the node's output is added, one after the other, as long as nothing else reads the sums."""
    relayouts: list[fx.Node] = []
    while True:
        found, readers = _behind(graph_module, node)
        relayouts += found
        if len(readers) != 1 or not _adds(readers[0][0]):
            return
        (node, read), *_ = readers
        others = [source for source in node.all_input_nodes if source is not read]
        if len(others) != 1 or len(node.args) != 2:
            return
        yield Summand(others[0], node, tuple(relayouts))


def summands_first(graph_module: fx.GraphModule, nodes: Sequence[fx.Node], layers: Set[fx.Node]) -> list[fx.Node]:
    """The nodes in an order in which what is added to a layer's output is computed before the layer, as a shortcut is.

    Then the layer is solved for the error of the sum, and the limits of the sum are known. Of two layers whose outputs
    are added, the first one stays the first.
    """
    order = list(nodes)
    sums = ((node, each.node) for node in nodes if node in layers for each in additions_of(graph_module, node))
    for node, other in sums:
        place = order.index(node)
        if other not in order[place:] or _behind_identities(graph_module, other) in layers:
            continue
        needed = _needed(other, set(order[place:]))
        if node not in needed:
            late = order[place:]
            order[place:] = [*filter(needed.__contains__, late), *(each for each in late if each not in needed)]
    return order


def _behind_identities(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node whose value a node forwards; itself if it computes one."""
    while is_identity(graph_module, node):
        node = node.all_input_nodes[0]
    return node


def _needed(node: fx.Node, among: Set[fx.Node]) -> set[fx.Node]:
    """The nodes that a node depends on, and itself, as far as they are among some."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        each = pending.pop()
        if each in among and each not in found:
            found.add(each)
            pending += sources_of(each)
    return found


def _adds(node: fx.Node) -> bool:
    """Whether a node is a plain sum; the graph of a compressed model may have it as a difference with alpha=-1."""
    if node.target is torch.sub:
        return dict(node.kwargs) == {"alpha": -1}
    return node.target in _ADDITIONS and not node.kwargs


def limits_of(graph_module: fx.GraphModule, node: fx.Node) -> tuple[float, float] | None:
    """The limits to which all readers clip the output, or its sum with another value; None if there are none."""
    sums = [each.total for each in additions_of(graph_module, node)]
    _, readers = _behind(graph_module, sums[-1] if sums else node)
    found = {_clips(graph_module, reader) for reader, _ in readers}
    return found.pop() if len(found) == 1 else None


def _clips(graph_module: fx.GraphModule, node: fx.Node) -> tuple[float, float] | None:
    """The limits of ReLU, Hardswish and similar functions, beyond which an input need not be known."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if type(module) in (nn.Hardtanh, nn.ReLU6):
            return float(module.min_val), float(module.max_val)  # type: ignore[arg-type]
        return _LIMITS[type(module).__name__.lower()] if type(module) in _CLIPPING else None
    name = operation(node)
    if name == "hardtanh":
        low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min_val", -1.0)
        high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max_val", 1.0)
        return (float(low), float(high)) if isinstance(low, int | float) and isinstance(high, int | float) else None
    return _LIMITS.get(name)
