"""Values whose features are last in memory, as those of pointwise convolutions that are computed as products.

What reads such a value must not depend on the order in memory: `view` does, and so may whoever gets the outputs.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.node import map_arg

from balf_fx.graph.annotation import annotation, carried_meta
from balf_fx.graph.operators import changes_in_place, operation

_VIEWS = ("view", "_unsafe_view")
_BY_SIZES = {"view_as": "view", "reshape_as": "reshape", "expand_as": "expand"}
_STRIDED = ("view_as_complex", "as_strided", "stride")
_PERMUTED = ("permute", "transpose", "movedim", "t", "expand")
_ALIASES = (
    *_VIEWS,
    *_PERMUTED,
    "getitem",
    "slice",
    "select",
    "narrow",
    "split",
    "chunk",
    "unbind",
    "squeeze",
    "unsqueeze",
)


def depends_on_layout(graph_module: fx.GraphModule) -> bool:
    """Whether a value is changed through a view of it, which would be a copy in another order of memory."""
    aliases: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        reads_alias = any(source in aliases for source in node.all_input_nodes)
        if reads_alias and changes_in_place(graph_module, node):
            return True
        if operation(node) in _VIEWS or (reads_alias and operation(node) in _ALIASES):
            aliases.add(node)
    return False


def views_to_reshapes(graph: fx.Graph) -> None:
    """Let views copy where they must, in a graph that changes no values through them; the caller recompiles it."""
    for node in graph.nodes:
        if operation(node) in _VIEWS and not any(isinstance(value, torch.dtype) for value in node.args):
            sizes = node.args[1:]
            with graph.inserting_before(node):
                if node.op == "call_method":
                    new = graph.call_method("reshape", (node.args[0], *sizes))
                else:
                    new = graph.call_function(torch.ops.aten.reshape.default, node.args)
            new.meta = node.meta
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def read_sizes(graph: fx.Graph) -> None:
    """Let calls such as `x.view_as(y)` read the sizes of y apart, and not its values; the caller recompiles it."""
    for node in graph.nodes:
        name = _BY_SIZES.get(operation(node))
        if name is None or node.kwargs or len(node.args) != 2:
            continue
        value, other = node.args
        with graph.inserting_before(node):
            sizes = graph.call_method("size", (other,))
            new = graph.call_method(name, (value, sizes))
        sizes.meta, new.meta = dict(node.meta), node.meta
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def allow_any_layout(graph_module: fx.GraphModule) -> None:
    """Let views copy where they must, and return outputs in the usual order; the caller recompiles the graph."""
    graph = graph_module.graph
    views_to_reshapes(graph)
    for node in list(graph.nodes):
        if operation(node) in _VIEWS or operation(node) in _STRIDED:  # a view of another type is left
            source = node.all_input_nodes[0]
            with graph.inserting_before(node):
                node.replace_input_with(source, _contiguous(graph, source))
    (output,) = graph.find_nodes(op="output")
    made: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(output):
        for node in dict.fromkeys(output.all_input_nodes):
            if len(annotation(node).shape or ()) > 2 and operation(node) not in _PERMUTED:
                made[node] = _contiguous(graph, node)
    output.args = map_arg(output.args, lambda node: made.get(node, node))


def _contiguous(graph: fx.Graph, node: fx.Node) -> fx.Node:
    made = graph.call_method("contiguous", (node,))
    made.meta = carried_meta(node, same_value=True)
    return made
