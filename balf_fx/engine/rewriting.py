"""Carry an allocation out, and leave a plain module."""

from __future__ import annotations

from torch import fx

from balf_fx.capture.devices import follow_inputs
from balf_fx.graph.annotation import META_KEY, VALUE_META
from balf_fx.graph.plan import PLAN_ATTRIBUTE, Plan
from balf_fx.passes import Factorize, Narrow
from balf_fx.passes.observe import remove_observers


def rewrite(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Carry an allocation out."""
    remove_observers(graph_module)
    Narrow()(graph_module)
    Factorize()(graph_module)
    graph_module.recompile()
    return graph_module


def finish(graph_module: fx.GraphModule, done: Plan) -> fx.GraphModule:
    """Leave a plain module with its plan: as plain data, so that a copy loads where balf_fx is not installed."""
    follow_inputs(graph_module)
    for node in graph_module.graph.nodes:
        for key in (META_KEY, *VALUE_META):  # narrower layers return other shapes than capture wrote down
            node.meta.pop(key, None)
    graph_module.meta[META_KEY] = graph_module.__dict__[PLAN_ATTRIBUTE] = done.to_dict()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module
