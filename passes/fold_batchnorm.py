"""Fold BatchNorm in evaluation mode into the convolution or linear layer before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from balf_fx.graph.annotation import annotation, graph_record, record_graph
from balf_fx.graph.edits import erase_unused
from balf_fx.graph.folding import fold, is_read_once, owns_parameters
from balf_fx.graph.layers import read_layer, takes_bias
from balf_fx.graph.norms import BatchNorm
from balf_fx.graph.owners import owner_of
from balf_fx.graph.parameters import get_tensor, is_hooked
from balf_fx.graph.site import Site, exclusion
from balf_fx.passes.base import Pass

_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CALLS = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.ops.aten.batch_norm.default: (
        *("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
        "cudnn_enabled",
    ),
}


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Replace layer-BatchNorm pairs by one layer.

    A pair is folded if the BatchNorm uses running statistics, nothing else reads the values of the layer's output,
    and nothing else reads the layer's parameters. Linear-BatchNorm pairs need the output's shape, which `capture`
    records, since BatchNorm1d normalises another axis of a three-dimensional input.

    Attributes:
        include, exclude: as in `Annotate`: layers that they leave out keep their weights and their BatchNorm.
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        for node in list(graph_module.graph.nodes):
            found = _read_norm(graph_module, node)
            if found is None:
                continue
            source, norm = found
            layer = _foldable_layer(graph_module, source, norm)
            if layer is None or exclusion(layer.name, self.include, self.exclude):
                continue
            if _may_fold(graph_module, node, source):
                _record_fold(graph_module, node, source)
                fold(graph_module, source, layer, norm)
                node.replace_all_uses_with(source)
                erase_unused(graph_module, node)
                modified = True
        graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, modified)


def _read_norm(graph_module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, BatchNorm] | None:
    """The node's input, and the node as a BatchNorm with running statistics; or None."""
    if node.op == "call_module":
        module: Any = graph_module.get_submodule(str(node.target))
        source = node.args[0] if node.args else None
        if type(module) not in _MODULES or module.training or module.running_mean is None or is_hooked(module):
            return None
        if not isinstance(source, fx.Node):
            return None
        return source, BatchNorm(module.running_mean, module.running_var, module.weight, module.bias, module.eps)
    if node.op != "call_function" or node.target not in _CALLS:
        return None
    names = _CALLS[node.target]
    bound: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    tensors = [bound.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
    constant = all(value is None or (isinstance(value, fx.Node) and value.op == "get_attr") for value in tensors)
    eps = bound.get("eps", 1e-5)
    if not constant or tensors[0] is None or tensors[1] is None or bound.get("training") or isinstance(eps, fx.Node):
        return None
    found: list[Any] = [None if value is None else get_tensor(graph_module, str(value.target)) for value in tensors]
    mean, variance, weight, bias = found
    return bound["input"], BatchNorm(mean, variance, weight, bias, float(eps))


def _foldable_layer(graph_module: fx.GraphModule, source: fx.Node, norm: BatchNorm) -> Site | None:
    """The layer before a BatchNorm, or None if folding would change something else."""
    layer = read_layer(graph_module, source)
    if not isinstance(layer, Site) or layer.has_experts or not is_read_once(source):
        return None
    dimensions = 2 if layer.conv is None else len(layer.conv.kernel_size) + 2
    shape = annotation(source).shape
    if shape is None and layer.conv is None:
        return None
    features = layer.out_features * layer.groups
    if (shape is not None and len(shape) != dimensions) or len(norm.mean) != features:
        return None
    biased = layer.bias is not None or takes_bias(source)
    return layer if biased and owns_parameters(graph_module, source, layer) else None


def _may_fold(graph_module: fx.GraphModule, node: fx.Node, source: fx.Node) -> bool:
    """Whether the model can do without the BatchNorm: always for a graph, else if two stock modules are involved."""
    known = graph_record(graph_module).modules
    if known is None:
        return True
    norm, layer = owner_of(node) or "", owner_of(source) or ""
    uses = [each for each in graph_module.graph.nodes if owner_of(each) == norm and _read_norm(graph_module, each)]
    return known.get(norm) == "norm" and known.get(layer) == "layer" and uses == [node]


def _record_fold(graph_module: fx.GraphModule, node: fx.Node, source: fx.Node) -> None:
    """Record which module of the user's model went into which, where layers go back into it."""
    record = graph_record(graph_module)
    norm, layer = owner_of(node), owner_of(source)
    if record.modules is not None and norm is not None and layer is not None:
        record_graph(graph_module, folded={**record.folded, norm: layer})
