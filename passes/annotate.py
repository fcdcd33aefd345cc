"""Mark every factorizable node as a site, and store the reason why each other node with parameters is not one."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.errors import PassError, UnknownSiteError
from balf_fx.graph.annotation import annotate, sites
from balf_fx.graph.experts import read_experts
from balf_fx.graph.layers import read_layer, read_site
from balf_fx.graph.owners import fixed_layers
from balf_fx.graph.parameters import get_tensor, parameter_users
from balf_fx.graph.parts import read_parts
from balf_fx.graph.routers import routers
from balf_fx.graph.site import Reason, Refusal, Site, exclusion
from balf_fx.passes.base import Pass

Marks = dict[fx.Node, Site | Refusal | None]


@dataclass(frozen=True)
class Annotate(Pass):
    """Find the sites.

    Nodes that apply the same weight and bias in the same way, because it is tied or its module is called several
    times, become one site.

    Attributes:
        include: glob patterns of the layers that may change; None means all of them.
        exclude: glob patterns of layers that keep their weights bit for bit: no later pass changes them.
        dense: glob patterns of sites that keep their full rank, but may be refitted and become narrower.
        partial: whether the graph is a part of a model, so that a pattern may match nothing in it.

    Raises:
        UnknownSiteError: a pattern matches no layer.
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    dense: Sequence[str] = ()
    partial: bool = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        marks: Marks = {node: read_site(graph_module, node) for node in graph_module.graph.nodes}
        _join_shared(graph_module, marks)
        layers = {node: name for node, mark in marks.items() if (name := _layer_name(graph_module, node, mark))}
        if not self.partial:
            self.check(list(layers.values()))
        _find_parts(marks)
        choosing, fixed = routers(graph_module, layers), fixed_layers(graph_module, layers)
        for node, mark in marks.items():
            chosen = self._selected(mark, layers[node]) if node in layers and mark is not None else mark
            if isinstance(chosen, Site) and node in choosing:
                chosen = Refusal(chosen.name, chosen.kind, Reason.ROUTER)
            if chosen is not None and node in fixed:
                chosen = chosen if isinstance(chosen, Refusal) and chosen.keeps_weights else _fixed(chosen)
            site = chosen if isinstance(chosen, Site) else None
            annotate(node, site=site, refusal=chosen if isinstance(chosen, Refusal) else None)
        for nodes in sites(graph_module).values():
            for node in nodes:
                annotate(node, calls=len(nodes))
        return PassResult(graph_module, False)

    def check(self, names: Sequence[str]) -> None:
        """Check that each pattern matches at least one of these names.

        Raises:
            UnknownSiteError: a pattern matches none of them; the message lists the names.
        """
        for option in ("include", "exclude", "dense"):
            for pattern in getattr(self, option) or ():
                if not any(fnmatchcase(name, pattern) for name in names):
                    listed = ", ".join(dict.fromkeys(names))
                    raise UnknownSiteError(f"{option} pattern {pattern!r} matches no site; the sites are: {listed}")

    def ensures(self, graph_module: fx.GraphModule) -> None:
        names = [site.name for site in sites(graph_module)]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise PassError(f"Annotate gave several sites the same name: {', '.join(sorted(repeated))}")

    def _selected(self, mark: Site | Refusal, name: str) -> Site | Refusal:
        detail = exclusion(name, self.include, self.exclude)
        if detail:
            return Refusal(name, mark.kind, Reason.EXCLUDED, detail)
        if isinstance(mark, Site) and any(fnmatchcase(name, pattern) for pattern in self.dense):
            return dataclasses.replace(mark, keeps_rank=True)
        return mark


def _fixed(mark: Site | Refusal) -> Refusal:
    return Refusal(mark.name, mark.kind, Reason.FIXED)


def _layer_name(graph_module: fx.GraphModule, node: fx.Node, mark: Site | Refusal | None) -> str | None:
    """The name that patterns match: that of a site, or of a layer that factors would not make cheaper; else None."""
    if isinstance(mark, Site):
        return mark.name
    layer = read_layer(graph_module, node)
    return layer.name if isinstance(layer, Site) else None


def _join_shared(graph_module: fx.GraphModule, marks: Marks) -> None:
    """Give nodes that share a weight the first one's site, or refuse them if they use the weight in different ways."""
    users = parameter_users(graph_module)
    by_weight: dict[int, list[fx.Node]] = defaultdict(list)
    for node, mark in marks.items():
        if isinstance(mark, Site):
            by_weight[id(get_tensor(graph_module, mark.weight))].append(node)
    for weight, nodes in by_weight.items():
        found = [mark for node in nodes if isinstance(mark := marks[node], Site)]
        first = found[0]
        elsewhere = users[weight] - set(nodes)
        alike = len({_way_of_use(graph_module, *use) for use in zip(found, nodes, strict=True)}) == 1
        bias = None if first.bias is None else get_tensor(graph_module, first.bias)
        if not alike or (bias is not None and users[id(bias)] - set(nodes)):
            for node, site in zip(nodes, found, strict=True):
                marks[node] = Refusal(site.name, site.kind, Reason.SHARED, "used in different ways")
            continue
        if elsewhere:  # another reader, such as a tied embedding, needs the weight: the factors must not replace it
            held = _holds_what_others_fetch(graph_module, first, nodes)
            first = dataclasses.replace(first, keeps_weight=True, name=f"{first.name}_factors" if held else first.name)
        for node in nodes:
            marks[node] = first


def _find_parts(marks: Marks) -> None:
    """Record the number of parts into which each linear site's output is split, where all its uses agree."""
    uses: dict[Site, list[fx.Node]] = defaultdict(list)
    for node, mark in marks.items():
        if isinstance(mark, Site) and mark.kind == "linear":
            uses[mark].append(node)
    for site, nodes in uses.items():
        parts = {read_parts(node, site.out_features) for node in nodes}
        if len(parts) == 1:
            marks.update(dict.fromkeys(nodes, dataclasses.replace(site, parts=parts.pop())))


def _way_of_use(graph_module: fx.GraphModule, site: Site, node: fx.Node) -> tuple[object, ...]:
    bias = None if site.bias is None else id(get_tensor(graph_module, site.bias))
    product = read_experts(node)
    rows = None if product is None else product.rows
    return (site.kind, bias, site.groups, site.conv, site.inputs_first, rows)


def _holds_what_others_fetch(graph_module: fx.GraphModule, site: Site, nodes: list[fx.Node]) -> bool:
    """Whether the path where the factors would go holds something that other nodes than the site's own read."""
    for node in graph_module.graph.nodes:
        inside = str(node.target) == site.name or str(node.target).startswith(f"{site.name}.")
        if node.op in ("get_attr", "call_module") and inside and node not in nodes and set(node.users) - set(nodes):
            return True
    return False
