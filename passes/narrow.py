"""Rewrite the operations between layers whose widths were reduced."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from balf_fx.graph.annotation import carried_meta, graph_record
from balf_fx.graph.parameters import get_tensor, locate
from balf_fx.graph.widths import Operand, Width
from balf_fx.passes.base import Pass
from balf_fx.widths.heads import has_level_heads, is_attention
from balf_fx.widths.narrowing import Cut, Narrowed, find_cuts


@dataclass(frozen=True)
class Narrow(Pass):
    """Apply the allocation's sizes to what is not a layer: constants between layers, and attention.

    Constants along the features lose the entries of the removed features. Attention products read their heads from new
    views of the narrower layers' outputs, and output projections read a new view of the products' outputs. `Factorize`
    replaces the layers themselves and must run next: between the two passes the graph cannot run.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        record = graph_record(graph_module)
        cuts = find_cuts(graph_module)
        nodes = {node.name: node for node in graph_module.graph.nodes}
        for width in record.widths:
            for name in width.between:
                if nodes[name].op == "get_attr" and name in cuts:
                    _slice_constant(graph_module, nodes[name], width.features, cuts[name].written[0])
        sizes = {} if record.allocation is None else record.allocation.sizes
        heads = [(width, nodes[width.product]) for width in record.widths if width.product is not None]
        shrunk = [(width, product) for width, product in heads if sizes.get(width.key, width.features) < width.features]
        level = [product for product in dict.fromkeys(product for _, product in shrunk) if has_level_heads(product)]
        for name in dict.fromkeys(name for width, _ in heads for name in width.producers):
            if name in cuts and cuts[name].written:
                _rewire_producer(nodes[name], heads, cuts[name])
        for width, product in shrunk:
            _rewire_product(nodes, width, product)
        for product in level:
            own = [width for width, other in shrunk if other is product]
            left = {width.kind: sizes[width.key] for width in own}
            full = own[0].features
            _level(graph_module.graph, product, left.get("queries", full), left.get("values", full))
        return PassResult(graph_module, bool(cuts))


def _slice_constant(graph_module: fx.GraphModule, node: fx.Node, features: int, narrowed: Narrowed) -> None:
    path = str(node.target)
    value: Tensor = get_tensor(graph_module, path)
    axis = list(value.shape).index(features)
    thin = narrowed.of(value.detach().movedim(axis, 0)).movedim(0, axis).contiguous()
    module, name = locate(graph_module, path)
    if name in module._parameters:
        module.register_parameter(name, nn.Parameter(thin, requires_grad=value.requires_grad))
    elif name in module._buffers:
        module.register_buffer(name, thin, persistent=name not in module._non_persistent_buffers_set)
    else:
        setattr(module, name, thin)


def _rewire_producer(layer: fx.Node, widths: Sequence[tuple[Width, fx.Node]], cut: Cut) -> None:
    """Let products read their heads from a layer that returns them one after another, in the order of `Cut.written`."""
    graph = layer.graph
    reads = [
        (width, operand, product)
        for width, product in widths
        for name, operand in zip(width.producers, width.operands, strict=True)
        if name == layer.name
    ]
    heads = [(len(own.rows), own.maps.shape[1]) for own in cut.written]
    anchor = layer.next
    with graph.inserting_before(anchor):
        pieces: list[fx.Node] = [layer]
        if len(heads) > 1:
            split = graph.call_function(torch.split, (layer, [count * size for count, size in heads], -1))
            pieces = [graph.call_function(operator.getitem, (split, i)) for i in range(len(heads))]
        for (width, operand, product), piece, (count, size) in zip(reads, pieces, heads, strict=True):
            view = _heads(graph, piece, count, size, operand, width.sequence_first)
            _replace_argument(product, operand.position, view)


def _replace_argument(node: fx.Node, position: int, value: fx.Node) -> None:
    """Let a node read another value, and erase the nodes that only computed the old one."""
    pending = [node.args[position]]
    node.update_arg(position, value)
    while pending:
        old = pending.pop()
        if isinstance(old, fx.Node) and not old.users and old.op in ("call_function", "call_method", "call_module"):
            pending += old.all_input_nodes
            node.graph.erase_node(old)


def _heads(graph: fx.Graph, value: fx.Node, count: int, size: int, operand: Operand, sequence_first: bool) -> fx.Node:
    """View a layer's output as [..., heads, positions, features], transposed where the product reads it so."""
    view = graph.call_method("unflatten", (value, -1, (count, size)))
    moved: tuple[Any, ...] = ("movedim", 0, -2) if sequence_first else ("transpose", -3, -2)
    view = graph.call_method(moved[0], (view, *moved[1:]))
    if operand.copies > 1:
        view = graph.call_method("repeat_interleave", (view, operand.copies, -3))
    if operand.scale != 1.0:
        view = graph.call_function(operator.mul, (view, operand.scale))
    return graph.call_method("transpose", (view, -2, -1)) if operand.transposed else view


def _rewire_product(nodes: Mapping[str, fx.Node], width: Width, product: fx.Node) -> None:
    graph = product.graph
    if width.kind == "queries":
        if is_attention(product) and product.kwargs.get("scale") is None:
            product.kwargs = {**product.kwargs, "scale": width.features**-0.5}
        return
    reader = nodes[width.consumers[0]]
    with graph.inserting_after(product):
        moved: tuple[Any, ...] = ("movedim", -2, 0) if width.sequence_first else ("transpose", -3, -2)
        view = graph.call_method(moved[0], (product, *moved[1:]))
    with graph.inserting_after(view):
        flat = graph.call_method("flatten", (view, -2))
    for node in (view, flat):
        node.meta = carried_meta(product)
    _replace_argument(reader, 0, flat)


def _level(graph: fx.Graph, product: fx.Node, queries: int, values: int) -> None:
    """Pad the smaller heads with zeros, since attention is slow where queries and values differ in size."""
    with graph.inserting_before(product):
        for position in (0, 1) if queries < values else (2,) if values < queries else ():
            padded = graph.call_function(F.pad, (product.args[position], (0, abs(values - queries))))
            product.update_arg(position, padded)
    if values < queries:
        index: Any = (..., slice(None, values))
        with graph.inserting_after(product):
            kept = graph.call_function(operator.getitem, (product, index))
        kept.meta = carried_meta(product)
        product.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)
