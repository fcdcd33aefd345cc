"""Finds the layers whose outputs choose experts, and the operations that choose."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

from torch import fx

from balf_fx.graph.annotation import annotation
from balf_fx.graph.experts import read_experts
from balf_fx.graph.operators import operation, reads_metadata

WITH_VALUES = ("topk", "sort")
"""Operations that return some of their input's values, and where they were."""

PLACES_ONLY = ("argmax", "argmin", "argsort")
"""Operations that return only where values were."""

_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "any", "logical_and", "logical_or", "bitwise_and", "and")


def chooses(node: fx.Node) -> bool:
    """Whether a node chooses some of its values by their order, and the graph reads where they were."""
    name = operation(node)
    read = any(user.target is not operator.getitem or (user.args[1] == 1 and user.users) for user in node.users)
    return name in PLACES_ONLY or (name in WITH_VALUES and read)


def routers(graph_module: fx.GraphModule, layers: Iterable[fx.Node]) -> set[fx.Node]:
    """The layers by whose outputs the graph chooses the expert of each row.

    Rows are assigned by the ids or ends of a product with experts, or selected by their positions for a separate layer.
    """
    stops, found = set(layers), set()
    pending = [(node, False) for start in graph_module.graph.nodes for node in _selections(start)]
    seen: set[tuple[fx.Node, bool]] = set()
    while pending:
        node, chosen = pending.pop()
        if (node, chosen) in seen or reads_metadata(node) or annotation(node).number is not None:
            continue
        seen.add((node, chosen))
        if node in stops:
            found |= {node} if chosen else set()
            continue
        chosen = chosen or chooses(node)
        pending += [(source, chosen) for source in node.all_input_nodes]
    return found


def _selections(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that say which rows a node selects or assigns to experts."""
    product = read_experts(node)
    if product is not None and product.assignment is not None:
        yield product.assignment
    name = operation(node)
    if name == "nonzero" or (name == "where" and len(node.args) == 1):
        yield from node.all_input_nodes
    if name in ("getitem", "index", "masked_select") and len(node.args) == 2:
        yield from (index for index in node.all_input_nodes[1:] if operation(index) in _COMPARISONS)
