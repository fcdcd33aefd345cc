"""A compressed model from its plan and its tensors: the graph is made anew, so that a file need hold no code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from balf_fx.calibration.batches import Forward
from balf_fx.capture.arguments import rebuild
from balf_fx.capture.normal_form import Method, capture
from balf_fx.engine.rewriting import finish
from balf_fx.errors import CalibrationError, OptionError, PlanError
from balf_fx.graph.annotation import Replaced, annotation, graph_record, record_graph, sites
from balf_fx.graph.curves import Rank, Solution
from balf_fx.graph.layers import read_layer
from balf_fx.graph.parameters import get_tensor
from balf_fx.graph.plan import Plan
from balf_fx.graph.site import Site
from balf_fx.graph.widths import Width, WidthCurve
from balf_fx.passes import Annotate, FindWidths, FoldBatchNorm, Follow, Narrow
from balf_fx.passes.factorize import build, fingerprint, replace_site
from balf_fx.reporting.report import Report
from balf_fx.widths.narrowing import Cut, find_cuts


@dataclass(frozen=True)
class Stored:
    """What is left of a compressed model without its code.

    Attributes:
        plan: what was done.
        tensors: by dotted path: of a whole graph, everything that it holds; of what the backend has compiled, the
            factors.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]

    @property
    def fold_batchnorm(self) -> bool:
        """Whether the factors stand for layers that have taken in their BatchNorm."""
        return self.plan.origin.fold_batchnorm

    @property
    def report(self) -> Report:
        """What the plan does to the model as a whole."""
        return self.plan.report

    @property
    def ranks(self) -> dict[str, Rank]:
        """{site: rank}, None for dense, as `allocation` takes it."""
        return self.plan.ranks

    def pair(self, graph_module: fx.GraphModule, site: Site) -> nn.Module | None:
        """The factors of a site of a graph, None where it stays dense.

        Raises:
            OptionError: the plan was made for other weights.
        """
        layer = next((layer for layer in self.plan.layers if layer.name == site.name), None)
        if layer is None:
            return None
        if not layer.fingerprint.matches(fingerprint(graph_module, site)):
            raise OptionError(f"the plan was made for other weights than those of site {site.name!r}: calibrate again")
        modules = build(graph_module, site, _blank(graph_module, site, layer))
        own = {name: self.tensors[f"{site.name}.{name}"] for name, _ in modules.named_parameters()}
        fill(modules, own, like=get_tensor(graph_module, site.weight))
        return modules


def stored(graph_module: fx.GraphModule) -> Stored:
    """The plan of a compressed graph, and all tensors that it holds.

    Raises:
        PassError: the module carries no plan.
    """
    return Stored(Plan.of(graph_module), dict(_held(graph_module)))


def restore(
    found: Stored, model: nn.Module, example: Any | None = None, forward: Forward | None = None
) -> fx.GraphModule:
    """The compressed model.

    Args:
        model: of the architecture that was compressed, with any weights; it is not touched. The result lies on its
            device.
        example: one batch; None to call the model as it was called then, on tensors of the same shapes.
        forward: as in `balf_fx.compile`, with an example.

    Raises:
        PlanError: the model is of another architecture, or was captured in pieces.
    """
    with torch.inference_mode(False), torch.no_grad():
        graph_module = _again(found.plan, model, example, forward)
        kept = {planned.key: planned.kept for planned in found.plan.widths}
        curves = tuple(_blank_curve(width, kept.get(width.key)) for width in graph_record(graph_module).widths)
        record_graph(graph_module, width_curves=curves)
        Follow(found.plan)(graph_module)
        Narrow()(graph_module)
        _replace_layers(graph_module, found.plan)
        fill(graph_module, found.tensors)
    return finish(graph_module, found.plan)


def _again(planned: Plan, model: nn.Module, example: Any | None, forward: Forward | None) -> fx.GraphModule:
    """The graph as it was before it was rewritten."""
    origin, captured = planned.origin, planned.report.captured
    methods: dict[str, Method] = {"symbolic_trace": "symbolic_trace", "export": "export"}
    if captured not in methods:
        raise PlanError(
            f"the graph was captured by {captured}, and cannot be made again here"
            + ("; pass options={'plan': ...} to torch.compile" if captured == "dynamo" else "")
        )
    if example is None:
        if origin.arguments is None:
            raise PlanError("the plan does not tell how the model is called: pass example=, one batch")
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        positional = rebuild(origin.arguments["positional"], device)
        keywords = rebuild(origin.arguments["keywords"], device)
        example, forward = (), lambda module, _: module(*positional, **keywords)
    try:
        graph_module = capture(model, example, forward, methods[captured])
    except CalibrationError as error:
        raise PlanError(f"the model cannot be called as the one that the plan was made for: {error}") from error
    if origin.fold_batchnorm:
        FoldBatchNorm()(graph_module)
    Annotate(origin.include, origin.exclude)(graph_module)
    if planned.widths:
        FindWidths()(graph_module)
    return graph_module


def _blank_curve(width: Width, kept: tuple[int, ...] | None) -> WidthCurve:
    """A curve that narrows a width to these features, or to any; what it says of values does not matter."""
    identity = torch.eye(width.features, dtype=torch.float64)
    nothing = (0.0,) * (width.features + 1)
    if width.kind != "channels":
        heads = identity.expand(width.heads, -1, -1)
        return WidthCurve(nothing, 0.0, left=heads, right=heads)
    chosen = kept or ()
    order = torch.tensor([*chosen, *sorted(set(range(width.features)) - set(chosen))])
    return WidthCurve(nothing, 0.0, order=order, covariances=(identity,) * len(width.consumers))


def _replace_layers(graph_module: fx.GraphModule, planned: Plan) -> None:
    """Put layers of the planned form, but of no particular value, where the original's are."""
    cuts = find_cuts(graph_module)
    found = {site.name: (site, nodes) for site, nodes in sites(graph_module).items()}
    for node in graph_module.graph.nodes:  # no rank would help these, but they may have been refitted or narrowed
        site = read_layer(graph_module, node)
        if annotation(node).site is None and isinstance(site, Site):
            found[site.name] = (site, [node])
    for layer in planned.layers:
        if layer.name not in found:
            raise PlanError(f"the plan was made for another model: there is no layer {layer.name!r}")
        site, nodes = found[layer.name]
        cut = cuts.get(nodes[0].name, Cut())
        thin = cut.outputs(cut.inputs(site))
        replace_site(graph_module, nodes, site, build(graph_module, thin, _blank(graph_module, thin, layer)))
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _blank(graph_module: fx.GraphModule, site: Site, layer: Replaced) -> tuple[Solution, ...]:
    """Solutions of the form that a layer was given, all zero."""
    ranks = layer.rank if isinstance(layer.rank, tuple) else (layer.rank,)
    groups, outputs = (1, site.out_features // len(ranks)) if len(ranks) > 1 else (site.groups, site.out_features)
    zeros = partial(torch.zeros, device=get_tensor(graph_module, site.weight).device)
    found = []
    for rank, biased in zip(ranks, layer.biased, strict=True):
        left = None if rank is None else zeros(groups, outputs, rank)
        right = zeros(groups, outputs if rank is None else rank, site.in_features)
        found.append(Solution(left, right, zeros(groups, outputs) if biased else None))
    return tuple(found)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], like: Tensor | None = None) -> None:
    """Give a module the tensors of another one; each keeps its dtype, unless it is to be like another tensor.

    Raises:
        PlanError: the module holds others.
    """
    held = dict(_held(module))
    missing, left = sorted(set(held) - set(tensors)), sorted(set(tensors) - set(held))
    if missing or left:
        names = ", ".join([*missing, *left][:5])
        raise PlanError(f"the model is of another architecture, or was built by another version: {names} in one only")
    given: dict[int, Tensor] = {}  # what several names share stays shared
    for name, tensor in held.items():
        value = tensors[name]
        if value.shape != tensor.shape:
            raise PlanError(f"{name} is of shape {tuple(tensor.shape)} in this model, {tuple(value.shape)} in the file")
        if id(tensor) not in given:
            value = value.to(tensor.device, value.dtype if like is None else like.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            given[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, given[id(tensor)])


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a module holds, by dotted path; of a graph, constants too."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
    if isinstance(module, fx.GraphModule):
        known = {name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())}
        for path in dict.fromkeys(str(node.target) for node in module.graph.find_nodes(op="get_attr")):
            value = get_tensor(module, path)
            if path not in known and isinstance(value, Tensor):
                yield path, value
