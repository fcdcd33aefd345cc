"""Linear layers between a reshape to rows and one back to positions, as torch writes multi-head attention.

Rows do not show which sample they belong to, nor which of them is padding.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.nn import functional as F

from balf_fx.graph.annotation import carried_meta
from balf_fx.graph.layers import read_layer, site_input
from balf_fx.graph.operators import aten, operation
from balf_fx.graph.site import Site

_LINEAR = (F.linear, aten.linear.default)
_RESHAPES = ("reshape", "view")


def restore_positions(graph_module: fx.GraphModule) -> None:
    """Let linear layers read all positions: they map each row by itself, so a reshape of rows may as well go first.

    The caller recompiles the graph.
    """
    graph = graph_module.graph
    for node in [each for each in graph.nodes if each.target in _LINEAR]:
        layer, source = read_layer(graph_module, node), site_input(node)
        reader = next(iter(node.users)) if len(node.users) == 1 else node
        sizes, rows = _sizes(reader), _sizes(source)
        if not isinstance(layer, Site) or len(sizes) < 3 or len(rows) != 2 or sizes[-1] != layer.out_features:
            continue
        with graph.inserting_before(reader):
            before = graph.call_function(aten.reshape.default, (source, [*sizes[:-1], layer.in_features]))
            new = graph.create_node("call_function", node.target, (before, *node.args[1:]), dict(node.kwargs))
        before.meta, new.meta = carried_meta(source), carried_meta(node)
        reader.replace_all_uses_with(new)
        graph.erase_node(reader)
        graph.erase_node(node)


def _sizes(node: fx.Node) -> list[Any]:
    """The sizes of a reshape; empty for other nodes."""
    if operation(node) not in _RESHAPES or node.kwargs:
        return []
    given = node.args[1] if len(node.args) == 2 else node.args[1:]
    return list(given) if isinstance(given, list | tuple) else []
