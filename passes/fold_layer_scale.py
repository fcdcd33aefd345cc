"""Fold a scale into the layer before it: of each feature, as LayerScale (Touvron et al. 2021), or of a whole branch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.graph.annotation import annotation, graph_record
from balf_fx.graph.edits import erase_unused
from balf_fx.graph.effects import effects
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
    """Replace a layer whose output is multiplied by one layer.

    The factor is a number, or a parameter, or a buffer that the model does not write to, with a single entry or with
    one for each feature. The output may have been brought into another layout in between. It is folded if nothing else
    reads the output or the layer's parameters. Where layers go back into the user's model, its code multiplies, and
    nothing is folded.

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
            fold(graph_module, scale.node, scale.layer, scale.scale)
            node.replace_all_uses_with(scale.value)
            erase_unused(graph_module, node)
            modified = True
        return PassResult(graph_module, modified)


@dataclass(frozen=True)
class _Scale:
    """A product of a layer's output and a parameter or a number.

    Attributes:
        node, layer: the layer.
        value: its output, as the product reads it.
        scale: what multiplies it.
    """

    node: fx.Node
    layer: Site
    value: fx.Node
    scale: Scale

    @classmethod
    def read(cls, graph_module: fx.GraphModule, product: fx.Node) -> _Scale | None:
        """What a node multiplies; None if it cannot be folded into a layer."""
        for value, factor in _factors(product):
            node, path = _behind(graph_module, value)
            layer = read_layer(graph_module, node)
            if (
                isinstance(layer, Site)
                and not layer.has_experts
                and all(map(is_read_once, (node, *path, value)))
                and owns_parameters(graph_module, node, layer)
            ):
                scale = _scale(graph_module, factor, (node, layer, path))
                return None if scale is None else cls(node, layer, value, scale)
        return None


_Output = tuple[fx.Node, Site, Sequence[fx.Node]]
"""A layer's node, the layer, and what brings its output into another layout."""


def _factors(node: fx.Node) -> list[tuple[fx.Node, Any]]:
    """The values that a product or a quotient multiplies, each with the node or the number that is the factor."""
    first, second = node.args if len(node.args) == 2 and not node.kwargs else (None, None)
    pairs: list[tuple[Any, Any]] = []
    if operation(node) == "mul":
        pairs = [(first, second), (second, first)]
    elif operation(node) == "div" and isinstance(second, int | float) and second:
        pairs = [(first, 1 / second)]
    return [(value, factor) for value, factor in pairs if isinstance(value, fx.Node)]


def _scale(graph_module: fx.GraphModule, factor: Any, output: _Output) -> Scale | None:
    """What multiplies a layer's output; None if it is no number and no parameter that scales features."""
    if isinstance(factor, int | float):
        return Scale(float(factor)) if math.isfinite(factor) else None
    if not isinstance(factor, fx.Node):
        return None
    start, moves = _behind(graph_module, factor)
    weight = get_tensor(graph_module, str(start.target)) if start.op == "get_attr" else None
    if (
        not isinstance(weight, Tensor)
        or _is_written(start)
        or weight.dtype != get_tensor(graph_module, output[1].weight).dtype
    ):
        return None
    return Scale(weight) if _scales_features(graph_module, (weight, moves), output) else None


def _is_written(node: fx.Node) -> bool:
    """Whether the model writes to the buffer that a node reads."""
    written = [effect.args[0] for effect in effects(node.graph)]
    return any(isinstance(target, fx.Node) and target.target == node.target for target in written)


def _behind(graph_module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The node whose value a node forwards, and the nodes that bring it into another layout in between."""
    found: list[fx.Node] = []
    while (relayout := is_relayout(graph_module, node)) or is_identity(graph_module, node):
        if relayout:
            found.insert(0, node)
        node = node.all_input_nodes[0]
    return node, found


def _scales_features(graph_module: fx.GraphModule, factor: tuple[Tensor, Sequence[fx.Node]], output: _Output) -> bool:
    """Whether each entry of a factor is multiplied by one feature of a layer, in their order, or one by all."""
    (weight, moves), (node, layer, path) = factor, output
    features, shape = layer.out_features * layer.groups, annotation(node).shape
    sizes = [annotation(each).number for each in sizes_of((*moves, *path))]
    if weight.numel() not in (1, features) or shape is None or None in sizes:
        return False
    numbers = torch.arange(features, dtype=torch.int32, device="cpu") * int(weight.numel() == features)
    axis = feature_axis(layer)
    ours = numbers.reshape(-1, *[1] * (-1 - axis)).expand(shape)
    theirs = numbers[: weight.numel()].reshape(weight.shape)
    for each in path:
        ours = relaid(graph_module, each, ours, lambda size: annotation(size).number)
    for each in moves:
        theirs = relaid(graph_module, each, theirs, lambda size: annotation(size).number)
    return broadcasts(theirs.shape, ours.shape) and torch.equal(ours, theirs.expand(ours.shape))
