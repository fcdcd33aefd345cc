"""Rewrite each chosen site into two thinner stock modules."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.utils import skip_init

from balf_fx.errors import PassError
from balf_fx.linalg import corrected_bias, factors, in_parts, weight_matrix
from balf_fx.linear_maps import erase_unused, site_input
from balf_fx.passes.base import Pass
from balf_fx.passes.score import grouped_bias
from balf_fx.sites import (
    META_KEY,
    VALUE_META,
    ConvGeometry,
    PartRanks,
    RankCurve,
    Site,
    Spectrum,
    annotation,
    get_tensor,
)

Factors = nn.Sequential | nn.ModuleList
"""The two factors of a site, or the first and a list of the second ones where its parts have their own."""

_CONVS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


@dataclass(frozen=True)
class Factorize(Pass):
    """Replace every site that was given a rank by `name.0` (D -> r, the layer's own geometry) and `name.1` (r -> O).

    `name` becomes an nn.Sequential of the two, and the graph calls each of them in a node of its own. Where the parts
    of a site were given ranks of their own, `name.1` is a list of layers, one for each part: the graph splits what
    `name.0` returns and concatenates what they return; parts that stay dense read the input. Parameters keep dtype,
    device, memory format and requires_grad.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        for site, nodes in self.require_sites(graph_module).items():
            if annotation(nodes[0]).choice is None or annotation(nodes[0]).curve is None:
                raise PassError(f"Factorize: site {site.name!r} has no choice; run Score and Allocate first")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for site, nodes in self.require_sites(graph_module).items():
            mark = annotation(nodes[0])
            if mark.choice is None or mark.curve is None or mark.choice.chosen.rank is None:
                continue
            pair = factor_modules(graph_module, site, mark.curve, mark.choice.chosen.rank)
            replace_site(graph_module, nodes, site, pair)
            modified = True
        graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, modified)


def factor_modules(graph_module: fx.GraphModule, site: Site, curve: RankCurve, rank: int | PartRanks) -> Factors:
    """The stock modules that stand in for a site."""
    if isinstance(rank, tuple):
        return _parts_modules(graph_module, site, curve, rank)
    return _joint_modules(graph_module, site, curve.spectrum, rank)


def _joint_modules(graph_module: fx.GraphModule, site: Site, spectrum: Spectrum, rank: int) -> nn.Sequential:
    original: Tensor = get_tensor(graph_module, site.weight)
    left, right = factors(weight_matrix(original, site.groups, site.inputs_first), spectrum, rank)
    bias = corrected_bias(grouped_bias(graph_module, site), spectrum, rank)
    first, second = _empty_modules(site, original, rank, bias is not None)
    if site.conv is not None and site.inputs_first:  # [G, r, C_in / G, *kernel] -> [G, C_in / G, r, *kernel]
        right = right.reshape(*right.shape[:2], -1, math.prod(site.conv.kernel_size)).transpose(1, 2)
    _assign(first, "weight", right, original)
    _assign(second, "weight", left, original)
    if bias is not None:
        _assign(second, "bias", bias, original)
    return nn.Sequential(first, second).train(graph_module.training)


def _parts_modules(graph_module: fx.GraphModule, site: Site, curve: RankCurve, ranks: PartRanks) -> nn.ModuleList:
    """The layer that the thin parts of a linear site share, D -> sum of ranks, and one layer for each part."""
    if curve.parts is None:
        raise PassError(f"Factorize: the parts of site {site.name!r} were not scored")
    original: Tensor = get_tensor(graph_module, site.weight)
    weights = in_parts(weight_matrix(original, 1, site.inputs_first), site.parts)
    bias = grouped_bias(graph_module, site)
    biases = [None] * site.parts if bias is None else list(in_parts(bias, site.parts).unsqueeze(1))
    thin, layers = [], []
    for index, (rank, part_bias) in enumerate(zip(ranks, biases, strict=True)):
        weight, own = weights[index : index + 1], curve.parts.only(index)
        if rank is not None:
            weight, right = factors(weight, own, rank)
            part_bias = corrected_bias(part_bias, own, rank)
            thin.append(right)
        layer = _empty_linear(weight.shape[2], weight.shape[1], part_bias is not None, original)
        _assign(layer, "weight", weight, original)
        if part_bias is not None:
            _assign(layer, "bias", part_bias, original)
        layers.append(layer)
    first = _empty_linear(site.in_features, sum(rank or 0 for rank in ranks), False, original)
    _assign(first, "weight", torch.cat(thin, 1), original)
    return nn.ModuleList([first, nn.ModuleList(layers)]).train(graph_module.training)


def _empty_linear(inputs: int, outputs: int, bias: bool, original: Tensor) -> nn.Linear:
    build: Callable[..., nn.Linear] = skip_init  # an initialisation would only draw random numbers
    return build(nn.Linear, inputs, outputs, bias=bias, device=original.device, dtype=original.dtype)


def _empty_modules(site: Site, original: Tensor, rank: int, bias: bool) -> tuple[nn.Module, nn.Module]:
    """The modules with parameters of the right shape, dtype and device, but of no particular value."""
    build: Callable[..., nn.Module] = skip_init  # an initialisation would only draw random numbers
    options: dict[str, Any] = {"device": original.device, "dtype": original.dtype}
    outputs, thin = site.out_features * site.groups, rank * site.groups
    if site.conv is None:
        return _empty_linear(site.in_features, thin, False, original), _empty_linear(thin, outputs, bias, original)
    inputs = site.in_features * site.groups // math.prod(site.conv.kernel_size)
    transposed = site.conv.output_padding is not None
    geometry: dict[str, Any] = {
        "stride": site.conv.stride,
        "padding": _module_padding(site.conv),
        "dilation": site.conv.dilation,
        "padding_mode": site.conv.padding_mode,
    }
    if transposed:
        geometry["output_padding"] = site.conv.output_padding
    conv, conv_transpose = _CONVS[len(site.conv.kernel_size)]
    options["groups"] = site.groups
    kernel_size = site.conv.kernel_size
    first = build(conv_transpose if transposed else conv, inputs, thin, kernel_size, bias=False, **geometry, **options)
    return first, build(conv, thin, outputs, 1, bias=bias, **options)


def _module_padding(conv: ConvGeometry) -> str | tuple[int, ...]:
    """nn.Conv's own spelling: one amount per dimension, or 'same' where the two sides differ."""
    even = all(before == after for before, after in conv.padding)
    return tuple(before for before, _ in conv.padding) if even else "same"


def _assign(module: nn.Module, name: str, value: Tensor, original: Tensor) -> None:
    """Store a [G, a, b] or [G, O] result in the shape of the module's parameter and the likeness of the original."""
    tensor = value.reshape(module.get_parameter(name).shape).to(original.dtype)
    for layout in (torch.channels_last, torch.channels_last_3d):
        fits = original.dim() == (4 if layout is torch.channels_last else 5) == tensor.dim()
        if fits and original.is_contiguous(memory_format=layout) and not original.is_contiguous():
            tensor = tensor.contiguous(memory_format=layout)
    module.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=original.requires_grad))


def replace_site(graph_module: fx.GraphModule, nodes: Sequence[fx.Node], site: Site, pair: Factors) -> None:
    """Put the pair where the site's module or weight was, and calls of its layers where each of its nodes was.

    The caller lints and recompiles the graph.
    """
    graph = graph_module.graph
    if site.keeps_weight and site.bias is not None:  # the weight's module may stay, without a bias that nobody reads
        owner, _, name = site.bias.rpartition(".")
        graph_module.get_submodule(owner)._parameters.pop(name, None)
    owner, _, name = site.name.rpartition(".")
    graph_module.get_submodule(owner)._parameters.pop(name, None)
    setattr(graph_module.get_submodule(owner), name, pair)
    for node in nodes:
        before = node.prev
        with graph.inserting_before(node):
            thin = graph.call_module(f"{site.name}.0", (site_input(node),))
            wide = _second_calls(graph, f"{site.name}.1", site_input(node), thin, pair)
        new = before.next
        while new is not node:
            dropped = (META_KEY,) if new is wide else (META_KEY, *VALUE_META)
            new.meta = {key: value for key, value in node.meta.items() if key not in dropped}
            new = new.next
        node.replace_all_uses_with(wide)
        sources = [source for source in node.all_input_nodes if source is not site_input(node)]
        graph.erase_node(node)
        for source in sources:
            erase_unused(graph_module, source)


def _second_calls(graph: fx.Graph, path: str, source: fx.Node, thin: fx.Node, pair: Factors) -> fx.Node:
    """Calls of the second factors on the output of the first, and of parts that stay dense on the input itself."""
    if isinstance(pair, nn.Sequential):
        return graph.call_module(path, (thin,))
    first: Any = pair[0]
    layers: Any = pair[1]
    widths = [layer.in_features for layer in layers if layer.in_features < first.in_features]
    pieces = graph.call_function(torch.split, (thin, widths, -1))
    items = iter([graph.call_function(operator.getitem, (pieces, index)) for index in range(len(widths))])
    values = [next(items) if layer.in_features < first.in_features else source for layer in layers]
    parts = [graph.call_module(f"{path}.{index}", (value,)) for index, value in enumerate(values)]
    return graph.call_function(torch.cat, (parts, -1))
