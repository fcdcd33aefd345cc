"""The modules that replace one layer, and the edit of a graph that inserts them."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from balf_fx.graph.annotation import carried_meta
from balf_fx.graph.curves import Divided, PartRanks, Solution
from balf_fx.graph.edits import MODULE_STACK, erase_unused, module_stack
from balf_fx.graph.expert_factors import ExpertFactors, build_experts
from balf_fx.graph.experts import read_experts
from balf_fx.graph.layers import site_input
from balf_fx.graph.parameters import get_tensor, locate, put
from balf_fx.graph.pivoted import ORDER, ROWS, Blocks, Columns, Rows, feature_axis, gather_rows, holder
from balf_fx.graph.site import ConvGeometry, Site

_CONVS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


@dataclass(frozen=True)
class Substitute:
    """Stock modules that replace a layer, or its parts if these have separate ranks.

    Attributes:
        module: the module at the layer's path: a single layer if nothing is factorized; else an nn.Sequential of
            `first` and the second layer or, for parts, an nn.ModuleList of `first` and an nn.ModuleList of the second
            layers.
        first: the layer from D inputs to the ranks of all parts together; None if nothing is factorized.
        second: the layer of each part from its rank, or from D inputs, to its outputs.
        ranks: the rank of each part; None if it is dense and reads the layer's input.
    """

    module: nn.Module
    first: nn.Module | None
    second: tuple[nn.Module, ...]
    ranks: PartRanks

    @property
    def biased(self) -> tuple[bool, ...]:
        """Whether each part has a bias."""
        return tuple(layer.bias is not None for layer in self.second)

    @property
    def widths(self) -> list[int]:
        """The ranks of the parts that are factorized."""
        return [rank for rank in self.ranks if rank is not None]

    def insert_calls(self, graph: fx.Graph, path: str, node: fx.Node) -> fx.Node:
        """Insert calls of the modules at the graph's insertion point; returns the node of the layer's output."""
        source = site_input(node)
        if self.first is None:
            return graph.call_module(path, (source,))
        thin = graph.call_module(f"{path}.0", (source,))
        if len(self.second) == 1:
            return graph.call_module(f"{path}.1", (thin,))
        split = graph.call_function(torch.split, (thin, self.widths, -1))
        pieces = iter([graph.call_function(operator.getitem, (split, i)) for i in range(len(self.widths))])
        values = [source if rank is None else next(pieces) for rank in self.ranks]
        parts = [graph.call_module(f"{path}.1.{index}", (value,)) for index, value in enumerate(values)]
        return graph.call_function(torch.cat, (parts, -1))

    def run(self, value: Tensor) -> Tensor:
        """The output of the modules."""
        return self.run_second(self.run_first(value))

    def run_first(self, value: Tensor) -> tuple[Tensor, ...]:
        """The output of each part's first factor, or of the part itself if it is dense."""
        if self.first is None:
            return (self.second[0](value),)
        thin = self.first(value)
        if len(self.second) == 1:
            return (thin,)
        pieces = iter(thin.split(self.widths, -1))
        layers = zip(self.second, self.ranks, strict=True)
        return tuple(layer(value) if rank is None else next(pieces) for layer, rank in layers)

    def run_second(self, values: Sequence[Tensor]) -> Tensor:
        """The output of the whole layer, from the values of `run_first`."""
        layers = zip(self.second, values, self.ranks, strict=True)
        outputs = [value if rank is None else layer(value) for layer, value, rank in layers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


AnySubstitute = Substitute | Rows | Columns | Blocks | ExpertFactors


def features_last(substitute: AnySubstitute) -> bool:
    """Whether its output has the features of a convolution last in memory (`graph.layouts`)."""
    return isinstance(substitute, Columns) and substitute.axis != -1


def build(graph_module: fx.GraphModule, site: Site, solution: Sequence[Solution]) -> AnySubstitute:
    """The modules that compute a solution of a site, with one item or one for each part."""
    original: Tensor = get_tensor(graph_module, site.weight)
    if site.has_experts:
        return build_experts(original, site, solution[0])
    forms = {part.form for part in solution}
    built: Substitute | Rows | Columns | Blocks
    if "blocks" in forms:
        built = _blocks(original, solution[0])
    elif "rows" in forms:
        built = _rows(site, original, solution)
    elif "columns" in forms:
        built = _columns(site, original, solution[0])
    elif len(solution) > 1:
        built = _parts(site, original, solution)
    elif solution[0].left is None:
        built = _dense(site, original, solution[0])
    elif solution[0].divided:
        built = _divided(site, original, solution[0], solution[0].left)
    else:
        built = _pair(site, original, solution[0], solution[0].left)
    built.module.train(graph_module.training)
    return built


def _dense(site: Site, original: Tensor, solution: Solution) -> Substitute:
    layer, _ = _empty_modules(site, original, site.out_features, False)
    if solution.bias is not None:
        layer.register_parameter("bias", nn.Parameter(original.new_empty(site.groups * site.out_features)))
        _assign(layer, "bias", solution.bias, original)
    _assign(layer, "weight", _kernel(site, solution.right), original)
    return Substitute(layer, None, (layer,), (None,))


def _pair(site: Site, original: Tensor, solution: Solution, left: Tensor) -> Substitute:
    first, second = _empty_modules(site, original, solution.right.shape[1], solution.bias is not None)
    _assign(first, "weight", _kernel(site, solution.right), original)
    _assign(second, "weight", left, original)
    if solution.bias is not None:
        _assign(second, "bias", solution.bias, original)
    return Substitute(nn.Sequential(first, second), first, (second,), (left.shape[-1],))


def _divided(site: Site, original: Tensor, solution: Solution, left: Tensor) -> Substitute:
    division: Divided = solution.form  # type: ignore[assignment]
    before, after = dataclasses.replace(site, divided=division).factor_convs
    rank, inputs = left.shape[-1], site.in_features // site.taps
    first = _empty_conv(nn.Conv2d, before, inputs, rank, original, bias=False)
    second = _empty_conv(nn.Conv2d, after, rank, site.out_features, original, bias=solution.bias is not None)
    _assign(first, "weight", solution.right, original)
    _assign(second, "weight", left.reshape(-1, solution.taps[1], rank).transpose(1, 2), original)
    if solution.bias is not None:
        _assign(second, "bias", solution.bias, original)
    return Substitute(nn.Sequential(first, second), first, (second,), (rank,))


def _rows(site: Site, original: Tensor, solution: Sequence[Solution]) -> Rows:
    """The modules for pivot rows; a part without a rank is a layer of its own."""
    thin = [part for part in solution if part.left is not None]
    rank = sum(part.right.shape[1] for part in thin)
    biased = any(part.bias is not None for part in thin)
    first, _ = _empty_modules(site, original, rank, False, first_bias=biased)
    _assign(first, "weight", _kernel(site, torch.cat([part.right for part in thin], 1)), original)
    if biased:
        _assign(first, "bias", torch.cat([_bias(part)[:, : part.right.shape[1]] for part in thin], 1), original)
    layers: list[nn.Module] = []
    for part in solution:
        own = 0 if part.left is None else part.left.shape[-1]
        weight = part.right if part.left is None else part.left
        fewer = dataclasses.replace(site, out_features=weight.shape[1])
        _, layer = _empty_modules(fewer, original, own or weight.shape[2], part.bias is not None)
        _assign(layer, "weight", weight, original)
        if part.bias is not None:
            _assign(layer, "bias", part.bias[:, own:], original)
        layers.append(layer)
    second = layers[0] if len(layers) == 1 else nn.ModuleList(layers)
    module = holder([first, second], gather_rows(solution, site.groups), original.device)
    ranks = tuple(None if part.left is None else part.left.shape[-1] for part in solution)
    return Rows(module, first, tuple(layers), ranks, feature_axis(site))


def _bias(part: Solution) -> Tensor:
    """The bias of a part, zero where it has none."""
    if part.bias is not None:
        return part.bias
    others = 0 if part.left is None else part.left.shape[1]
    return part.right.new_zeros(part.right.shape[0], part.right.shape[1] + others)


def _columns(site: Site, original: Tensor, solution: Solution) -> Columns:
    rank, others = solution.right.shape[1:]
    first = _empty_linear(others, rank, False, original)
    second = _empty_linear(rank, site.out_features, solution.bias is not None, original)
    _assign(first, "weight", solution.right, original)
    if solution.left is not None:
        _assign(second, "weight", solution.left, original)
    if solution.bias is not None:
        _assign(second, "bias", solution.bias, original)
    order = None if solution.order is None else solution.order[0]
    return Columns(holder([first, second], order, original.device), first, second, rank, others, feature_axis(site))


def _blocks(original: Tensor, solution: Solution) -> Blocks:
    weight = solution.right[0]
    order = torch.arange(weight.shape[1], device="cpu") if solution.order is None else solution.order[0].cpu()
    in_blocks = torch.cat([rows.flatten() for rows in solution.blocks])
    others = torch.ones(len(weight), dtype=torch.bool, device="cpu").index_fill(0, in_blocks, False).nonzero().flatten()
    layers = [(others, torch.arange(weight.shape[1], device="cpu"))] if len(others) else []
    layers += [(rows.flatten(), order[rows.shape[1] :]) for rows in solution.blocks]
    module = nn.ModuleList()
    for rows, columns in layers:
        layer = _empty_linear(len(columns), len(rows), solution.bias is not None, original)
        _assign(layer, "weight", weight[rows][:, columns], original)
        if solution.bias is not None:
            _assign(layer, "bias", solution.bias[0, rows], original)
        module.append(layer)
    if solution.order is not None:
        module.register_buffer(ORDER, order.to(original.device))
    places = torch.argsort(torch.cat([others, in_blocks]))
    if not torch.equal(places, torch.arange(len(places), device="cpu")):
        module.register_buffer(ROWS, places.to(original.device))
    heads = tuple((rows.shape[0], rows.shape[1]) for rows in solution.blocks)
    return Blocks(module, (solution.bias is not None,), heads, weight.shape[1], len(others) > 0)


def _parts(site: Site, original: Tensor, solution: Sequence[Solution]) -> Substitute:
    """The modules of a linear site with parts: a first layer, shared by the factorized parts, and one for each part."""
    layers = []
    for part in solution:
        weight = part.right if part.left is None else part.left
        layer = _empty_linear(weight.shape[2], weight.shape[1], part.bias is not None, original)
        _assign(layer, "weight", weight, original)
        if part.bias is not None:
            _assign(layer, "bias", part.bias, original)
        layers.append(layer)
    thin = torch.cat([part.right for part in solution if part.left is not None], 1)
    first = _empty_linear(site.in_features, thin.shape[1], False, original)
    _assign(first, "weight", thin, original)
    ranks = tuple(None if part.left is None else part.left.shape[-1] for part in solution)
    return Substitute(nn.ModuleList([first, nn.ModuleList(layers)]), first, tuple(layers), ranks)


def _kernel(site: Site, weight: Tensor) -> Tensor:
    """[G, r, D] in the order of the layer's own weight."""
    if site.conv is None or not site.inputs_first:
        return weight
    # [G, r, C_in / G, *kernel] -> [G, C_in / G, r, *kernel]
    return weight.reshape(*weight.shape[:2], -1, math.prod(site.conv.kernel_size)).transpose(1, 2)


def _empty_linear(inputs: int, outputs: int, bias: bool, original: Tensor) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, device="meta", dtype=original.dtype)


def _empty_conv(
    kind: type[nn.Module], conv: ConvGeometry, inputs: int, outputs: int, original: Tensor, **options: Any
) -> nn.Module:
    options |= {"stride": conv.stride, "padding": _module_padding(conv), "dilation": conv.dilation}
    return kind(inputs, outputs, conv.kernel_size, device="meta", dtype=original.dtype, **options)


def _empty_modules(
    site: Site, original: Tensor, rank: int, bias: bool, first_bias: bool = False
) -> tuple[nn.Module, nn.Module]:
    """The modules with parameters of the right shape and dtype, but without values, on the meta device."""
    outputs, thin = site.out_features * site.groups, rank * site.groups
    if site.conv is None:
        linear = _empty_linear(site.in_features, thin, first_bias, original)
        return linear, _empty_linear(thin, outputs, bias, original)
    inputs = site.in_features * site.groups // math.prod(site.conv.kernel_size)
    options: dict[str, Any] = {"groups": site.groups, "bias": first_bias, "padding_mode": site.conv.padding_mode}
    if site.transposed:
        options["output_padding"] = site.conv.output_padding
    kind, kind_transposed = _CONVS[len(site.conv.kernel_size)]
    first = _empty_conv(kind_transposed if site.transposed else kind, site.conv, inputs, thin, original, **options)
    second = kind(thin, outputs, 1, bias=bias, groups=site.groups, device="meta", dtype=original.dtype)
    return first, second


def _module_padding(conv: ConvGeometry) -> str | tuple[int, ...]:
    """The padding as an argument of nn.Conv: one number per dimension, or 'same' if the two sides differ."""
    even = all(before == after for before, after in conv.padding)
    return tuple(before for before, _ in conv.padding) if even else "same"


def _assign(module: nn.Module, name: str, value: Tensor, original: Tensor) -> None:
    """Store a [G, a, b] or [G, O] result as a module's parameter, with the properties of the original one."""
    tensor = value.reshape(module.get_parameter(name).shape).to(original.dtype)
    tensor = tensor.clone(memory_format=_memory_format(original, tensor.dim()))
    module.register_parameter(name, nn.Parameter(tensor, requires_grad=original.requires_grad))


def _memory_format(original: Tensor, dimensions: int) -> torch.memory_format:
    """The memory format of a kernel, also of one whose size is 1, for a new one with this number of dimensions."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(dimensions)
    if layout is None or original.dim() != dimensions or not original.is_contiguous(memory_format=layout):
        return torch.contiguous_format
    return layout if original.stride(1) < original.stride(-1) else torch.contiguous_format


def replace_site(graph_module: fx.GraphModule, nodes: Sequence[fx.Node], site: Site, substitute: AnySubstitute) -> None:
    """Replace the site's module or weight by the modules, and each of its nodes by calls of them.

    The caller lints and recompiles the graph.
    """
    graph = graph_module.graph
    if site.keeps_weight and site.bias is not None:  # the weight's module may stay, but its bias is no longer read
        owner, name = locate(graph_module, site.bias)
        owner._parameters.pop(name, None)
    owner, name = locate(graph_module, site.name)
    replaced = getattr(owner, name, None)
    put(graph_module, site.name, substitute.module)
    for node in nodes:
        before = node.prev
        with graph.inserting_before(node):
            wide = substitute.insert_calls(graph, site.name, node)
        new = before.next
        while new is not node:
            new.meta = carried_meta(node, same_value=new is wide)
            path = str(new.target) if new.op == "call_module" else site.name  # not the class of the layer itself
            new.meta[MODULE_STACK] = module_stack(graph_module, path, node, site.name)
            new = new.next
        node.replace_all_uses_with(wide)
        product = read_experts(node)
        sources = [source for source in node.all_input_nodes if source is not site_input(node)]
        links = () if product is None else product.links
        graph.erase_node(node)
        for source in sources:
            erase_unused(graph_module, source, links)
    if isinstance(replaced, nn.Module):
        _keep_what_is_read(graph, site.name, replaced, substitute.module)


def _keep_what_is_read(graph: fx.Graph, path: str, old: nn.Module, new: nn.Module) -> None:
    """Move to a layer's replacement what other nodes read: tensors and modules that are stored in the layer."""
    for node in graph.nodes:
        if node.op not in ("get_attr", "call_module") or not str(node.target).startswith(f"{path}."):
            continue
        name = str(node.target).removeprefix(f"{path}.").partition(".")[0]
        if not hasattr(new, name):
            value = getattr(old, name)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                new.register_buffer(name, value)
            else:
                setattr(new, name, value)
