"""Rewrite each chosen site into two thinner stock modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.utils import skip_init

from balf_fx.errors import PassError
from balf_fx.linalg import corrected_bias, factors, weight_matrix
from balf_fx.linear_maps import erase_unused, site_input
from balf_fx.passes.base import Pass
from balf_fx.passes.score import grouped_bias
from balf_fx.sites import META_KEY, VALUE_META, ConvGeometry, Site, Spectrum, annotation, get_tensor

_CONVS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


@dataclass(frozen=True)
class Factorize(Pass):
    """Replace every site that was given a rank by `name.0` (D -> r, the layer's own geometry) and `name.1` (r -> O).

    `name` becomes an nn.Sequential of the two, and the graph calls each of them in a node of its own. Parameters keep
    dtype, device, memory format and requires_grad.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        for site, nodes in self.require_sites(graph_module).items():
            if annotation(nodes[0]).choice is None or annotation(nodes[0]).spectrum is None:
                raise PassError(f"Factorize: site {site.name!r} has no choice; run Score and Allocate first")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for site, nodes in self.require_sites(graph_module).items():
            mark = annotation(nodes[0])
            if mark.choice is None or mark.spectrum is None or mark.choice.chosen.rank is None:
                continue
            pair = factor_modules(graph_module, site, mark.spectrum, mark.choice.chosen.rank)
            replace_site(graph_module, nodes, site, pair)
            modified = True
        graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, modified)


def factor_modules(graph_module: fx.GraphModule, site: Site, spectrum: Spectrum, rank: int) -> nn.Sequential:
    """The two stock modules that stand in for a site."""
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


def _empty_modules(site: Site, original: Tensor, rank: int, bias: bool) -> tuple[nn.Module, nn.Module]:
    """The modules with parameters of the right shape, dtype and device, but of no particular value."""
    build: Callable[..., nn.Module] = skip_init  # an initialisation would only draw random numbers
    options: dict[str, Any] = {"device": original.device, "dtype": original.dtype}
    outputs, thin = site.out_features * site.groups, rank * site.groups
    if site.conv is None:
        first = build(nn.Linear, site.in_features, thin, bias=False, **options)
        return first, build(nn.Linear, thin, outputs, bias=bias, **options)
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


def replace_site(graph_module: fx.GraphModule, nodes: Sequence[fx.Node], site: Site, pair: nn.Sequential) -> None:
    """Put the pair where the site's module or weight was, and two calls where each of its nodes was.

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
        with graph.inserting_before(node):
            thin = graph.call_module(f"{site.name}.0", (site_input(node),))
            wide = graph.call_module(f"{site.name}.1", (thin,))
        for new, dropped in ((thin, VALUE_META), (wide, ())):
            new.meta = {key: value for key, value in node.meta.items() if key != META_KEY and key not in dropped}
        node.replace_all_uses_with(wide)
        sources = [source for source in node.all_input_nodes if source is not site_input(node)]
        graph.erase_node(node)
        for source in sources:
            erase_unused(graph_module, source)
