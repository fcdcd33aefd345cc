"""Fold BatchNorm in evaluation mode into the convolution or linear layer before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from balf_fx.passes.base import Pass
from balf_fx.sites import annotation, is_hooked

Fuse = Callable[..., tuple[Tensor, Tensor]]

_FOLDABLE = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Replace conv-BatchNorm and linear-BatchNorm pairs by one layer.

    A pair is folded where the BatchNorm uses running statistics, nothing else reads the layer's output, and both
    modules and their parameters have no other use. Linear-BatchNorm pairs need the output's dimensions, which
    `capture` records, since BatchNorm1d normalises another axis of a three-dimensional input.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in graph_module.graph.find_nodes(op="call_module"):
            layer_node = node.args[0] if node.args else None
            if isinstance(layer_node, fx.Node) and _foldable(graph_module, layer_node, node):
                layer = graph_module.get_submodule(str(layer_node.target))
                _fold(layer, graph_module.get_submodule(str(node.target)))
                node.replace_all_uses_with(layer_node)
                graph_module.graph.erase_node(node)
                modified = True
        graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, modified)


def _foldable(graph_module: fx.GraphModule, layer_node: fx.Node, norm_node: fx.Node) -> bool:
    if layer_node.op != "call_module" or len(layer_node.users) != 1:
        return False
    layer = graph_module.get_submodule(str(layer_node.target))
    norm = graph_module.get_submodule(str(norm_node.target))
    if type(norm) is not _FOLDABLE.get(type(layer)) or norm.training or norm.running_mean is None:
        return False
    if isinstance(layer, nn.Linear) and len(annotation(layer_node).shape or ()) != 2:
        return False
    return (
        _used_once(graph_module, layer) and _used_once(graph_module, norm) and not (is_hooked(layer) or is_hooked(norm))
    )


def _used_once(graph_module: fx.GraphModule, module: nn.Module) -> bool:
    """Whether one node calls the module and no other module or node holds its parameters."""
    calls = [
        node
        for node in graph_module.graph.find_nodes(op="call_module")
        if graph_module.get_submodule(str(node.target)) is module
    ]
    own = {id(parameter) for parameter in module.parameters()}
    elsewhere = (
        parameter
        for other in graph_module.modules()
        if other is not module
        for parameter in other.parameters(recurse=False)
    )
    return len(calls) == 1 and not any(id(parameter) in own for parameter in elsewhere)


def _fold(layer: Any, norm: Any) -> None:
    """Change the layer's weight and bias in place; half precision is folded in float32."""
    fuse: Fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    weight, bias = layer.weight, layer.bias
    tensors: tuple[Any, ...] = (weight, bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    wide = torch.promote_types(weight.dtype, torch.float32)
    w, b, mean, variance, scale, offset = (None if t is None else t.detach().to(wide) for t in tensors)
    folded = fuse(w, b, mean, variance, norm.eps, scale, offset)
    layer.weight, layer.bias = (nn.Parameter(t.to(weight.dtype), weight.requires_grad) for t in folded)
