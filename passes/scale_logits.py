"""Multiply the logits of a model by one factor, in the parameters that they are computed with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.errors import PassError
from balf_fx.graph.annotation import graph_record, record_graph
from balf_fx.graph.parameters import get_tensor, put
from balf_fx.graph.scaling import returned_values, scaling_parameters
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
        replaced: whether only layers that were replaced may change, as where other graphs run them, too.
    """

    factor: float
    output: int = 0
    replaced: bool = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        paths = self.parameters(graph_module)
        if not paths:
            raise PassError(f"ScaleLogits: nothing scales output {self.output} of the graph, and nothing else")
        for path in paths:
            put(graph_module, path, _scaled(get_tensor(graph_module, path), self.factor))
        record = graph_record(graph_module)
        if record.modules is not None:
            outside = [path for path in paths if not _is_in_a_layer(path, set(_replaced_layers(graph_module)))]
            record_graph(graph_module, constants=(*record.constants, *outside))
        return PassResult(graph_module, True)

    def parameters(self, graph_module: fx.GraphModule) -> tuple[str, ...]:
        """The paths of the parameters that are multiplied; none if the output cannot be scaled alone."""
        record, layers = graph_record(graph_module), set(_replaced_layers(graph_module))

        def may_change(path: str) -> bool:
            if _is_in_a_layer(path, layers):
                return True
            return not self.replaced and (record.modules is None or path in record.parameters)

        return scaling_parameters(graph_module, returned_values(graph_module)[self.output], may_change)


def _replaced_layers(graph_module: fx.GraphModule) -> Iterator[str]:
    return (layer.name for layer in graph_record(graph_module).replaced)


def _is_in_a_layer(path: str, layers: set[str]) -> bool:
    """Whether a parameter belongs to one of some layers."""
    return any(path.startswith(f"{layer}.") for layer in layers)


def _scaled(parameter: Tensor, factor: float) -> nn.Parameter:
    """A new parameter; half precision is multiplied in float32."""
    wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
    return nn.Parameter((wide * factor).to(parameter.dtype), requires_grad=parameter.requires_grad)
