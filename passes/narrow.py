"""Rewrite the operations between layers whose widths were reduced."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from balf_fx.graph.annotation import GraphRecord, annotation, carried_meta, graph_record
from balf_fx.graph.layers import site_input
from balf_fx.graph.parameters import called_module, get_tensor, locate, put
from balf_fx.graph.widths import Operand, Reader, Width
from balf_fx.passes.base import Pass
from balf_fx.widths.elementwise import is_normalisation, is_separate, normalised_groups
from balf_fx.widths.heads import is_attention, requires_equal_heads
from balf_fx.widths.moves import rebuild, redirect, resize
from balf_fx.widths.narrowing import Cut, Narrowed, find_cuts

_ALIGNMENT = 8
"""The features at whose multiples kernels of attention may read heads on a GPU: 16 bytes in half precision. Elsewhere
these kernels fail, or the process loses the device."""


@dataclass(frozen=True)
class Narrow(Pass):
    """Apply the allocation's sizes to what is not a layer: constants between layers, reshapes, and attention.

    Constants along the features lose the entries of the removed features. A layer of which only some outputs are
    narrowed, or several separately, returns these parts one after another; what read them in the old layer reads them
    from a split of the new one. Attention products read their heads from new views of the narrower layers' outputs, and
    output projections read a new view of the products' outputs. `Factorize` replaces the layers themselves and must run
    next: between the two passes the graph cannot run.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        record = graph_record(graph_module)
        cuts = {name: cut for name, cut in find_cuts(graph_module).items() if cut.rewires}
        nodes = {node.name: node for node in graph_module.graph.nodes}
        shrunk = [width for width in record.widths if record.size_of(width) < width.features]
        between = {name for width in record.all_widths for name in (*width.between, *width.fused)}
        for name in {_held_by(nodes[name]): name for name in cuts if name in between}.values():  # each target once
            node, written = nodes[name], cuts[name].written
            groups = normalised_groups(graph_module, node, 1)
            if node.op == "get_attr":
                _slice_constant(graph_module, node, written)
            elif node.op == "call_module" and (
                is_separate(graph_module, node, 1)
                or groups is not None
                or is_normalisation(graph_module, node, len(annotation(node).shape or ()) - 1)
            ):
                _reorder_module(graph_module, node, written[0])
            if groups is not None:
                _regroup(graph_module, node, written[0].total * groups // written[0].rows.numel())
        _resize(record, nodes, cuts, {width.key: record.size_of(width) for width in shrunk})
        attentions = [(width, nodes[width.product]) for width in shrunk if width.product is not None]
        products = dict.fromkeys(product for _, product in attentions)
        equal = {
            product for product in products if requires_equal_heads(product)
        }  # while the shapes are the original ones
        for name, cut in cuts.items():
            if cut.written:
                _rewire_outputs(record, nodes, name, cut)
        for width, product in attentions:
            _rewire_product(nodes, width, product)
        for product in filter(is_attention, products):
            own = [width for width, other in attentions if other is product]
            _suit_kernels(record, product, own, product in equal, cuts)
        return PassResult(graph_module, bool(cuts))


def _resize(
    record: GraphRecord, nodes: Mapping[str, fx.Node], cuts: Mapping[str, Cut], sizes: Mapping[str, int]
) -> None:
    """Let nodes that read shapes see those of the original model, and reshapes return fewer features."""
    changed = [width for width in record.widths if any(name in cuts for name in width.layers)]
    for size in {size.node: size for width in changed for size in width.sizes}.values():
        redirect(nodes[size.node], nodes[size.source], size)
    for view, width in {view: own for own in changed for view in own.views}.items():
        if view.layer in cuts:
            resize(nodes[view.node], view.axis, sum(own.total for own in cuts[view.layer].written))
        elif width.key in sizes and not view.layer:
            resize(nodes[view.node], view.axis, sizes[width.key])


def _held_by(node: fx.Node) -> str:
    """What holds the entries for features: the same for all nodes with the same target, but not for functions."""
    return str(node.target) if node.op in ("get_attr", "call_module") else node.name


def _regroup(graph_module: fx.GraphModule, node: fx.Node, groups: int) -> None:
    """Let a GroupNorm whose entries have been left out normalise so many groups of features."""
    if node.op == "call_module":
        module: Any = called_module(graph_module, node)
        module.num_groups = groups
    elif "num_groups" in node.kwargs:
        node.update_kwarg("num_groups", groups)
    else:
        node.update_arg(1, groups)


def _slice_constant(graph_module: fx.GraphModule, node: fx.Node, written: Sequence[Narrowed]) -> None:
    path = str(node.target)
    value: Tensor = get_tensor(graph_module, path)
    axis = list(value.shape).index(sum(own.rows.numel() for own in written))
    moved = value.detach().movedim(axis, 0)
    thin = torch.cat([own.of(moved) for own in written]).movedim(0, axis).contiguous()
    module, name = locate(graph_module, path)
    if name in module._parameters:
        module.register_parameter(name, nn.Parameter(thin, requires_grad=value.requires_grad))
    elif name in module._buffers:
        module.register_buffer(name, thin, persistent=name not in module._non_persistent_buffers_set)
    else:
        setattr(module, name, thin)


def _reorder_module(graph_module: fx.GraphModule, node: fx.Node, reordered: Narrowed) -> None:
    """Reorder what a module holds for each feature, or leave some of it out."""
    module = copy.deepcopy(graph_module.get_submodule(str(node.target)))
    for name, value in list(module.named_parameters()):
        if value.numel() > 1:  # a PReLU may have one slope for all features
            new = nn.Parameter(reordered.of(value.detach()), requires_grad=value.requires_grad)
            module.register_parameter(name, new)
    for name, buffer in list(module.named_buffers()):
        if buffer.dim() > 0:
            module.register_buffer(name, reordered.of(buffer))
    for name in ("num_features", "num_parameters", "num_channels"):
        if getattr(module, name, 1) > 1:
            setattr(module, name, reordered.total)
    put(graph_module, str(node.target), module)


@dataclass
class _Parts:
    """The parts of a narrowed layer's output, from which they are split where they are read.

    Attributes:
        places: the index of the part with these rows.
        splits: the parts by the name of the value that is split.
    """

    cut: Cut
    places: Mapping[tuple[int, ...], int]
    splits: dict[str, list[fx.Node]] = field(default_factory=dict)

    def read(self, source: fx.Node, axis: int, rows: tuple[int, ...]) -> tuple[fx.Node, Narrowed]:
        """The node of one part of a value."""
        if source.name not in self.splits:
            graph, sizes = source.graph, [own.total for own in self.cut.written]
            pieces = [source]
            if len(sizes) > 1:
                with graph.inserting_before(source.next):
                    split = graph.call_function(torch.split, (source, sizes, axis))
                    pieces = [graph.call_function(operator.getitem, (split, i)) for i in range(len(sizes))]
            self.splits[source.name] = pieces
        index = self.places[rows]
        return self.splits[source.name][index], self.cut.written[index]


def _rewire_outputs(record: GraphRecord, nodes: Mapping[str, fx.Node], name: str, cut: Cut) -> None:
    """Let the readers of a layer's parts read these from its new output."""
    parts = _Parts(cut, {tuple(own.rows.flatten().tolist()): i for i, own in enumerate(cut.written)})
    readers: dict[str, Reader] = {reader.node: reader for reader in record.rests.get(name, ())}
    for width in record.widths:
        own_rows = [rows for producer, rows in zip(width.producers, width.rows, strict=True) if producer == name]
        own = (reader for reader in width.readers if name in reader.layers and reader.rows in own_rows)
        readers |= {reader.node: reader for reader in own}
        if width.product is None:
            continue
        for producer, rows, operand in zip(width.producers, width.rows, width.operands, strict=True):
            if producer == name:
                source, product = nodes[operand.source or name], nodes[width.product]
                piece, part = parts.read(source, len(annotation(source).shape or ()) - 1, rows)
                with product.graph.inserting_before(product):
                    view = _heads(product.graph, piece, part, operand, width.sequence_first)
                _replace_argument(product, operand.position, view)
    for reader in readers.values():
        node = nodes[reader.node]
        if reader.source not in parts.splits and node._erased:
            continue
        piece, part = parts.read(nodes[reader.source], reader.axis, reader.rows)
        sizes = reader.sizes if len(reader.sizes) > 1 else (part.total,)
        with node.graph.inserting_before(node):
            new = rebuild(node.graph, piece, reader.axis, sizes, reader.axes)
        node.replace_all_uses_with(new)
        _erase_unused(node)


def _replace_argument(node: fx.Node, position: int, value: fx.Node) -> None:
    """Let a node read another value, and erase the nodes that only computed the old one."""
    old = node.args[position]
    node.update_arg(position, value)
    _erase_unused(old)


def _erase_unused(*values: Any) -> None:
    """Erase values without readers, and those that only computed them."""
    pending = list(values)
    while pending:
        old = pending.pop()
        erasable = isinstance(old, fx.Node) and old.op in ("call_function", "call_method", "call_module")
        if erasable and not old._erased and not old.users:
            pending += old.all_input_nodes
            old.graph.erase_node(old)


def _heads(graph: fx.Graph, piece: fx.Node, part: Narrowed, operand: Operand, sequence_first: bool) -> fx.Node:
    """View a part of a layer's output as [..., heads, positions, features], as the product reads it."""
    view = graph.call_method("unflatten", (piece, -1, (len(part.rows), part.size)))
    moved: tuple[Any, ...] = ("movedim", 0, -2) if sequence_first else ("transpose", -3, -2)
    view = graph.call_method(moved[0], (view, *moved[1:]))
    if operand.copies > 1:
        view = graph.call_method("repeat_interleave", (view, operand.copies, -3))
    if operand.merged:
        view = graph.call_method("flatten", (view, 0, 1))
    if operand.scale != 1.0:
        view = graph.call_function(operator.mul, (view, operand.scale))
    return graph.call_method("transpose", (view, -2, -1)) if operand.transposed else view


def _rewire_product(nodes: Mapping[str, fx.Node], width: Width, product: fx.Node) -> None:
    graph = product.graph
    if width.kind == "queries":
        if is_attention(product) and product.kwargs.get("scale") is None:
            product.kwargs = {**product.kwargs, "scale": width.features**-0.5}
        return
    reader, view = nodes[width.consumers[0]], product
    old = site_input(reader)
    moved: tuple[Any, ...] = ("movedim", -2, 0) if width.sequence_first else ("transpose", -3, -2)
    steps: list[tuple[Any, ...]] = [moved, ("flatten", -2)]
    if width.operands[0].merged:
        steps.insert(0, ("unflatten", 0, (-1, width.heads * width.repeat)))
    if len(annotation(old).shape or ()) == 2:  # the reader does not see the positions of a sample
        steps.append(("flatten", 0, -2))
    with graph.inserting_before(product.next):
        for name, *arguments in steps:
            view = graph.call_method(name, (view, *arguments))
            view.meta = carried_meta(product)
    reader.replace_input_with(old, view)  # also in a list, or by keyword
    _erase_unused(old)


def _suit_kernels(
    record: GraphRecord, product: fx.Node, widths: Sequence[Width], equal: bool, cuts: Mapping[str, Cut]
) -> None:
    """Give attention in one node its new heads in the sizes and at the addresses that its kernels require.

    Args:
        widths: those of its heads.
        equal: whether queries and values must have one size.
    """
    if equal:
        left = {width.kind: record.size_of(width) for width in widths}
        _pad_heads(product, *(left.get(kind, widths[0].features) for kind in ("queries", "values")))
    if any(_is_unaligned(cuts[name]) for width in widths for name in width.producers if name in cuts):
        _copy(product)


def _is_unaligned(cut: Cut) -> bool:
    """Whether parts of a layer's new output may start where kernels of attention cannot read them."""
    return len(cut.written) > 1 and sum(part.total for part in cut.written) % _ALIGNMENT > 0


def _copy(product: fx.Node) -> None:
    """Copy the operands of attention that are parts of a layer's output, which may start anywhere."""
    with product.graph.inserting_before(product):
        for position, operand in enumerate(product.args[:3]):
            if isinstance(operand, fx.Node) and operand.target is not F.pad:
                product.update_arg(position, product.graph.call_method("contiguous", (operand,)))


def _pad_heads(product: fx.Node, queries: int, values: int) -> None:
    """Pad the smaller heads with zeros, since attention is slow where queries and values differ in size."""
    graph = product.graph
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
