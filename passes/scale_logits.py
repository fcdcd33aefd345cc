"""Multiply the logits of a model by one factor, in the parameters that they are computed with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.errors import PassError
from balf_fx.graph.annotation import GraphRecord, Replaced, annotation, graph_record, record_graph
from balf_fx.graph.curves import Solution
from balf_fx.graph.layers import layers_of
from balf_fx.graph.parameters import fingerprint, get_tensor, grouped_bias, grouped_weight, put
from balf_fx.graph.scaling import returned_values, scaling_parameters
from balf_fx.graph.site import Site
from balf_fx.graph.substitute import build, replace_site
from balf_fx.passes.base import Pass


@dataclass(frozen=True)
class ScaleLogits(Pass):
    """Multiply one output by a positive factor (temperature scaling, `calibration.temperature`): nothing is added.

    The factor goes into the layer that computes the output or, where its weight is that of an embedding, too, into the
    normalisation before it. Runs after the graph was rewritten. In a graph whose layers go back into the user's model,
    only parameters that the model holds itself may change.

    Attributes:
        factor: above 0.
        output: the index of the output among all that the graph returns.
        shared: whether other graphs of the program, and those that are captured later, take over the layers that were
            replaced, and nothing else: the layer that is scaled is replaced, and a normalisation stays as it is.
    """

    factor: float
    output: int = 0
    shared: bool = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        paths = self.parameters(graph_module)
        if not paths:
            raise PassError(f"ScaleLogits: nothing scales output {self.output} of the graph, and nothing else")
        record = graph_record(graph_module)
        outside = [path for path in paths if not _is_in_a_layer(path, record)]
        for site, nodes in _layers_with(graph_module, outside).items() if self.shared else ():
            self._replace(graph_module, site, nodes, paths)
        for path in set(paths) - set(outside) if self.shared else paths:
            put(graph_module, path, _scaled(get_tensor(graph_module, path), self.factor))
        if record.modules is not None:
            record_graph(graph_module, constants=(*record.constants, *outside))
        return PassResult(graph_module, True)

    def _replace(
        self, graph_module: fx.GraphModule, site: Site, nodes: Sequence[fx.Node], paths: Collection[str]
    ) -> None:
        """Replace a layer by one with scaled parameters, as a layer that is refitted."""
        original = annotation(nodes[0]).fingerprint or fingerprint(graph_module, site)
        weight, bias = grouped_weight(graph_module, site), grouped_bias(graph_module, site)
        weight = weight * (self.factor if site.weight in paths else 1.0)
        substitute = build(graph_module, site, (Solution(None, weight, None if bias is None else bias * self.factor),))
        replace_site(graph_module, nodes, site, substitute)
        new = Replaced(site.name, None, substitute.biased, original)
        record_graph(graph_module, replaced=(*graph_record(graph_module).replaced, new))

    def parameters(self, graph_module: fx.GraphModule) -> tuple[str, ...]:
        """The paths of the parameters that are multiplied; none if the output cannot be scaled alone."""
        record = graph_record(graph_module)
        layers = {path for site, _ in layers_of(graph_module).values() for path in (site.weight, site.bias)}

        def may_change(path: str) -> bool:
            if _is_in_a_layer(path, record):
                return True
            return path in layers if self.shared else record.modules is None or path in record.parameters

        return scaling_parameters(graph_module, returned_values(graph_module)[self.output], may_change)


def _layers_with(graph_module: fx.GraphModule, paths: Sequence[str]) -> dict[Site, list[fx.Node]]:
    """The layers whose parameters are among some."""
    layers = layers_of(graph_module).values()
    return {site: nodes for site, nodes in layers if not {site.weight, site.bias}.isdisjoint(paths)}


def _is_in_a_layer(path: str, record: GraphRecord) -> bool:
    """Whether a parameter belongs to a layer that was replaced."""
    return any(path.startswith(f"{layer.name}.") for layer in record.replaced)


def _scaled(parameter: Tensor, factor: float) -> nn.Parameter:
    """A new parameter; half precision is multiplied in float32."""
    wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
    return nn.Parameter((wide * factor).to(parameter.dtype), requires_grad=parameter.requires_grad)
