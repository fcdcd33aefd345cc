"""Find the widths: sets of features inside the model whose number may be reduced."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.graph.annotation import annotation, record_graph
from balf_fx.graph.layers import read_layer
from balf_fx.graph.site import Site
from balf_fx.graph.widths import Width, joint_widths
from balf_fx.passes.base import Pass
from balf_fx.widths.channels import find_channels
from balf_fx.widths.heads import find_heads

_JOINED = 2  # the most widths that share layers and are chosen together: every pair of their sizes is compared


@dataclass(frozen=True)
class FindWidths(Pass):
    """Record the widths of an annotated and profiled graph (`widths.channels`, `widths.heads`).

    A layer may lie between two widths, like the middle one of a bottleneck. In longer chains, the widths that affect
    the most FLOPs are taken.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.require_sites(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = [*find_channels(graph_module), *find_heads(graph_module)]
        named = list(_named(graph_module, found))
        record_graph(graph_module, widths=tuple(_most_valuable(graph_module, named)))
        return PassResult(graph_module, False)


def _named(graph_module: fx.GraphModule, found: Sequence[Width]) -> Iterator[Width]:
    """The widths with the names of their layers, and with unique names."""
    layers = {node.name: _layer_name(graph_module, node) for node in graph_module.graph.nodes}
    seen: Counter[str] = Counter()
    for width in found:
        seen[width.key] += 1
        name = width.name if seen[width.key] == 1 else f"{width.name} {seen[width.key]}"
        names = tuple(dict.fromkeys(layers[node] for node in width.layers))
        yield dataclasses.replace(width, name=name, layer_names=names)


def _layer_name(graph_module: fx.GraphModule, node: fx.Node) -> str:
    layer = annotation(node).site or read_layer(graph_module, node)
    return layer.name if isinstance(layer, Site) else node.name


def _most_valuable(graph_module: fx.GraphModule, found: Sequence[Width]) -> list[Width]:
    """Take widths in the order of the FLOPs that they affect, as long as at most `_JOINED` are connected by layers."""
    flops = {node.name: annotation(node).flops or 0 for node in graph_module.graph.nodes}
    order = sorted(range(len(found)), key=lambda i: -sum(flops[name] for name in found[i].layers))
    taken: list[int] = []
    for index in order:
        joined = joint_widths([*(found[i] for i in taken), found[index]])
        if max(map(len, joined)) <= _JOINED:
            taken.append(index)
    return [found[index] for index in sorted(taken)]
