"""What a layer should output, given the errors made before it and the limits that follow it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from balf_fx.calibration.moments import by_sample
from balf_fx.calibration.observers import OBSERVERS
from balf_fx.graph.operators import is_identity, operation, reads_metadata
from balf_fx.graph.site import Site
from balf_fx.refit.lockstep import Batch
from balf_fx.refit.windows import Window

aten = torch.ops.aten

_ADDITIONS = (
    operator.add,
    operator.iadd,
    torch.add,
    aten.add.Tensor,
    aten.add_.Tensor,
    "add",
    "add_",
)


@dataclass(frozen=True)
class Target:
    """What a layer should output in the compressed model.

    Where the output is added to another value, the error of that value counts as the layer's own. Where what follows
    only sees it between limits, so does the regression.

    Attributes:
        node: the layer.
        site: how it is applied.
        addition: the value that its output is added to; None where there is none.
        limits: between which its output, or the sum, is seen; None where all of it is.
    """

    node: fx.Node
    site: Site
    addition: fx.Node | None
    limits: tuple[float, float] | None

    @classmethod
    def of(cls, graph_module: fx.GraphModule, node: fx.Node, site: Site) -> Target:
        """The target of a layer, from what the graph does with its output."""
        return cls(node, site, addition_of(graph_module, node), limits_of(graph_module, node))

    def outputs(
        self, batch: Batch, window: Window, cut: Callable[[Tensor], Tensor], predicted: Tensor | None
    ) -> Tensor:
        """What the layer should output in a window, [G, O, n].

        Args:
            cut: takes [G, O, n] out of a value like the layer's output.
            predicted: [G, O, n], what an earlier solution outputs, which decides what an error is beyond the limits;
                None to see all of the output.
        """
        wanted = window.of(by_sample(batch.original[self.node], self.site))
        other = self._other(batch)
        if other is None:
            return self._seen(cut(wanted), predicted)
        before, now = (window.of(by_sample(value, self.site)) for value in other)
        added = cut(now)
        return self._seen(cut(wanted + before), None if predicted is None else predicted + added) - added

    def _other(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """The value that the output is added to, in the original and in the compressed model."""
        other = None if self.addition is None else batch.original.get(self.addition)
        if self.addition is None or not isinstance(other, Tensor) or other.shape != batch.original[self.node].shape:
            return None
        return other, batch.current(self.addition)

    def _seen(self, wanted: Tensor, predicted: Tensor | None) -> Tensor:
        return wanted if predicted is None or self.limits is None else within_limits(wanted, predicted, self.limits)


def within_limits(target: Tensor, predicted: Tensor, limits: tuple[float, float]) -> Tensor:
    """The target where it is within limits; elsewhere what was predicted, but no nearer than the limit.

    Args:
        target, predicted: of one shape.
        limits: the lower one and the upper one, which may be infinite.
    """
    low, high = limits
    # several times as fast as where()
    seen = torch.maximum(F.threshold(target, low, -math.inf), predicted.clamp_max(low))
    if high == math.inf:
        return seen
    return -torch.maximum(F.threshold(-seen, -high, -math.inf), (-predicted).clamp_max(-high))


def observes(node: fx.Node) -> bool:
    """Whether a node only calls an observer."""
    return str(node.target).startswith(f"{OBSERVERS}.")


def _readers(graph_module: fx.GraphModule, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The nodes that read a node's values, each with what it reads: the node, or a node that passes its values on."""
    found = []
    for user in node.users:
        if is_identity(graph_module, user):
            found += _readers(graph_module, user)
        elif not reads_metadata(user) and not observes(user):
            found.append((user, node))
    return found


def addition_of(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The value to which the node's output is added, where that is all that becomes of it."""
    readers = _readers(graph_module, node)
    if len(readers) != 1:
        return None
    (reader, read), *_ = readers
    if reader.target not in _ADDITIONS or reader.kwargs or len(reader.args) != 2:
        return None
    others = [source for source in reader.all_input_nodes if source is not read]
    return others[0] if len(others) == 1 else None


def limits_of(graph_module: fx.GraphModule, node: fx.Node) -> tuple[float, float] | None:
    """Between what limits the output, or its sum with another value, is seen by all that reads it."""
    readers = _readers(graph_module, node)
    if addition_of(graph_module, node) is not None:
        readers = _readers(graph_module, readers[0][0])
    found = {_clips(graph_module, reader) for reader, _ in readers}
    return found.pop() if len(found) == 1 else None


def _clips(graph_module: fx.GraphModule, node: fx.Node) -> tuple[float, float] | None:
    """The limits of ReLU and its like."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if type(module) in (nn.Hardtanh, nn.ReLU6):
            return float(module.min_val), float(module.max_val)  # type: ignore[arg-type]
        return (0.0, math.inf) if type(module) is nn.ReLU else None
    name = operation(node)
    if name == "hardtanh":
        low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min_val", -1.0)
        high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max_val", 1.0)
        return (float(low), float(high)) if isinstance(low, int | float) and isinstance(high, int | float) else None
    return {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}.get(name)
