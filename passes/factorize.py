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
from balf_fx.graph.annotation import META_KEY, VALUE_META, Replaced, annotation, graph_record, record_graph
from balf_fx.graph.curves import PartRanks, Rank, RankCurve, Solution, Spectrum
from balf_fx.graph.edits import MODULE_STACK, erase_unused, module_stack
from balf_fx.graph.fingerprint import Fingerprint
from balf_fx.graph.layers import read_layer, site_input
from balf_fx.graph.parameters import get_tensor, grouped_bias, grouped_weight
from balf_fx.graph.site import ConvGeometry, Site
from balf_fx.passes.base import Pass
from balf_fx.ranks.spectra import corrected_bias, factors, in_parts
from balf_fx.widths.narrowing import Cut, find_cuts

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
        cuts = find_cuts(graph_module)
        found = self.require_sites(graph_module)
        layers: dict[Site, list[fx.Node]] = dict(found)
        for node in graph_module.graph.nodes:  # no rank would help these, but they may have been refitted or narrowed
            layer = read_layer(graph_module, node)
            changed = annotation(node).refit is not None or node.name in cuts
            if annotation(node).site is None and changed and isinstance(layer, Site):
                layers[layer] = [node]
        replaced: list[Replaced] = []
        for site, nodes in layers.items():
            mark, cut = annotation(nodes[0]), cuts.get(nodes[0].name)
            rank = None if mark.choice is None else mark.choice.chosen.rank
            if rank is None and cut is None and mark.refit is None:
                continue
            solution = mark.refit or planned(graph_module, nodes[0], site, cut)
            thin = site
            if cut is not None:
                solution, thin = (cut.narrow_outputs(solution[0]),), cut.outputs(cut.inputs(site))
            modules = build(graph_module, thin, solution)
            replaced.append(Replaced(site.name, rank, biased(modules), fingerprint(graph_module, site)))
            replace_site(graph_module, nodes, site, modules)
        graph_module.delete_all_unused_submodules()
        record_graph(graph_module, replaced=(*graph_record(graph_module).replaced, *replaced))
        return PassResult(graph_module, bool(replaced))


def fingerprint(graph_module: fx.GraphModule, site: Site) -> Fingerprint:
    """Of the layer as it is."""
    bias = None if site.bias is None else get_tensor(graph_module, site.bias)
    return Fingerprint.of(get_tensor(graph_module, site.weight), bias)


def planned(graph_module: fx.GraphModule, node: fx.Node, site: Site, cut: Cut | None) -> tuple[Solution, ...]:
    """A layer's one-shot solution for the rank and the features that it was given, at the size at which it writes."""
    mark = annotation(node)
    if mark.curve is None or mark.choice is None:
        solution: tuple[Solution, ...] = (
            Solution(None, grouped_weight(graph_module, site), grouped_bias(graph_module, site)),
        )
    else:
        solution = one_shot(graph_module, site, mark.curve, mark.choice.chosen.rank)
    return solution if cut is None or len(solution) > 1 else (cut.narrow_inputs(solution[0], site),)


def factor_modules(graph_module: fx.GraphModule, site: Site, curve: RankCurve, rank: int | PartRanks) -> nn.Module:
    """The stock modules that stand in for a site, by the one-shot optimum."""
    return build(graph_module, site, one_shot(graph_module, site, curve, rank))


def one_shot(graph_module: fx.GraphModule, site: Site, curve: RankCurve, rank: Rank) -> tuple[Solution, ...]:
    """The one-shot optimum: one solution, or one for each part where these have ranks of their own."""
    weight = grouped_weight(graph_module, site)
    bias = grouped_bias(graph_module, site)
    if not isinstance(rank, tuple):
        return (_one_shot(weight, bias, curve.spectrum, rank),)
    if curve.parts is None:
        raise PassError(f"Factorize: the parts of site {site.name!r} were not scored")
    weights = in_parts(weight, site.parts).unsqueeze(1)
    biases = [None] * site.parts if bias is None else list(in_parts(bias, site.parts).unsqueeze(1))
    spectra = [curve.parts.only(index) for index in range(site.parts)]
    return tuple(map(_one_shot, weights, biases, spectra, rank))


def _one_shot(weight: Tensor, bias: Tensor | None, spectrum: Spectrum, rank: int | None) -> Solution:
    if rank is None:
        return Solution(None, weight, bias)
    left, right = factors(weight, spectrum, rank)
    return Solution(left, right, corrected_bias(bias, spectrum, rank))


def build(graph_module: fx.GraphModule, site: Site, solution: Sequence[Solution]) -> nn.Module:
    """Stock modules: one layer for a dense solution, two for a pair of factors, a list for parts."""
    original: Tensor = get_tensor(graph_module, site.weight)
    module: nn.Module
    if len(solution) > 1:
        module = _parts_modules(site, original, solution)
    elif solution[0].left is None:
        module = _dense_module(site, original, solution[0])
    else:
        module = _joint_modules(site, original, solution[0], solution[0].left)
    return module.train(graph_module.training)


def _dense_module(site: Site, original: Tensor, solution: Solution) -> nn.Module:
    layer, _ = _empty_modules(site, original, site.out_features, False)
    if solution.bias is not None:
        layer.register_parameter("bias", nn.Parameter(original.new_empty(site.groups * site.out_features)))
        _assign(layer, "bias", solution.bias, original)
    _assign(layer, "weight", _kernel(site, solution.right), original)
    return layer


def _joint_modules(site: Site, original: Tensor, solution: Solution, left: Tensor) -> nn.Sequential:
    first, second = _empty_modules(site, original, solution.right.shape[1], solution.bias is not None)
    _assign(first, "weight", _kernel(site, solution.right), original)
    _assign(second, "weight", left, original)
    if solution.bias is not None:
        _assign(second, "bias", solution.bias, original)
    return nn.Sequential(first, second)


def _kernel(site: Site, weight: Tensor) -> Tensor:
    """[G, r, D] in the order of the layer's own weight."""
    if site.conv is None or not site.inputs_first:
        return weight
    # [G, r, C_in / G, *kernel] -> [G, C_in / G, r, *kernel]
    return weight.reshape(*weight.shape[:2], -1, math.prod(site.conv.kernel_size)).transpose(1, 2)


def _parts_modules(site: Site, original: Tensor, solution: Sequence[Solution]) -> nn.ModuleList:
    """The layer that the thin parts of a linear site share, D -> sum of ranks, and one layer for each part."""
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
    return nn.ModuleList([first, nn.ModuleList(layers)])


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
    layouts = [torch.contiguous_format]
    for layout in (torch.channels_last, torch.channels_last_3d):
        fits = original.dim() == (4 if layout is torch.channels_last else 5) == tensor.dim()
        if fits and original.is_contiguous(memory_format=layout) and not original.is_contiguous():
            layouts.append(layout)
    tensor = tensor.clone(memory_format=layouts[-1])
    module.register_parameter(name, nn.Parameter(tensor, requires_grad=original.requires_grad))


def replace_site(graph_module: fx.GraphModule, nodes: Sequence[fx.Node], site: Site, pair: nn.Module) -> None:
    """Put the modules where the site's module or weight was, and calls of them where each of its nodes was.

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
            wide = _calls(graph, site.name, site_input(node), pair)
        new = before.next
        while new is not node:
            dropped = (META_KEY,) if new is wide else (META_KEY, *VALUE_META)
            new.meta = {key: value for key, value in node.meta.items() if key not in dropped}
            if new.op == "call_module":
                new.meta[MODULE_STACK] = module_stack(graph_module, str(new.target), node, site.name)
            new = new.next
        node.replace_all_uses_with(wide)
        sources = [source for source in node.all_input_nodes if source is not site_input(node)]
        graph.erase_node(node)
        for source in sources:
            erase_unused(graph_module, source)


def _calls(graph: fx.Graph, path: str, source: fx.Node, modules: nn.Module) -> fx.Node:
    """Calls of what `build` returns; second factors read the output of the first, parts that stay dense the input."""
    if not isinstance(modules, nn.Sequential | nn.ModuleList):
        return graph.call_module(path, (source,))
    thin = graph.call_module(f"{path}.0", (source,))
    if isinstance(modules, nn.Sequential):
        return graph.call_module(f"{path}.1", (thin,))
    pieces = graph.call_function(torch.split, (thin, thin_widths(modules), -1))
    items = iter([graph.call_function(operator.getitem, (pieces, index)) for index in range(len(thin_widths(modules)))])
    values = [next(items) if is_thin else source for is_thin in thin_parts(modules)]
    parts = [graph.call_module(f"{path}.1.{index}", (value,)) for index, value in enumerate(values)]
    return graph.call_function(torch.cat, (parts, -1))


def run_modules(modules: nn.Module, value: Tensor) -> Tensor:
    """What the calls compute."""
    return run_second(modules, run_first(modules, value))


def run_first(modules: nn.Module, value: Tensor) -> tuple[Tensor, ...]:
    """What the first factor puts out for each part; what a part puts out that stays dense."""
    if isinstance(modules, nn.Sequential):
        return (modules[0](value),)
    if not isinstance(modules, nn.ModuleList):
        return (modules(value),)
    items = iter(modules[0](value).split(thin_widths(modules), -1))
    layers: Any = modules[1]
    flags = zip(layers, thin_parts(modules), strict=True)
    return tuple(next(items) if is_thin else layer(value) for layer, is_thin in flags)


def run_second(modules: nn.Module, values: Sequence[Tensor]) -> Tensor:
    """What the whole puts out, from what `run_first` returns."""
    if isinstance(modules, nn.Sequential):
        return modules[1](values[0])  # type: ignore[no-any-return]
    if not isinstance(modules, nn.ModuleList):
        return values[0]
    layers: Any = modules[1]
    flags = zip(layers, values, thin_parts(modules), strict=True)
    return torch.cat([layer(value) if is_thin else value for layer, value, is_thin in flags], -1)


def biased(modules: nn.Module) -> tuple[bool, ...]:
    """Of each part, one where there are none, whether it has a bias."""
    if not isinstance(modules, nn.Sequential | nn.ModuleList):
        return (modules.bias is not None,)
    second: Any = modules[1]
    return tuple(layer.bias is not None for layer in (second if isinstance(modules, nn.ModuleList) else [second]))


def thin_parts(modules: nn.ModuleList) -> list[bool]:
    """Which parts read the first factor: a rank is below the number of inputs."""
    first: Any = modules[0]
    layers: Any = modules[1]
    return [layer.in_features < first.in_features for layer in layers]


def thin_widths(modules: nn.ModuleList) -> list[int]:
    """The ranks of the parts that have factors."""
    layers: Any = modules[1]
    return [layer.in_features for layer, is_thin in zip(layers, thin_parts(modules), strict=True) if is_thin]
