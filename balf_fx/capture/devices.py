"""Makes an exported graph run on the device of its inputs: torch.export records the device on which it ran."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate


def follow_inputs(graph_module: fx.GraphModule) -> None:
    """Replace the recorded device of the first tensor input by its present one, in the graph and its subgraphs."""
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule) and _follow(module.graph):
            module.recompile()


def _follow(graph: fx.Graph) -> bool:
    source = _first_tensor(graph)
    if source is None:
        return False
    named: torch.device = source.meta["val"].device
    readers = [node for node in graph.nodes if named in _leaves((node.args, node.kwargs))]
    if readers:
        with graph.inserting_after(source):
            device = graph.call_function(getattr, (source, "device"))
        for node in readers:
            node.args = map_aggregate(node.args, lambda leaf: device if leaf == named else leaf)
            node.kwargs = map_aggregate(node.kwargs, lambda leaf: device if leaf == named else leaf)
    return bool(readers)


def _first_tensor(graph: fx.Graph) -> fx.Node | None:
    """The first input, or item of an input, that torch.export recorded as a tensor."""
    return next((node for node in graph.nodes if _is_input(node) and isinstance(node.meta.get("val"), Tensor)), None)


def _is_input(node: fx.Node) -> bool:
    """Whether a node is an input or an item of one."""
    picked = node.target is operator.getitem and isinstance(node.args[0], fx.Node)
    return node.op == "placeholder" or (picked and _is_input(node.args[0]))  # type: ignore[arg-type]


def _leaves(arguments: Any) -> list[Any]:
    found: list[Any] = []
    map_aggregate(arguments, lambda leaf: found.append(leaf))
    return found
