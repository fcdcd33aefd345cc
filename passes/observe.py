"""Insert an observer for every value whose second moments are needed, and remove all observers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.calibration.experts import ExpertObserver, ExpertSensitivityObserver
from balf_fx.calibration.gradients import check_gradients
from balf_fx.calibration.observers import (
    OBSERVERS,
    CovarianceObserver,
    InfluenceObserver,
    SensitivityObserver,
    observer_of,
)
from balf_fx.calibration.weights import PositionWeights
from balf_fx.errors import PassError
from balf_fx.graph.annotation import annotate, annotation, graph_record
from balf_fx.graph.curves import Divided
from balf_fx.graph.experts import read_experts
from balf_fx.graph.layers import site_input
from balf_fx.graph.masks import mask_inputs, mask_names
from balf_fx.graph.operators import changes_in_place
from balf_fx.graph.parameters import get_tensor, grouped_weight
from balf_fx.graph.site import Side, Site
from balf_fx.passes.base import Pass
from balf_fx.ranks.spectra import thin_qr


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Observe each site's output or input, whichever has fewer features, or all inputs with `influence`.

    Sites that read the same value with the same geometry share one observer, unless something may change that value
    in place. A site with several uses has one observer for all of them.

    Observers get the weights of the call's positions, so that padding does not count (`calibration.weights`).

    Attributes:
        sensitivity: also observe the gradients at every site's output, in runs with gradients
            (`calibration.gradients`).
        influence: also accumulate the gradients of every site's weight, in runs with gradients, and observe the inputs
            of all sites except transposed convolutions, as factors="air" requires.
        widths: with `sensitivity`, observe what it takes to score the sizes of widths, too.
        skip_non_finite: skip batches with NaN or infinity and log a warning, in place of an error.
        divisions: observe the inputs of convolutions whose kernels may be divided in one of these ways, too.
        apart: names of sites that share no observer with other sites, so that another graph with the same weights can
            be given the same observers.

    Raises:
        ModelError: gradients are requested, but no gradient flows through a quantized layer.
    """

    sensitivity: bool = False
    influence: bool = False
    widths: bool = True
    skip_non_finite: bool = False
    apart: Collection[str] = ()
    divisions: Collection[Divided] = ()

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.require_sites(graph_module)
        if hasattr(graph_module, OBSERVERS):
            raise PassError("InsertObservers: the graph has observers already")
        if self.sensitivity or self.influence:
            check_gradients(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = self.require_sites(graph_module)
        weights = _insert_weights(graph_module, [node for nodes in found.values() for node in nodes])
        shared: dict[tuple[object, ...], str] = {}
        for site, nodes in found.items():
            side: Side = "input" if self.influence and not site.transposed else site.side
            key = (site,) if site.name in self.apart else _sharing_key(graph_module, nodes, site, side)
            new = key not in shared
            if new:
                shared[key] = f"{OBSERVERS}.{len(shared)}"
                graph_module.add_submodule(shared[key], _observer(site, nodes[0], self.skip_non_finite, side))
            for node in nodes:
                if new:
                    _observe(graph_module.graph, node, side, shared[key], weights.get(node, ()))
                annotate(node, observer=shared[key])
        widths = graph_record(graph_module).widths if self.widths else ()
        readers = {name for width in widths for name in width.consumers}
        for number, (site, nodes) in enumerate(found.items(), len(shared)):
            if self.sensitivity:
                features = any(node.name in readers for node in nodes)
                _observe_gradients(graph_module, site, nodes, f"{OBSERVERS}.{number}", features, weights)
            divisions = [division for division in site.divisions if division in self.divisions]
            if divisions and len(nodes) == 1 and site.name not in self.apart:
                path, thin = f"{OBSERVERS}.strips_{number}", dataclasses.replace(site, divided=divisions[-1])
                graph_module.add_submodule(path, CovarianceObserver(thin.strips, self.skip_non_finite, "input"))
                _observe(graph_module.graph, nodes[0], "input", path, weights.get(nodes[0], ()))
                annotate(nodes[0], strips=path)
            if self.influence and not site.transposed:
                _observe_weight(graph_module, site, nodes, f"{OBSERVERS}.{len(found) + number}")
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        for site, nodes in self.require_sites(graph_module).items():
            if observer_of(graph_module, annotation(nodes[0]).observer, CovarianceObserver) is None:
                raise PassError(f"InsertObservers left site {site.name!r} without an observer")


@dataclass(frozen=True)
class RemoveObservers(Pass):
    """Remove all observers, once `Score` and `ScoreWidths` have read them; a graph without observers is unchanged."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        observed = hasattr(graph_module, OBSERVERS)
        if observed:
            remove_observers(graph_module)
        return PassResult(graph_module, observed)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        if any(isinstance(module, CovarianceObserver) for module in graph_module.modules()):
            raise PassError("RemoveObservers left an observer in the graph")


def _observer(site: Site, node: fx.Node, skip_non_finite: bool, side: Side) -> CovarianceObserver:
    product = read_experts(node)
    if product is None:
        return CovarianceObserver(site, skip_non_finite, side)
    return ExpertObserver(site, product.rows, skip_non_finite, side)


def _insert_weights(graph_module: fx.GraphModule, nodes: list[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Call `PositionWeights` for each mask whose positions some sites have, and return the call for each of the sites.

    Sites whose values depend on no input have none. Rows of experts have other positions: what assigns them to experts
    is returned in place of weights.
    """
    names, masks = mask_names(graph_module), mask_inputs(graph_module)
    start = next(node for node in graph_module.graph.nodes if node.op != "placeholder")
    products = {node: product for node in nodes if (product := read_experts(node)) is not None}
    calls: dict[str, fx.Node] = {}
    for name in dict.fromkeys(names[node] for node in nodes if node in names and node not in products):
        path = f"{OBSERVERS}.{name}"
        graph_module.add_submodule(path, PositionWeights(name))
        with graph_module.graph.inserting_before(start):
            calls[name] = graph_module.graph.call_module(path, (masks[name],) if name in masks else ())
    found = {node: (calls[names[node]],) for node in nodes if node in names and node not in products}
    assigned = {node: product.assignment for node, product in products.items()}
    return {**found, **{node: (each,) for node, each in assigned.items() if each is not None}}


def _observe(graph: fx.Graph, node: fx.Node, side: Side, observer: str, weights: tuple[fx.Node, ...]) -> None:
    output = side == "output"
    with graph.inserting_after(node) if output else graph.inserting_before(node):
        graph.call_module(observer, (node if output else site_input(node), *weights))


def _observe_gradients(
    graph_module: fx.GraphModule,
    site: Site,
    nodes: list[fx.Node],
    observer: str,
    features: bool,
    weights: Mapping[fx.Node, tuple[fx.Node, ...]],
) -> None:
    values = [value for node in nodes for value in (node, site_input(node))]
    copies = any(changes_in_place(graph_module, reader) for value in values for reader in value.users)
    basis = _range_basis(graph_module, site)
    product = read_experts(nodes[0])
    if product is None:
        module = SensitivityObserver(site, basis, copies, features)
    else:
        module = ExpertSensitivityObserver(site, product.rows, basis, copies)
    graph_module.add_submodule(observer, module)
    for node in nodes:
        with graph_module.graph.inserting_after(node):
            graph_module.graph.call_module(observer, (site_input(node), node, *weights.get(node, ())))
        annotate(node, sensitivity=observer)


def _observe_weight(graph_module: fx.GraphModule, site: Site, nodes: list[fx.Node], observer: str) -> None:
    graph_module.add_submodule(observer, InfluenceObserver(site))
    for node in nodes:
        annotate(node, influence=observer)


def _range_basis(graph_module: fx.GraphModule, site: Site) -> Tensor | None:
    """Q of W = Q R in the precision of gradients, where statistics are on the input side."""
    if site.side == "output":
        return None
    dtype = torch.promote_types(get_tensor(graph_module, site.weight).dtype, torch.float32)
    return thin_qr(grouped_weight(graph_module, site))[0].to(dtype).contiguous()  # as it would be in a file


def remove_observers(graph_module: fx.GraphModule) -> None:
    """Remove all observers from a graph; the caller recompiles it."""
    for node in reversed(graph_module.graph.find_nodes(op="call_module")):  # readers first
        if str(node.target).startswith(f"{OBSERVERS}."):
            graph_module.graph.erase_node(node)
    graph_module.delete_submodule(OBSERVERS)


def _sharing_key(graph_module: fx.GraphModule, nodes: list[fx.Node], site: Site, side: Side) -> tuple[object, ...]:
    if side == "output" or len(nodes) > 1:
        return (site,)
    value = site_input(nodes[0])
    if any(changes_in_place(graph_module, user) for user in value.users):
        return (site,)
    product = read_experts(nodes[0])
    if product is not None:
        return (value, product.assignment, product.rows)
    pixels = site.conv if site.conv is not None and not _reads_every_pixel_once(site) else None
    return (value, site.groups, site.in_features, pixels, site.conv is None)


def _reads_every_pixel_once(site: Site) -> bool:
    conv = site.conv
    return conv is not None and conv.pointwise and set(conv.stride) == {1} and set(conv.padding) == {(0, 0)}
