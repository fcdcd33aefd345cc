"""Rewrite a graph by its allocation, or another graph of the model by a plan and its tensors."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx, nn

from balf_fx.calibration.observers import OBSERVERS
from balf_fx.calibration.pages import mapped
from balf_fx.capture.devices import follow_inputs
from balf_fx.errors import PlanError
from balf_fx.graph.annotation import (
    META_KEY,
    VALUE_META,
    Origin,
    Replaced,
    annotate,
    graph_record,
    record_graph,
    sites,
)
from balf_fx.graph.curves import Kept, Solution
from balf_fx.graph.effects import release_effects
from balf_fx.graph.layers import layers_of
from balf_fx.graph.layouts import allow_any_layout
from balf_fx.graph.parameters import get_tensor, put
from balf_fx.graph.pickling import keep_reads_of_buffers
from balf_fx.graph.plan import PLAN_ATTRIBUTE, Plan
from balf_fx.graph.site import Site
from balf_fx.graph.substitute import AnySubstitute, build, features_last, replace_site
from balf_fx.graph.widths import Width, WidthCurve
from balf_fx.passes import (
    Annotate,
    Factorize,
    FindPivots,
    FindWidths,
    FoldBatchNorm,
    FoldLayerScale,
    Follow,
    Narrow,
    Overwrite,
    Pivot,
    SplitBias,
)
from balf_fx.passes.factorize import reorder_tables
from balf_fx.passes.observe import remove_observers
from balf_fx.widths.layouts import find_constants, find_layouts
from balf_fx.widths.narrowing import Cut, find_cuts, hosted_rows

_LOGGER = logging.getLogger(__name__)


Written = Literal["pairs", "pivots", "apart"]
"""How low-rank maps are written: as pairs of factors; in the forms for which they were priced (`Pivot`); or in these,
with biases added apart (`SplitBias`)."""


def rewrite(
    graph_module: fx.GraphModule, written: Written, done: Callable[[nn.Module], None] | None = None
) -> fx.GraphModule:
    """Rewrite a graph by the allocation that is recorded in it.

    Args:
        written: how low-rank maps are written; in modules of the user's, biases stay in the layers.
        done: called with the modules that replace a layer once they are built, if given.
    """
    if hasattr(graph_module, OBSERVERS):
        remove_observers(graph_module)
    if sites(graph_module):
        if written != "pairs":
            Pivot()(graph_module)
        in_modules = graph_record(graph_module).modules is not None
        if in_modules:
            constants = find_constants(graph_module)
            record_graph(graph_module, layouts=find_layouts(graph_module), constants=constants)
        Narrow()(graph_module)
        Factorize(done)(graph_module)
        if written == "apart" and not in_modules:
            SplitBias()(graph_module)
    Overwrite()(graph_module)
    graph_module.recompile()
    return graph_module


def finish(graph_module: fx.GraphModule, done: Plan) -> fx.GraphModule:
    """Return a plain module that stores its plan as plain data, so that a copy loads where balf_fx is not installed."""
    follow_inputs(graph_module)
    release_effects(graph_module)
    keep_reads_of_buffers(graph_module)
    for node in graph_module.graph.nodes:
        for key in (META_KEY, *VALUE_META):  # narrower layers return other shapes than capture recorded
            node.meta.pop(key, None)
    graph_module.meta[META_KEY] = graph_module.__dict__[PLAN_ATTRIBUTE] = done.to_dict()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def with_plan(compressed: nn.Module, done: Plan) -> nn.Module:
    """Store the plan in a copy of the user's model, as `finish` does in a graph."""
    if isinstance(compressed, fx.GraphModule):
        compressed.meta[META_KEY] = done.to_dict()
    setattr(compressed, PLAN_ATTRIBUTE, done.to_dict())
    return compressed


def normalise(graph_module: fx.GraphModule, origin: Origin, partial: bool = False) -> None:
    """Fold BatchNorm and layer scale, and find the sites.

    Args:
        partial: whether the graph is a part of a model, so that a pattern may match nothing in it.
    """
    if origin.fold_batchnorm:
        FoldBatchNorm(origin.include, origin.exclude)(graph_module)
        FoldLayerScale(origin.include, origin.exclude)(graph_module)
    Annotate(origin.include, origin.exclude, origin.dense, partial)(graph_module)


def find_features(graph_module: fx.GraphModule, plan: Plan) -> None:
    """Find what a plan narrows and reorders in a normalised graph."""
    if plan.widths:
        FindWidths()(graph_module)
        FindPivots(bound=math.inf)(graph_module)


def rewrite_as(graph_module: fx.GraphModule, plan: Plan) -> None:
    """Rewrite a normalised graph by a plan, with layers whose weights are arbitrary.

    Raises:
        PlanError: the plan was made for another model.
    """
    kept = {planned.key: planned.kept for planned in plan.widths}
    curves = tuple(_blank_curve(width, kept.get(width.key)) for width in graph_record(graph_module).widths)
    orders = {
        planned.key: torch.tensor(planned.kept, device="cpu") for planned in plan.widths if planned.kept is not None
    }
    record_graph(graph_module, width_curves=curves, orders=orders)
    if sites(graph_module):
        Follow(plan)(graph_module)
    record_graph(graph_module, bases=dict(_blank_bases(graph_module, plan)))
    Narrow()(graph_module)
    cuts = find_cuts(graph_module)
    layers = layers_of(graph_module)
    built: list[AnySubstitute] = []
    for layer in plan.layers:
        if layer.name not in layers:
            raise PlanError(f"the plan was made for another model: there is no layer {layer.name!r}")
        site, nodes = layers[layer.name]
        cut = cuts.get(nodes[0].name, Cut())
        thin = cut.outputs(cut.inputs(site))
        blank = _blank(graph_module, thin, layer)
        if layer.form == "blocks":
            rows = hosted_rows(graph_module, nodes[0].name, cut)
            blank = tuple(replace(each, blocks=rows) for each in blank)
        built.append(build(graph_module, thin, blank))
        replace_site(graph_module, nodes, site, built[-1])
    reorder_tables(graph_module, cuts)
    if any(map(features_last, built)):
        allow_any_layout(graph_module)
    graph_module.delete_all_unused_submodules()
    SplitBias(plan.layers)(graph_module)
    Overwrite()(graph_module)
    graph_module.recompile()


def applicable(plan: Plan, graph_module: fx.GraphModule) -> Plan:
    """The part of a plan that applies to a normalised graph, which may hold other layers than the plan was made for.

    A width is narrowed if the graph has all of its layers. A layer that the plan narrows is replaced only if each of
    its widths is narrowed. Layers that are left out stay dense and are listed in the log.
    """
    names = set(layers_of(graph_module))
    record = graph_record(graph_module)
    widths = {width.key: set(width.layer_names) for width in record.all_widths}
    whole = {planned.key for planned in plan.widths if widths.get(planned.key) == set(planned.layers)}
    while True:
        torn = {name for planned in plan.widths if planned.key not in whole for name in planned.layers}
        fitting = {planned.key for planned in plan.widths if planned.key in whole and torn.isdisjoint(planned.layers)}
        if fitting == whole:
            break
        whole = fitting
    left_out = sorted(torn & names & {layer.name for layer in plan.layers})
    if left_out:
        _LOGGER.info("%s stay dense: this graph holds only some of the layers around them", ", ".join(left_out))
    _dense_where_unknown(graph_module, plan, torn)
    return plan.only(names - torn, whole)


def _dense_where_unknown(graph_module: fx.GraphModule, plan: Plan, torn: Collection[str]) -> None:
    """Remove the site marks of layers that are not in the plan, or that cannot be narrowed here."""
    known = {choice.site.name for choice in plan.allocation.choices} - set(torn)
    for site, nodes in sites(graph_module).items():
        if site.name not in known:
            for node in nodes:
                annotate(node, site=None)


def _blank_curve(width: Width, kept: tuple[int, ...] | None) -> WidthCurve:
    """A curve that narrows a width to these features, or to any; its values are arbitrary."""
    held = [width.read_by(name) for name in width.consumers]
    identities = [torch.eye(len(own or range(width.features)), dtype=torch.float64, device="cpu") for own in held]
    nothing = (0.0,) * (width.features + 1)
    if width.kind != "channels":
        heads = torch.eye(width.features, dtype=torch.float64, device="cpu").expand(width.heads, -1, -1)
        return WidthCurve(nothing, 0.0, left=heads, right=heads)
    chosen = kept or ()
    order = torch.tensor([*chosen, *sorted(set(range(width.features)) - set(chosen))], dtype=torch.int64, device="cpu")
    return WidthCurve(nothing, 0.0, order=order, covariances=tuple(identities))


def _blank_bases(graph_module: fx.GraphModule, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Any bases for the widths whose heads have identity blocks in a plan."""
    layers = layers_of(graph_module)
    hosts = {layers[layer.name][1][0].name for layer in plan.layers if layer.form == "blocks" and layer.name in layers}
    record = graph_record(graph_module)
    for width in record.widths:
        if record.hosts.get(width.key) in hosts:
            identity = torch.eye(record.size_of(width), dtype=torch.float64, device="cpu")
            yield width.key, identity.expand(width.heads, -1, -1)


def _blank(graph_module: fx.GraphModule, site: Site, layer: Replaced) -> tuple[Solution, ...]:
    """Solutions of the shape that a layer has in the plan, all zero."""
    ranks = layer.rank if isinstance(layer.rank, tuple) else (layer.rank,)
    groups, outputs = (1, site.out_features // len(ranks)) if len(ranks) > 1 else (site.groups, site.out_features)
    zeros = partial(torch.zeros, device=get_tensor(graph_module, site.weight).device)
    found = []
    for rank, biased in zip(ranks, layer.biased, strict=True):
        form = "pair" if rank is None and layer.form != "blocks" else layer.form
        inputs, own = site.in_features, rank or 0
        if form == "separable" or form == "pointwise_first":
            divided = replace(site, divided=form)
            second, first = divided.factor_sizes
            factors = zeros(1, second, own), zeros(1, own, first)
            bias = zeros(1, outputs) if biased else None
            found.append(Solution(*factors, bias, form=form, taps=divided.factor_taps))
            continue
        left = None if rank is None else zeros(groups, outputs - own * (form == "rows"), own)
        right = zeros(groups, outputs if rank is None else own, inputs - own * (form == "columns"))
        whole = Kept(layer.kept, zeros(len(layer.kept), outputs, inputs)) if layer.kept else None
        length = outputs if form == "rows" else inputs
        order = torch.arange(length, device="cpu").expand(groups, -1) if layer.ordered and form != "pair" else None
        bias = zeros(groups, outputs) if biased else None
        found.append(Solution(left, right, bias, whole, form, order))
    return tuple(found)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], like: Tensor | None = None) -> None:
    """Set a module's tensors by name.

    Args:
        like: a tensor whose dtype and device the new tensors get; None keeps their own.

    Raises:
        PlanError: the module's tensors have other names or shapes.
    """
    held = dict(held_tensors(module))
    missing, left = sorted(set(held) - set(tensors)), sorted(set(tensors) - set(held))
    if missing or left:
        names = ", ".join([*missing, *left][:5])
        raise PlanError(
            f"the model has another architecture, or was built by another version: only one of both has {names}"
        )
    given: dict[int, Tensor] = {}  # tensors that several names share remain shared
    first: dict[int, str] = {}
    for name, tensor in held.items():
        value = tensors[name]
        if first.setdefault(id(tensor), name) != name and not torch.equal(value, tensors[first[id(tensor)]]):
            raise PlanError(f"{first[id(tensor)]} and {name} are one tensor in this model, but differ in the file")
        if value.shape != tensor.shape:
            raise PlanError(f"{name} has shape {tuple(tensor.shape)} in this model, {tuple(value.shape)} in the file")
        if id(tensor) not in given:
            value = value.to(
                tensor.device, like.dtype if like is not None and value.is_floating_point() else value.dtype
            )
            given[id(tensor)] = _in_place_of(tensor, value)
        put(module, name, given[id(tensor)])


def own_memory(compressed: nn.Module, model: nn.Module) -> None:
    """Copy the tensors of a compressed model that are in the memory of the model's own; not those in files."""
    given = [tensor for _, tensor in held_tensors(model) if _has_memory(tensor)]
    files = mapped(given)
    held = {tensor.untyped_storage().data_ptr() for tensor in given if id(tensor) not in files}
    copies: dict[int, Tensor] = {}  # tensors that several names share remain shared
    for name, tensor in list(held_tensors(compressed)):
        if not _has_memory(tensor) or tensor.untyped_storage().data_ptr() not in held:
            continue
        if id(tensor) not in copies:
            copies[id(tensor)] = _in_place_of(tensor, tensor.detach().clone())
        put(compressed, name, copies[id(tensor)])


def _in_place_of(tensor: Tensor, value: Tensor) -> Tensor:
    """A value as a parameter if the tensor is one."""
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _has_memory(tensor: Tensor) -> bool:
    """Whether it is a plain tensor with values."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.numel() > 0


def held_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a module by dotted path, including the constants of a graph."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
    if isinstance(module, fx.GraphModule):
        known = {name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())}
        for path in dict.fromkeys(str(node.target) for node in module.graph.find_nodes(op="get_attr")):
            value = get_tensor(module, path)
            if path not in known and isinstance(value, Tensor):
                yield path, value
