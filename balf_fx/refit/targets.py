"""What a layer should return: targets that take in errors made upstream, and clips downstream."""

from __future__ import annotations

import math
import operator

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


def target_of(
    batch: Batch, node: fx.Node, addition: fx.Node | None, site: Site, own: Window
) -> tuple[Tensor, Tensor | None]:
    """What a window's outputs should be, in sum with a value of the compressed model's; this value, if any."""
    target = own.of(by_sample(batch.original[node], site))
    other = None if addition is None else batch.original.get(addition)
    if addition is None or not isinstance(other, Tensor) or other.shape != batch.original[node].shape:
        return target, None
    return target + own.of(by_sample(other, site)), own.of(by_sample(batch.current(addition), site))


def within_limits(target: Tensor, predicted: Tensor, limits: tuple[float, float]) -> Tensor:
    """The target where it is within limits; elsewhere what was predicted, but no nearer than the limit."""
    low, high = limits
    # several times as fast as where()
    seen = torch.maximum(F.threshold(target, low, -math.inf), predicted.clamp_max(low))
    if high == math.inf:
        return seen
    return -torch.maximum(F.threshold(-seen, -high, -math.inf), (-predicted).clamp_max(-high))


def observes(node: fx.Node) -> bool:
    return str(node.target).startswith(f"{OBSERVERS}.")


def _readers(graph_module: fx.GraphModule, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The nodes that read a node's values, each with what it reads: the node, or what hands its values on."""
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
