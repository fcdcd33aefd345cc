"""Rewrite each chosen site into two thinner stock modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.utils import skip_init

from balf_fx.errors import PassError
from balf_fx.linalg import corrected_bias, factors, weight_matrix
from balf_fx.passes.base import Pass
from balf_fx.passes.score import grouped_bias
from balf_fx.sites import META_KEY, Site, Spectrum, annotation, get_tensor, site_input

_CONVS: dict[str, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
}
_VALUE_META = ("val", "example_value", "tensor_meta")  # describe the node's own output, which the first factor lacks


@dataclass(frozen=True)
class Factorize(Pass):
    """Replace every site that was given a rank by `name.0` (D -> r, the layer's own geometry) and `name.1` (r -> O).

    `name` becomes an nn.Sequential of the two, and the graph calls each of them in a node of its own. Parameters keep
    dtype, device, memory format and requires_grad.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        for node, site in self.require_sites(graph_module):
            if annotation(node).choice is None or annotation(node).spectrum is None:
                raise PassError(f"Factorize: site {site.name!r} has no choice; run Score and Allocate first")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node, site in self.require_sites(graph_module):
            mark = annotation(node)
            if mark.choice is None or mark.spectrum is None or mark.choice.chosen.rank is None:
                continue
            pair = factor_modules(graph_module, site, mark.spectrum, mark.choice.chosen.rank)
            _replace(graph_module, node, site, pair)
            modified = True
        graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, modified)


def factor_modules(graph_module: fx.GraphModule, site: Site, spectrum: Spectrum, rank: int) -> nn.Sequential:
    """The two stock modules that stand in for a site."""
    original: Tensor = get_tensor(graph_module, site.weight)
    weight = weight_matrix(original, site.groups)
    left, right = factors(weight, spectrum, rank)
    bias = corrected_bias(grouped_bias(graph_module, site), spectrum, rank)
    outputs, inputs, thin = original.shape[0], original.shape[1] * site.groups, rank * site.groups
    options: dict[str, Any] = {"device": original.device, "dtype": original.dtype}
    build: Callable[..., nn.Module] = skip_init  # an initialisation would only draw random numbers
    if site.conv is None:
        first = build(nn.Linear, inputs, thin, bias=False, **options)
        second = build(nn.Linear, thin, outputs, bias=bias is not None, **options)
    else:
        conv = _CONVS[site.kind]
        geometry = {
            "stride": site.conv.stride,
            "padding": _module_padding(site),
            "dilation": site.conv.dilation,
            "padding_mode": site.conv.padding_mode,
        }
        options["groups"] = site.groups
        first = build(conv, inputs, thin, site.conv.kernel_size, bias=False, **geometry, **options)
        second = build(conv, thin, outputs, 1, bias=bias is not None, **options)
    _assign(first, "weight", right, original)
    _assign(second, "weight", left, original)
    if bias is not None:
        _assign(second, "bias", bias, original)
    return nn.Sequential(first, second).train(graph_module.training)


def _module_padding(site: Site) -> str | tuple[int, ...]:
    """nn.Conv's own spelling: one amount per dimension, or 'same' where the two sides differ."""
    pairs = () if site.conv is None else site.conv.padding
    return tuple(before for before, _ in pairs) if all(before == after for before, after in pairs) else "same"


def _assign(module: nn.Module, name: str, value: Tensor, original: Tensor) -> None:
    """Store a [G, a, b] or [G, O] result in the shape of the module's parameter and the likeness of the original."""
    tensor = value.reshape(module.get_parameter(name).shape).to(original.dtype)
    for layout in (torch.channels_last, torch.channels_last_3d):
        fits = original.dim() == (4 if layout is torch.channels_last else 5) == tensor.dim()
        if fits and original.is_contiguous(memory_format=layout) and not original.is_contiguous():
            tensor = tensor.contiguous(memory_format=layout)
    module.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=original.requires_grad))


def _replace(graph_module: fx.GraphModule, node: fx.Node, site: Site, pair: nn.Sequential) -> None:
    graph = graph_module.graph
    for path in (site.weight, site.bias):
        if path is not None:
            owner, _, name = path.rpartition(".")
            delattr(graph_module.get_submodule(owner), name)
    owner, _, name = site.name.rpartition(".")
    setattr(graph_module.get_submodule(owner), name, pair)
    with graph.inserting_before(node):
        thin = graph.call_module(f"{site.name}.0", (site_input(node),))
        wide = graph.call_module(f"{site.name}.1", (thin,))
    for new, dropped in ((thin, _VALUE_META), (wide, ())):
        new.meta = {key: value for key, value in node.meta.items() if key != META_KEY and key not in dropped}
    weights = [source for source in node.all_input_nodes if source.op == "get_attr"]
    node.replace_all_uses_with(wide)
    graph.erase_node(node)
    for source in weights:
        graph.erase_node(source)
