"""Fold constant scales and shifts into the layer before them, as LayerScale (Touvron et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.graph.annotation import annotation, graph_record
from balf_fx.graph.constants import NotConstantError, evaluated, sources, unchanged_constants
from balf_fx.graph.edits import erase_unused
from balf_fx.graph.folding import fold, is_read_once, owns_parameters
from balf_fx.graph.layers import read_layer, takes_bias
from balf_fx.graph.norms import Scale, Shift
from balf_fx.graph.operators import is_identity, operation
from balf_fx.graph.parameters import get_tensor, is_quantized
from balf_fx.graph.pivoted import feature_axis
from balf_fx.graph.relayouts import broadcasts, is_relayout, relaid, sizes_of
from balf_fx.graph.site import Site, exclusion
from balf_fx.passes.base import Pass

_FACTORS = ("mul", "div")


@dataclass(frozen=True)
class FoldLayerScale(Pass):
    """Replace a layer whose output is multiplied by a constant, or to which one is added, by one layer.

    The constant is a number, or what the model computes from parameters and buffers that it does not change, as a
    frozen BatchNorm does. It has a single entry or one for each feature. The output may have been brought into another
    layout in between. It is folded if nothing else reads the output or the layer's parameters. Where layers go back
    into the user's model, its code multiplies and adds, and nothing is folded.

    Attributes:
        include, exclude: as in `Annotate`: layers that they leave out keep their weights and their scale.
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        nodes = list(graph_module.graph.nodes) if graph_record(graph_module).modules is None else []
        constants = unchanged_constants(graph_module)
        for node in nodes:
            affine = None if node in constants else _Affine.read(graph_module, node, constants)
            if affine is None or exclusion(affine.layer.name, self.include, self.exclude):
                continue
            fold(graph_module, affine.node, affine.layer, affine.folded)
            node.replace_all_uses_with(affine.value)
            erase_unused(graph_module, node)
            modified = True
        return PassResult(graph_module, modified)


@dataclass(frozen=True)
class _Affine:
    """A product or a sum of a layer's output and a constant.

    Attributes:
        node, layer: the layer.
        value: its output, as the product or the sum reads it.
        folded: what multiplies it, or is added.
    """

    node: fx.Node
    layer: Site
    value: fx.Node
    folded: Scale | Shift

    @classmethod
    def read(cls, graph_module: fx.GraphModule, affine: fx.Node, constants: Set[fx.Node]) -> _Affine | None:
        """What a node multiplies or adds; None if it cannot be folded into a layer."""
        for value, constant in _operands(affine):
            if isinstance(constant, fx.Node) and _behind(graph_module, constant)[0] not in constants:
                continue
            node, path = _behind(graph_module, value)
            layer = read_layer(graph_module, node)
            if (
                isinstance(layer, Site)
                and not layer.has_experts
                and all(map(is_read_once, (node, *path, value)))
                and owns_parameters(graph_module, node, layer)
                and (operation(affine) in _FACTORS or layer.bias is not None or takes_bias(node))
            ):
                output = (node, layer, path)
                found = _constant(graph_module, constant, output)
                return None if found is None else cls(node, layer, value, _folded(operation(affine), *found))
        return None


_Output = tuple[fx.Node, Site, Sequence[fx.Node]]
"""A layer's node, the layer, and what brings its output into another layout."""


def _operands(node: fx.Node) -> list[tuple[fx.Node, Any]]:
    """The values that a node multiplies or adds, each with the node or the number that may be the constant."""
    first, second = node.args if len(node.args) == 2 and not node.kwargs else (None, None)
    pairs: list[tuple[Any, Any]] = []
    if operation(node) in ("mul", "add"):
        pairs = [(first, second), (second, first)]
    elif operation(node) == "sub" or (operation(node) == "div" and second != 0):
        pairs = [(first, second)]
    return [(value, constant) for value, constant in pairs if isinstance(value, fx.Node)]


def _folded(name: str, constant: Tensor | float, sources: tuple[Tensor, ...]) -> Scale | Shift:
    """What is folded of an operation with a constant."""
    if name in _FACTORS:
        return Scale(1 / constant if name == "div" else constant, sources)
    return Shift(-constant if name == "sub" else constant, sources)


def _constant(
    graph_module: fx.GraphModule, given: Any, output: _Output
) -> tuple[Tensor | float, tuple[Tensor, ...]] | None:
    """The constant of each feature, and from what it is computed; None if it is no number and has other entries."""
    if isinstance(given, int | float):
        return (float(given), ()) if math.isfinite(given) else None
    if not isinstance(given, fx.Node):
        return None
    start, moves = _behind(graph_module, given)
    found = tuple(get_tensor(graph_module, str(each.target)) for each in sources(start))
    try:
        value = evaluated(graph_module, start) if found and not any(map(is_quantized, found)) else None
    except NotConstantError:
        return None
    if value is None or value.dtype != get_tensor(graph_module, output[1].weight).dtype:
        return None
    return (value, found) if _is_of_features(graph_module, (value, moves), output) else None


def _behind(graph_module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The node whose value a node forwards, and the nodes that bring it into another layout in between."""
    found: list[fx.Node] = []
    while (relayout := is_relayout(graph_module, node)) or is_identity(graph_module, node):
        if relayout:
            found.insert(0, node)
        node = node.all_input_nodes[0]
    return node, found


def _is_of_features(graph_module: fx.GraphModule, constant: tuple[Tensor, Sequence[fx.Node]], output: _Output) -> bool:
    """Whether each entry of a constant belongs to one feature of a layer, in their order, or one to all."""
    (weight, moves), (node, layer, path) = constant, output
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
