"""The time of each node of a graph, run node by node."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from balf_fx.graph.operators import is_convolution, operation
from balf_fx.latency.stopwatch import Task, seconds

_ROUNDS = 7


class _Clocked(fx.Interpreter):
    """Runs a graph and keeps the seconds of each node; nodes with some targets are left out."""

    def __init__(self, graph_module: fx.GraphModule, device: torch.device, skipped: str, compiled: bool) -> None:
        super().__init__(graph_module)
        self._graph_module, self._device = graph_module, device
        self._skipped, self._compiled = skipped, compiled
        self.times: dict[str, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and str(n.target).startswith(self._skipped):
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if self._compiled and self._device.type == "cpu":
            images = torch.channels_last if self._reads_pixels(n) else torch.contiguous_format
            args, kwargs = pytree.tree_map_only(torch.Tensor, partial(_stored, images=images), (args, kwargs))
        found: list[Any] = []
        run = getattr(self, n.op)
        own = seconds(lambda: found.append(run(n.target, args, kwargs)), self._device)
        self.times.setdefault(n.name, []).append(own)
        return found[0]

    def _reads_pixels(self, node: fx.Node) -> bool:
        """Whether a node is a convolution or a pool."""
        module = self.submodules.get(str(node.target)) if node.op == "call_module" else None
        name = operation(node) if module is None else type(module).__name__.lower()
        return "pool" in name or is_convolution(self._graph_module, node)


def _stored(value: Tensor, images: torch.memory_format) -> Tensor:
    """The same values, those of images in another order."""
    return value.contiguous(memory_format=images) if value.dim() == 4 else value


def node_seconds(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    device: torch.device,
    skipped: str,
    compiled: Task | None = None,
) -> tuple[Mapping[str, float], float | None]:
    """The median seconds of each node over a few runs, by name, and those of the compiled graph, which runs in turn.

    Args:
        inputs: one for each placeholder.
        skipped: the start of the targets of modules that are not run, such as observers, whose values nothing reads.
        compiled: runs the graph compiled by inductor. The nodes then get their inputs as there: on a CPU, it gives
            images to convolutions and pools features last.
    """
    clocked = _Clocked(graph_module, device, skipped, compiled is not None)
    whole = []
    with torch.no_grad():
        for _ in range(_ROUNDS + 1):  # the first compiles
            clocked.run(*inputs)
            whole += [] if compiled is None else [seconds(compiled, device)]
    nodes = {name: statistics.median(times[1:]) for name, times in clocked.times.items()}
    return nodes, statistics.median(whole[1:]) if whole else None
