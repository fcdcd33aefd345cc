"""What a graph writes to its inputs and buffers: held back while the graph is observed, and done by the result."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from balf_fx.graph.operators import aten

EFFECTS = "balf_effects"
"""Path of the submodule that holds the effects that are held back."""


class Effect(nn.Module):
    """Stands for a write of the second argument to the first, and does nothing.

    So a graph can be run many times on the same batch and from the same state.
    """

    _is_impure = True  # tells FX that dead-code elimination must keep the call

    def forward(self, target: Any, value: Any) -> None:
        """Do nothing."""


def add_effect(graph_module: fx.GraphModule, target: fx.Node, value: fx.Node) -> None:
    """Hold back a write at the place where nodes are inserted."""
    path = f"{EFFECTS}.{len(effects(graph_module.graph))}"
    graph_module.add_submodule(path, Effect())
    graph_module.graph.call_module(path, (target, value))


def effects(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that stand for writes."""
    return [node for node in graph.find_nodes(op="call_module") if str(node.target).startswith(f"{EFFECTS}.")]


def release_effects(graph_module: fx.GraphModule) -> None:
    """Let a graph write again; the caller recompiles it."""
    for node in effects(graph_module.graph):
        with graph_module.graph.inserting_before(node):
            graph_module.graph.call_function(aten.copy_.default, node.args)
        graph_module.graph.erase_node(node)
    if hasattr(graph_module, EFFECTS):
        graph_module.delete_submodule(EFFECTS)
