"""The time of each node of a graph, run node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from balf_fx.latency.stopwatch import seconds

_ROUNDS = 7


class _Clocked(fx.Interpreter):
    """Runs a graph and keeps the seconds of each node; nodes with some targets are left out."""

    def __init__(self, graph_module: fx.GraphModule, device: torch.device, skipped: str) -> None:
        super().__init__(graph_module)
        self._device, self._skipped = device, skipped
        self.times: dict[str, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and str(n.target).startswith(self._skipped):
            return None
        found: list[Any] = []
        own = seconds(lambda: found.append(super(_Clocked, self).run_node(n)), self._device)
        self.times.setdefault(n.name, []).append(own)
        return found[0]


def node_seconds(
    graph_module: fx.GraphModule, inputs: Sequence[Any], device: torch.device, skipped: str
) -> Mapping[str, float]:
    """The least seconds of each node over a few runs, by name: what else runs on the machine can only add to them.

    Args:
        inputs: one for each placeholder.
        skipped: the start of the targets of modules that are not run, such as observers, whose values nothing reads.
    """
    clocked = _Clocked(graph_module, device, skipped)
    with torch.no_grad():
        for _ in range(_ROUNDS + 1):
            clocked.run(*inputs)
    return {name: min(times[1:]) for name, times in clocked.times.items()}
