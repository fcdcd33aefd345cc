"""Features whose order may change, but not their number: channels, and those of a stream that is normalised.

A layer that is written with pivots needs its features in another order (`ranks.pivots`). All other layers that read
or output these features take this order over, and so do constants, normalisations and embeddings between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from torch import fx

from balf_fx.graph.annotation import annotation
from balf_fx.graph.layers import read_layer
from balf_fx.graph.parameters import get_tensor
from balf_fx.graph.site import Site
from balf_fx.graph.widths import Width
from balf_fx.widths.channels import channels_of
from balf_fx.widths.elementwise import is_concatenation, is_normalisation, is_reduction, table_of
from balf_fx.widths.following import Finder
from balf_fx.widths.spaces import Space, UnsupportedError


def find_orders(graph_module: fx.GraphModule) -> Iterator[Width]:
    """The widths of an annotated and profiled graph whose features may change their order."""
    return simple_ones(graph_module, channels_of(_OrderFinder(graph_module)))


def simple_ones(graph_module: fx.GraphModule, widths: Iterable[Width]) -> Iterator[Width]:
    """The widths that are all that the layers before them output, one row for each feature."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    return (width for width in widths if _is_simple(graph_module, nodes, width))


def _is_simple(graph_module: fx.GraphModule, nodes: Mapping[str, fx.Node], width: Width) -> bool:
    whole = tuple(range(width.features))
    return (
        width.kind == "channels"
        and width.block == 1
        and all(
            width.producers.count(name) == 1
            and rows == whole
            and isinstance(layer := annotation(nodes[name]).site or read_layer(graph_module, nodes[name]), Site)
            and layer.out_features * layer.groups == width.features
            and layer.parts == 1
            for name, rows in zip(width.producers, width.rows, strict=True)
        )
    )


class _OrderFinder(Finder):
    """Follows features through all operations for which their order does not matter."""

    most = math.inf
    follows_joins = False  # each layer would keep its features among themselves
    follows_blocks = False  # and each block

    def grow(self, source: fx.Node, axis: int, features: int, parts: frozenset[fx.Node] = frozenset()) -> Space:
        self._tied: list[fx.Node] = []
        space = super().grow(source, axis, features, parts)
        self._check_tables(space)
        return space

    def ignores(self, user: fx.Node, axis: int) -> bool:
        return super().ignores(user, axis) or is_reduction(user, axis)

    def takes(self, user: fx.Node, layer: Site) -> bool:
        if self.is_layer(user, layer):
            return True
        plain = layer.groups == 1 and layer.conv is None and not layer.has_experts
        if plain and annotation(user).refusal is None and not annotation(user).shared:
            self._tied.append(user)  # `_check_tables` checks what else reads its weight
            return True
        return False

    def sources(self, node: fx.Node, axis: int, features: int, space: Space) -> list[tuple[fx.Node, int]]:
        if node.op == "get_attr":
            space.between.append(self.constant(node, axis, features))
            return []
        if table_of(self.graph_module, node, axis) is not None:
            space.between.append(node)
            return []
        if is_normalisation(self.graph_module, node, axis):
            space.between += [node] if node.op == "call_module" else []
            return self.operands(node, axis, features, space)
        if is_concatenation(node, axis):
            return [(source, axis) for source in node.all_input_nodes]
        return super().sources(node, axis, features, space)

    def source_axis(self, node: fx.Node, source: fx.Node, axis: int) -> int | None:
        if is_normalisation(self.graph_module, node, axis) and source is not node.all_input_nodes[0]:
            if source.op != "get_attr":  # a gain that the graph computes
                raise UnsupportedError
            return 0
        return super().source_axis(node, source, axis)

    def user_axis(self, node: fx.Node, user: fx.Node, axis: int) -> int | None:
        if is_normalisation(self.graph_module, user, axis) or is_concatenation(user, axis):
            return axis
        return super().user_axis(node, user, axis)

    def _check_tables(self, space: Space) -> None:
        """Check that all calls of normalisations and readers of embeddings and of tied weights belong to the space."""
        own = {*space.between, *self._tied}
        layers = [read_layer(self.graph_module, node) for node in self._tied]
        paths = [layer.weight for layer in layers if isinstance(layer, Site)]
        for node in space.between:
            if node.op == "call_module" and not own.issuperset(node.graph.find_nodes(op=node.op, target=node.target)):
                raise UnsupportedError
            path = table_of(self.graph_module, node, len(annotation(node).shape or ()) - 1)
            paths += [] if path is None else [path]
        tables = {id(get_tensor(self.graph_module, path)) for path in paths[len(self._tied) :]}
        across = (layer for layer in layers if isinstance(layer, Site) and layer.inputs_first)
        if any(id(get_tensor(self.graph_module, layer.weight)) in tables for layer in across):
            raise UnsupportedError  # it reads the table along its other axis
        for path in paths:
            if not self.users[id(get_tensor(self.graph_module, path))] <= own:
                raise UnsupportedError
