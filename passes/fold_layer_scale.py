"""Fold a scale of each feature into the layer before it, such as LayerScale (Touvron et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.graph.annotation import annotation, graph_record
from balf_fx.graph.edits import erase_unused
from balf_fx.graph.folding import fold, is_read_once, owns_parameters
from balf_fx.graph.layers import read_layer
from balf_fx.graph.norms import Scale
from balf_fx.graph.operators import is_identity, operation
from balf_fx.graph.parameters import get_tensor
from balf_fx.graph.pivoted import feature_axis
from balf_fx.graph.relayouts import broadcasts, is_relayout, relaid, sizes_of
from balf_fx.graph.site import Site, exclusion
from balf_fx.passes.base import Pass


@dataclass(frozen=True)
class FoldLayerScale(Pass):
    """Replace a layer whose output is multiplied by a parameter with one entry for each feature by one layer.

    The output may have been brought into another layout in between. It is folded if nothing else reads the output or
    the layer's parameters. Where layers go back into the user's model, its code multiplies, and nothing is folded.

    Attributes:
        include, exclude: as in `Annotate`: layers that they leave out keep their weights and their scale.
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        nodes = list(graph_module.graph.nodes) if graph_record(graph_module).modules is None else []
        for node in nodes:
            scale = _Scale.read(graph_module, node)
            if scale is None or exclusion(scale.layer.name, self.include, self.exclude):
                continue
            fold(graph_module, scale.node, scale.layer, Scale(scale.weight))
            node.replace_all_uses_with(scale.value)
            erase_unused(graph_module, node)
            modified = True
        return PassResult(graph_module, modified)


@dataclass(frozen=True)
class _Scale:
    """A product of a layer's output and a parameter.

    Attributes:
        node, layer: the layer.
        value: its output, as the product reads it.
        weight: the parameter, in any shape.
    """

    node: fx.Node
    layer: Site
    value: fx.Node
    weight: nn.Parameter

    @classmethod
    def read(cls, graph_module: fx.GraphModule, product: fx.Node) -> _Scale | None:
        """What a node multiplies; None if it cannot be folded into a layer."""
        if operation(product) != "mul" or len(product.args) != 2 or len(product.all_input_nodes) != 2:
            return None
        for value, factor in (product.all_input_nodes, product.all_input_nodes[::-1]):
            (start, moves), (node, path) = (_behind(graph_module, each) for each in (factor, value))
            weight = get_tensor(graph_module, str(start.target)) if start.op == "get_attr" else None
            layer = read_layer(graph_module, node) if isinstance(weight, nn.Parameter) else None
            if (
                isinstance(layer, Site)
                and isinstance(weight, nn.Parameter)
                and not layer.has_experts
                and weight.dtype == get_tensor(graph_module, layer.weight).dtype
                and all(map(is_read_once, (node, *path, value)))
                and owns_parameters(graph_module, node, layer)
                and _scales_features(graph_module, (weight, moves), (node, layer, path))
            ):
                return cls(node, layer, value, weight)
        return None


def _behind(graph_module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The node whose value a node forwards, and the nodes that bring it into another layout in between."""
    found: list[fx.Node] = []
    while (relayout := is_relayout(graph_module, node)) or is_identity(graph_module, node):
        if relayout:
            found.insert(0, node)
        node = node.all_input_nodes[0]
    return node, found


def _scales_features(
    graph_module: fx.GraphModule,
    factor: tuple[Tensor, Sequence[fx.Node]],
    output: tuple[fx.Node, Site, Sequence[fx.Node]],
) -> bool:
    """Whether each entry of a factor is multiplied by one feature of a layer, in their order."""
    (weight, moves), (node, layer, path) = factor, output
    features, shape = layer.out_features * layer.groups, annotation(node).shape
    sizes = [annotation(each).number for each in sizes_of((*moves, *path))]
    if weight.numel() != features or shape is None or None in sizes:
        return False
    numbers = torch.arange(features, dtype=torch.int32, device="cpu")
    axis = feature_axis(layer)
    ours = numbers.reshape(-1, *[1] * (-1 - axis)).expand(shape)
    theirs = numbers.reshape(weight.shape)
    for each in path:
        ours = relaid(graph_module, each, ours, lambda size: annotation(size).number)
    for each in moves:
        theirs = relaid(graph_module, each, theirs, lambda size: annotation(size).number)
    return broadcasts(theirs.shape, ours.shape) and torch.equal(ours, theirs.expand(ours.shape))
