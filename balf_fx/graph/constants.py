"""Values that a graph computes from its own parameters and buffers alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from balf_fx.graph.effects import effects
from balf_fx.graph.operators import changes_in_place
from balf_fx.graph.parameters import constant_nodes, get_tensor


def unchanged_constants(graph_module: fx.GraphModule) -> set[fx.Node]:
    """The `constant_nodes` that the model never changes, and that are computed from nothing that it changes."""
    constants = constant_nodes(graph_module)
    changed = _changed(graph_module, constants)
    constants -= changed
    paths = {node.target for node in changed if node.op == "get_attr"}
    found: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        held = node.op != "get_attr" or node.target not in paths
        if node in constants and held and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def evaluated(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of a constant node.

    Raises:
        NotConstantError: it is random.
    """
    with torch.no_grad(), Deterministic():  # type: ignore[no-untyped-call]
        return _evaluate(graph_module, node, {})


def expression(node: fx.Node) -> dict[fx.Node, None]:
    """The node and all nodes from which it is computed, in order of use."""
    found: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending += reversed(node.all_input_nodes)
    return found


def sources(node: fx.Node) -> list[fx.Node]:
    """The attributes from which a constant node is computed, in order of use."""
    return [each for each in expression(node) if each.op == "get_attr"]


class NotConstantError(Exception):
    """An operation is random or changes a tensor in place."""


class Deterministic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations that draw random numbers or change their arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags or func._schema.is_mutable:
            raise NotConstantError
        return func(*args, **(kwargs or {}))


def _changed(graph_module: fx.GraphModule, constants: set[fx.Node]) -> set[fx.Node]:
    """Constants that a node changes in place, perhaps through a view, and all nodes from which they are computed."""
    changes = [node for node in graph_module.graph.nodes if changes_in_place(graph_module, node) and node.args]
    changes += effects(graph_module.graph)
    targets = [node.args[0] for node in changes if node.args[0] in constants]
    return {source for target in targets if isinstance(target, fx.Node) for source in expression(target)}


def _evaluate(graph_module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Tensor:
    """The value of a constant node."""
    if node not in known:
        if node.op == "get_attr":
            known[node] = get_tensor(graph_module, str(node.target))
        else:
            args: Any = map_arg(node.args, lambda argument: _evaluate(graph_module, argument, known))
            kwargs: Any = map_arg(node.kwargs, lambda argument: _evaluate(graph_module, argument, known))
            if node.op == "call_method":
                known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                function: Any = node.target
                known[node] = function(*args, **kwargs)
    value: Tensor = known[node]
    return value
