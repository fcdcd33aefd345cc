"""Where the features of narrower layers lie in the user's model, whose code between the layers stays as it is.

Code that treats each hidden feature alike runs on fewer of them as on all: such a width *passes*. Its layers become
narrower, as do the parameters with one entry for each feature. Other code gets features in their old places, zeros
elsewhere: the layers before a width write them there, and the layers behind it read them from there. Heads of attention
are of this kind: zeros add nothing to a product of queries and keys, and zeros of values stay zeros.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from balf_fx.graph.annotation import Layout, annotation, graph_record
from balf_fx.graph.layers import layers_of, read_layer
from balf_fx.graph.operators import aten
from balf_fx.graph.owners import owner_of
from balf_fx.graph.pivoted import feature_axis
from balf_fx.graph.site import Site
from balf_fx.graph.widths import Width
from balf_fx.widths.narrowing import Narrowed, changed_widths, find_cuts

_CHUNKS = ("chunk", torch.chunk, aten.chunk.default)


def fits(graph_module: fx.GraphModule, width: Width) -> bool:
    """Whether a width may become narrower in the user's model: all layers along its features can be replaced."""
    along = [node for node in _between(graph_module, width) if _is_layer(graph_module, node)]
    return all(_is_replaceable(graph_module, node) for node in along)


def passes(graph_module: fx.GraphModule, width: Width) -> bool:
    """Whether the model's code works for any number of a width's features."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    rows: dict[str, set[int]] = defaultdict(set)
    for name, own in zip(width.producers, width.rows, strict=True):
        rows[name] |= set(own)
    whole = all(
        isinstance(layer := read_layer(graph_module, nodes[name]), Site)
        and len(found) == layer.out_features * layer.groups
        for name, found in rows.items()
    )
    shaped = [*(view.node for view in width.views), *(size.node for size in width.sizes)]
    return (
        width.kind == "channels"
        and whole
        and not any(annotation(node).discarded for node in _carriers(nodes, width))
        and all(_is_replaceable(graph_module, nodes[name]) for name in shaped)
        and all(_is_chunk(nodes[reader.node], width) for reader in width.readers)
        and all(_is_layer(graph_module, node) or _is_own(graph_module, node) for node in _between(graph_module, width))
    )


def _carriers(nodes: Mapping[str, fx.Node], width: Width) -> set[fx.Node]:
    """The nodes from a width's first layers to its last ones, among them all that carry its features."""
    found: set[fx.Node] = set()
    pending = [nodes[name] for name in width.producers]
    while pending:
        node = pending.pop()
        if node not in found and node.name not in width.consumers:
            found.add(node)
            pending += node.users
    return found


def find_layouts(graph_module: fx.GraphModule) -> dict[str, Layout]:
    """The layout of each layer that may be replaced, by `Site.name`, in a graph whose sizes have been chosen."""
    cuts = find_cuts(graph_module)
    reads: dict[str, _Found] = {}
    writes: dict[str, _Found] = {}
    for own in changed_widths(graph_record(graph_module)):
        width, any_size = own.width, passes(graph_module, own.width)
        between = (*width.between, *width.fused)
        written = {name: _Found.of(_places(cuts[name].written), any_size) for name in (*between, *width.producers)}
        reads |= {name: _Found.of(own.read_places(name), any_size) for name in width.consumers}
        reads |= {name: written[name] for name in between}
        writes |= written
    return dict(_layouts(graph_module, reads, writes))


def find_constants(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """The paths of the parameters that become narrower in the user's model, in a graph whose sizes have been chosen."""
    changed = [own.width for own in changed_widths(graph_record(graph_module)) if passes(graph_module, own.width)]
    between = [node for width in changed for node in _between(graph_module, width)]
    return tuple(dict.fromkeys(str(node.target) for node in between if node.op == "get_attr"))


@dataclass(frozen=True)
class _Found:
    """Where the model has a layer's features.

    Attributes:
        features: the number of features in the model; None for as many as before.
        places: None for all of them, in their order.
    """

    features: int | None = None
    places: Tensor | None = None

    @classmethod
    def of(cls, places: Tensor, passes: bool) -> _Found:
        """The places of features of a width; of one that passes, the model has no others."""
        return cls(len(places)) if passes else cls(None, places)


def _layouts(
    graph_module: fx.GraphModule, reads: Mapping[str, _Found], writes: Mapping[str, _Found]
) -> Iterator[tuple[str, Layout]]:
    for name, (site, used) in layers_of(graph_module).items():
        path = owner_of(used[0])
        if path is not None:
            read, written = (found.get(used[0].name, _Found()) for found in (reads, writes))
            inputs = site.in_features // site.taps * site.groups if read.features is None else read.features
            outputs = site.out_features * site.groups if written.features is None else written.features
            yield name, Layout(path, inputs, outputs, read.places, written.places, feature_axis(site))


def _places(written: tuple[Narrowed, ...]) -> Tensor:
    """The places [O] of a layer's new outputs among the old ones."""
    return torch.cat(
        [(own.rows[:, : own.size] if own.kept is None else own.rows[:, own.kept]).flatten() for own in written]
    )


def _is_replaceable(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node belongs to a layer, all of whose code is replaced with it."""
    known = graph_record(graph_module).modules or {}
    return known.get(owner_of(node) or "") == "layer" and not annotation(node).keeps_weights


def _between(graph_module: fx.GraphModule, width: Width) -> list[fx.Node]:
    """The layers and constants along a width's features."""
    names = {*width.between, *width.fused}
    return [node for node in graph_module.graph.nodes if node.name in names]


def _is_layer(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(read_layer(graph_module, node), Site)


def _is_own(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a value is a parameter of the user's model itself, so that a narrower one may take its place."""
    return str(node.target) in graph_record(graph_module).parameters and not annotation(node).computed_from


def _is_chunk(node: fx.Node, width: Width) -> bool:
    """Whether a node reads one of the equal parts into which a value is divided, whatever its size."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target in _CHUNKS and len(set(map(len, width.rows))) == 1
