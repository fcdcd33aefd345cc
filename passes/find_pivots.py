"""Find how the low-rank map of each site may be written with some of its own rows or columns."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.graph.annotation import annotate, annotation, graph_record, record_graph, sites
from balf_fx.graph.layers import read_layer
from balf_fx.graph.layouts import depends_on_layout
from balf_fx.graph.parameters import get_tensor, grouped_weight
from balf_fx.graph.site import MOVE, FreeOrder, Site
from balf_fx.graph.widths import HOSTS, Width
from balf_fx.passes.base import Pass
from balf_fx.ranks.bases import BOUND, has_blocks
from balf_fx.widths.orders import simple_ones


@dataclass(frozen=True)
class FindPivots(Pass):
    """Record the form of each site's low-rank maps (`ranks.pivots`), on which their cost depends.

    The columns of a map, or its rows, come in another order, the pivots first. Where all inputs of a site are channels
    of a width, or all of its outputs are, the layers around it take over this order. Features of other sites are
    brought into order by a gather, where that takes less time than it saves (`Site.form`).

    Also record the layers in which heads of attention may get identity blocks (`ranks.bases`).

    Attributes:
        enabled: False lets low-rank maps be pairs of factors only.
        move: `Site.move`: 0 for the fewest parameters, whatever time it takes to move features.
        bound: the largest entry of T for identity blocks.
    """

    enabled: bool = True
    move: int = MOVE
    bound: float = BOUND

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.require_sites(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        written, read = writers_and_readers(graph_module)
        fixed = depends_on_layout(graph_module)
        for site, nodes in sites(graph_module).items():
            apart = fixed and site.conv is not None and site.reads_each_once
            pivots = None if apart else self._pivots(site, nodes, written, read)
            for node in nodes:
                annotate(node, site=dataclasses.replace(site, pivots=pivots, move=self.move))
        record_graph(graph_module, hosts=self._hosts(graph_module) if self.enabled else {})
        return PassResult(graph_module, False)

    def _pivots(
        self, site: Site, nodes: list[fx.Node], written: Mapping[str, Width], read: Mapping[str, Width]
    ) -> FreeOrder | None:
        if not self.enabled or site.has_experts or site.keeps_rank:
            return None
        if len(nodes) > 1 or annotation(nodes[0]).shared or site.groups > 1:
            return "none"
        if nodes[0].name in read:
            return "columns"
        return "rows" if nodes[0].name in written else "none"

    def _hosts(self, graph_module: fx.GraphModule) -> dict[str, str]:
        """The layers of keys and of values whose weights have well-conditioned blocks."""
        nodes = {node.name: node for node in graph_module.graph.nodes}
        found: dict[str, list[Width]] = defaultdict(list)
        for width in graph_record(graph_module).widths:
            host = width.producers[HOSTS[width.kind]] if width.kind != "channels" else None
            if host is not None and not any(_has_parts(nodes[name]) for name in width.layers if name != host):
                found[host].append(width)
        return {
            width.key: name
            for name, widths in found.items()
            if self._has_blocks(graph_module, nodes[name], widths)
            for width in widths
        }

    def _has_blocks(self, graph_module: fx.GraphModule, node: fx.Node, widths: list[Width]) -> bool:
        site = annotation(node).site
        if site is None or max(width.features for width in widths) >= site.in_features:
            return False
        if math.isinf(self.bound):
            return True
        weight = grouped_weight(graph_module, site)[0]
        if get_tensor(graph_module, site.weight).dtype not in (torch.float32, torch.float64):
            return False  # products of the blocks' entries would be rounded too coarsely
        heads = [
            weight[torch.tensor(width.rows[HOSTS[width.kind]], device="cpu").reshape(width.heads, -1)]
            for width in widths
        ]
        return has_blocks(heads, self.bound)


def writers_and_readers(graph_module: fx.GraphModule) -> tuple[dict[str, Width], dict[str, Width]]:
    """The widths by the layers whose rows, or whose columns, are their features."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    widths = list(simple_ones(graph_module, graph_record(graph_module).all_widths))
    written = {name: width for width in widths for name in width.producers}
    read = {
        name: width
        for width in widths
        for name in width.consumers
        if isinstance(layer := read_layer(graph_module, nodes[name]), Site)
        and layer.reads_each_once
        and layer.in_features == width.features
    }
    return written, read


def _has_parts(node: fx.Node) -> bool:
    """Whether a layer may get factors for each of its parts, which take over no basis."""
    site = annotation(node).site
    return site is not None and site.parts > 1
