"""Layers whose values have their samples in another dimension than the first, as sequences [L, N, F] have."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from balf_fx.calibration.batches import MODEL_ERRORS, sample_count, some_samples
from balf_fx.graph.annotation import annotate, annotation
from balf_fx.graph.layers import read_layer
from balf_fx.graph.site import Site


def find_samples(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Record the dimension of the samples in the outputs of linear layers, where it may not be the first one.

    If a dimension has as many entries as there are samples, the graph runs on fewer samples to see which of its
    dimensions become smaller. If it cannot, the first one has the samples, unless its size rules that out.

    Args:
        graph_module: its nodes have the shapes of `graph.flops.profile`.
        inputs: the example, one for each placeholder.
    """
    count = sample_count(tuple(inputs))
    found = {node: shape for node in graph_module.graph.nodes if (shape := _shape(graph_module, node))}
    unclear = [node for node, shape in found.items() if count in shape[1:]]
    if count < 2 or not unclear:
        return
    fewer = 2 if count > 2 else 1
    sizes = _Sizes(graph_module)
    with torch.no_grad(), suppress(*MODEL_ERRORS):
        sizes.run(*some_samples(tuple(inputs), 0, fewer))
    for node in unclear:
        shape = found[node]
        others = sizes.found.get(node)
        if others is None:
            dimension = 0 if shape[0] % count == 0 else shape.index(count)
        else:
            differ = [index for index, pair in enumerate(zip(shape, others, strict=False)) if pair[0] != pair[1]]
            dimension = differ[0] if differ else 0
        annotate(node, samples=dimension)


def _shape(graph_module: fx.GraphModule, node: fx.Node) -> tuple[int, ...]:
    """The leading dimensions of a linear layer's output; empty for other nodes, also of experts, which mix rows."""
    layer = read_layer(graph_module, node)
    if not isinstance(layer, Site) or layer.conv is not None or layer.has_experts:
        return ()
    return (annotation(node).shape or ())[:-1]


class _Sizes(fx.Interpreter):
    """Runs a graph and keeps the sizes of the values of its nodes."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.found: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = result.shape
        return result
