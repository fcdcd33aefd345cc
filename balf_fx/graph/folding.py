"""Fold what scales and shifts the outputs of a layer into its weight and bias."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from balf_fx.graph.annotation import annotate, annotation
from balf_fx.graph.edits import set_bias
from balf_fx.graph.norms import Foldable
from balf_fx.graph.operators import value_readers
from balf_fx.graph.parameters import get_tensor, locate, parameter_users
from balf_fx.graph.site import Site


def is_read_once(node: fx.Node) -> bool:
    """Whether one node alone reads the values of a node, whose shape others may look at."""
    return len(value_readers(node)) == 1


def owns_parameters(graph_module: fx.GraphModule, node: fx.Node, layer: Site) -> bool:
    """Whether nothing but the node reads the parameters of its layer."""
    users = parameter_users(graph_module)
    own = [get_tensor(graph_module, path) for path in (layer.weight, layer.bias) if path is not None]
    return all(users[id(tensor)] == {node} for tensor in own)


def fold(graph_module: fx.GraphModule, node: fx.Node, layer: Site, norm: Foldable) -> None:
    """Scale and shift a layer's outputs; half precision is folded in float32."""
    weight: Tensor = get_tensor(graph_module, layer.weight)
    wide = torch.promote_types(weight.dtype, torch.float32)
    bias = norm.shifted(None if layer.bias is None else get_tensor(graph_module, layer.bias), wide)
    scale = norm.scale(wide).to(weight.device).expand(layer.groups * layer.out_features)
    scaled = weight.detach() * _per_output(scale, layer, weight)
    _set_parameter(graph_module, layer.weight, nn.Parameter(scaled.to(weight.dtype), weight.requires_grad))
    if bias is not None:
        bias = bias.to(weight.device, weight.dtype).expand(layer.groups * layer.out_features).contiguous()
        new_bias = nn.Parameter(bias, weight.requires_grad)
        if layer.bias is None:
            set_bias(graph_module, node, new_bias)
        else:
            _set_parameter(graph_module, layer.bias, new_bias)
    annotate(node, folded=(*annotation(node).folded, norm))


def _per_output(scale: Tensor, layer: Site, weight: Tensor) -> Tensor:
    """`scale` [G * O] in a shape that scales each output's row of the weight."""
    if not layer.inputs_first:
        return scale.reshape(-1, *[1] * (weight.dim() - 1))
    repeated = scale.reshape(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
    return repeated.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def _set_parameter(graph_module: fx.GraphModule, path: str, value: nn.Parameter) -> None:
    owner, name = locate(graph_module, path)
    owner.register_parameter(name, value)
