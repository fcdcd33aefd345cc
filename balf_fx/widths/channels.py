"""Channels: features that pass from layer to layer through operations that treat each feature separately.

A *space* is a set of values that hold the same features, each on an axis of its own. A layer may output several values
for each feature, such as a gate and what it scales: its output is another space, of which nodes of the first one read
parts (`widths.moves`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from balf_fx.graph.annotation import annotation
from balf_fx.graph.layers import read_layer, site_input
from balf_fx.graph.parameters import get_tensor, owns_weight, parameter_users, readers
from balf_fx.graph.site import Reason, Site
from balf_fx.graph.widths import Reader, Size, View, Width
from balf_fx.widths.elementwise import is_elementwise, is_glu, is_separate, passes_on
from balf_fx.widths.moves import (
    Moves,
    feature_axis,
    is_fixed,
    is_harmless,
    is_shaped,
    numbered,
    read_layout,
    reads_size,
)

_LEAST = 8  # the least number of features that is worth reducing


@dataclass(frozen=True)
class _Selection:
    """A node that reads some rows of a wider value, one row for each of its features; for GLU, two.

    Attributes:
        source, axis: the wider value, and the axis of its rows.
        readers: how each part is read; empty for GLU, which halves the axis whatever its size.
    """

    node: fx.Node
    source: fx.Node
    axis: int
    rows: tuple[tuple[int, ...], ...]
    reader: Reader | None = None


@dataclass
class Space:
    """All values that hold the features, each with their axis."""

    axes: dict[fx.Node, int] = field(default_factory=dict)
    producers: list[fx.Node] = field(default_factory=list)
    consumers: list[fx.Node] = field(default_factory=list)
    between: list[fx.Node] = field(default_factory=list)
    shaped: list[fx.Node] = field(default_factory=list)
    selections: list[_Selection] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)

    def views(self, layer: str = "") -> list[View]:
        return [View(node.name, self.axes[node], layer) for node in self.shaped]


class UnsupportedError(Exception):
    """An operation in the space mixes the features, or needs all of them."""


def find_channels(graph_module: fx.GraphModule) -> Iterator[Width]:
    """The widths of kind "channels" in an annotated and profiled graph."""
    yield from channels_of(Finder(graph_module))


def channels_of(finder: Finder) -> Iterator[Width]:
    """The widths that a finder finds in its graph."""
    seen: set[fx.Node] = set()
    for node in finder.graph_module.graph.nodes:
        site = annotation(node).site
        if site is None or not finder.is_layer(node, site):
            continue
        source = site_input(node)
        shape = annotation(source).shape
        if source in seen or shape is None:
            continue
        features = finder.inputs(site)
        try:
            space = finder.grow(source, _feature_axis(site, shape), features)
            wide = finder.grow_wide(space)
        except UnsupportedError:
            continue
        seen.update(space.axes)
        width = _width(space, wide, features)
        if width is not None:
            yield width


def _width(space: Space, wide: Sequence[Space], features: int) -> Width | None:
    """The width of a space, if it lies between layers that may change."""
    consumers = sorted(space.consumers, key=lambda n: -(annotation(n).flops or 0))
    written = [(producer, tuple(range(features))) for producer in space.producers]
    for each in wide:
        parts = sorted(dict.fromkeys(rows for own in space.selections for rows in own.rows if own.source in each.axes))
        written += [(producer, rows) for producer in each.producers for rows in parts]
    layers = {producer for producer, _ in written}
    site = annotation(consumers[0]).site if consumers else None
    if features < _LEAST or not layers or site is None:
        return None
    return Width(
        "channels",
        site.name,
        features,
        producers=tuple(producer.name for producer, _ in written),
        consumers=tuple(consumer.name for consumer in consumers),
        rows=tuple(rows for _, rows in written),
        between=tuple(node.name for node in space.between),
        fused=tuple(node.name for each in wide for node in each.between),
        fused_layer=next((each.producers[0].name for each in wide if each.between), ""),
        readers=tuple(_reader(own.reader, own.source, wide) for own in space.selections if own.reader is not None),
        sizes=tuple(size for each in (space, *wide) for size in each.sizes),
        views=(*space.views(), *(view for each in wide for view in each.views(each.producers[0].name))),
    )


def _reader(reader: Reader, source: fx.Node, wide: Sequence[Space]) -> Reader:
    """The reader with the layers that output what it reads."""
    layers = (producer.name for each in wide if source in each.axes for producer in each.producers)
    return dataclasses.replace(reader, layers=tuple(layers))


def feature_axis_of(layer: fx.Node) -> int:
    """The axis of the output features of a site."""
    site, shape = annotation(layer).site, annotation(layer).shape or ()
    return len(shape) - 1 if site is None else _feature_axis(site, shape)


def _feature_axis(site: Site, shape: tuple[int, ...]) -> int:
    return len(shape) - 1 if site.conv is None else len(shape) - 1 - len(site.conv.kernel_size)


class Finder:
    """Follows features through one graph."""

    most: float = 4  # layers around one space, as in a gated block with squeeze-and-excitation

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.users = parameter_users(graph_module)
        self.moves = Moves(graph_module)

    def inputs(self, site: Site) -> int:
        """The number of input features of a layer with one group: the channels for a convolution."""
        return site.in_features // site.taps

    def is_layer(self, node: fx.Node, site: Site) -> bool:
        """Whether rows and columns of a layer may be removed: nothing else reads its weight."""
        mark = annotation(node)
        if mark.refusal is not None and mark.refusal.reason is not Reason.TOO_SMALL:
            return False
        plain = site.groups == 1 and not (site.keeps_weight or site.has_experts)
        return plain and self._owns(node, site)

    def grow(self, source: fx.Node, axis: int, features: int, parts: frozenset[fx.Node] = frozenset()) -> Space:
        """All values and layers that depend on the number of features at one value.

        Args:
            parts: for a wide space, the nodes that may read parts of it; other moves must be separate from these.
        """
        space = Space()
        pending = [(source, axis)]
        while pending:
            node, axis = pending.pop()
            if node in space.axes:
                if space.axes[node] != axis:
                    raise UnsupportedError
                continue
            shape = annotation(node).shape
            if shape is None or not -1 < axis < len(shape) or shape[axis] != features:
                raise UnsupportedError
            space.axes[node] = axis
            if self.moves.is_move(node) and is_fixed(self.graph_module, node, axis):
                raise UnsupportedError
            if self.moves.is_move(node) and is_shaped(node):
                space.shaped.append(node)
            pending += self.sources(node, axis, features, space)
            pending += self.readers(node, axis, space, parts)
            if len(space.producers) + len(space.consumers) > self.most:
                raise UnsupportedError
        return space

    def grow_wide(self, space: Space) -> list[Space]:
        """The spaces of which nodes of this one read parts."""
        wide: list[Space] = []
        nodes = frozenset(own.node for own in space.selections)
        for own in space.selections:
            if any(own.source in each.axes for each in wide):
                continue
            shape = annotation(own.source).shape or ()
            each = self.grow(own.source, own.axis, shape[own.axis], nodes)
            parts = {rows for other in space.selections if other.source in each.axes for rows in other.rows}
            covered = [row for rows in parts for row in rows]
            if each.consumers or each.selections or not each.producers or len(covered) != len(set(covered)):
                raise UnsupportedError
            halves = any(other.reader is None for other in space.selections if other.source in each.axes)
            whole = len(covered) == shape[own.axis]
            plain = len(each.producers) == 1 and not each.between
            if not (whole or (plain and not halves)) or (halves and len(parts) != 2):
                raise UnsupportedError
            known = {*each.axes, *nodes}
            rests = [self.moves.rests(node, own_axis, covered, known) for node, own_axis in each.axes.items()]
            for found in rests:
                if found is None:
                    raise UnsupportedError
                each.sizes += found[1]
            wide.append(each)
        return wide

    def sources(self, node: fx.Node, axis: int, features: int, space: Space) -> list[tuple[fx.Node, int]]:
        """The values from which a node gets the features; none for a layer, which computes them."""
        layer, mark = read_layer(self.graph_module, node), annotation(node)
        shape = mark.shape or ()
        if isinstance(layer, Site):
            along = axis == _feature_axis(layer, shape)
            if along and _is_depthwise(layer, features) and self._owns(node, layer) and not mark.keeps_weights:
                space.between.append(node)
                return [(site_input(node), axis)]
            if along and self.is_layer(node, layer) and layer.out_features == features:
                space.producers.append(node)
                return []
            raise UnsupportedError
        if is_glu(self.graph_module, node, axis):
            half = tuple(range(features))
            source = node.all_input_nodes[0]
            rows = (half, tuple(row + features for row in half))
            space.selections.append(_Selection(node, source, axis, rows))
            return []
        if passes_on(self.graph_module, node, axis):
            if node.op == "call_module" and is_separate(self.graph_module, node, axis):
                space.between.append(self.module(node))
            return self.operands(node, axis, features, space)
        if self.moves.is_move(node):
            return self._moved_from(node, axis, space)
        raise UnsupportedError

    def operands(self, node: fx.Node, axis: int, features: int, space: Space) -> list[tuple[fx.Node, int]]:
        """The sources of an elementwise operation, without those that are the same for all features."""
        found: list[tuple[fx.Node, int]] = []
        for source in node.all_input_nodes:
            own = self.source_axis(node, source, axis)
            size = annotation(source).shape
            if own is None or size is None or size[own] == 1:
                continue  # broadcast along the features
            if source.op == "get_attr":
                space.between.append(self.constant(source, own, features))
            else:
                found.append((source, own))
        if not found:
            raise UnsupportedError
        return found

    def constant(self, node: fx.Node, axis: int, features: int) -> fx.Node:
        """A constant that holds one entry, or several, for each feature, if nothing else reads it."""
        size = annotation(node).shape or ()
        everywhere = self.users[id(get_tensor(self.graph_module, str(node.target)))]
        shared = len(node.users) > 1 or annotation(node).shared or not everywhere <= readers(node)
        if shared or size.count(features) != 1 or size[axis] != features:
            raise UnsupportedError
        return node

    def module(self, node: fx.Node) -> fx.Node:
        """A call of a module with entries for each feature, if nothing else calls it or reads what it holds."""
        module = self.graph_module.get_submodule(str(node.target))
        readers = [self.users[id(tensor)] for tensor in (*module.parameters(), *module.buffers())]
        calls, mark = node.graph.find_nodes(op=node.op, target=node.target), annotation(node)
        if mark.keeps_weights or mark.shared or len(calls) > 1 or not all(own <= {node} for own in readers):
            raise UnsupportedError
        return node

    def _moved_from(self, node: fx.Node, axis: int, space: Space) -> list[tuple[fx.Node, int]]:
        """The value whose features a move returns: its source, or none if it reads a part of a wider value."""
        source: Any = node.args[0] if node.args else None
        shape = annotation(source).shape if isinstance(source, fx.Node) else None
        for own in range(len(shape or ())):
            if self.moves.keeps(node, source, own) == axis:
                return [(source, own)]
        chain = self.moves.chain(node)
        for own in range(len(annotation(chain[0]).shape or ())):
            selection = self._selection(chain, own, axis)
            if selection is not None:
                space.selections.append(selection)
                return []
        raise UnsupportedError

    def _selection(self, chain: Sequence[fx.Node], own: int, axis: int) -> _Selection | None:
        """How the last node of a chain reads rows of an axis of the last value on it that holds all of them."""
        labels = self.moves.along(chain[0], own)
        values = None if labels is None else self.moves.run_chain(chain, labels)
        if labels is None or values is None:
            return None
        part, source = feature_axis(values[chain[-1]]), chain[0]
        if part is None or part[0] != axis or len(part[1]) == labels.shape[own]:
            return None
        for following in chain[1:-1]:
            kept = self.moves.keeps(following, source, own)
            if kept is None:
                break
            source, own = following, kept
        shape = annotation(source).shape or ()
        numbers = numbered(shape)
        moved = self.moves.run_chain(chain[chain.index(source) :], numbers)
        layout = None if moved is None else read_layout(moved[chain[-1]], shape, own)
        if layout is None or len(layout.sizes) != 1:
            return None
        reader = Reader(source.name, own, chain[-1].name, layout.rows, layout.sizes, layout.axes)
        return _Selection(chain[-1], source, own, (layout.rows,), reader)

    def readers(self, node: fx.Node, axis: int, space: Space, parts: frozenset[fx.Node]) -> list[tuple[fx.Node, int]]:
        found = []
        for user in node.users:
            if user in parts or self.ignores(user, axis):
                continue
            if reads_size(user):
                space.sizes.append(_own_size(user, node, axis))
                continue
            layer = read_layer(self.graph_module, user)
            if isinstance(layer, Site):
                found += self.read_by(user, layer, node, axis, space)
                continue
            own = self.user_axis(node, user, axis)
            if own is not None:
                found.append((user, own))
            elif not parts or not self.moves.is_move(user):  # what moves of a wide space read is checked later
                raise UnsupportedError
        return found

    def read_by(self, user: fx.Node, layer: Site, node: fx.Node, axis: int, space: Space) -> list[tuple[fx.Node, int]]:
        """What a layer makes of the features: nothing if it mixes them, its output if it is a depthwise convolution."""
        shape = annotation(node).shape or ()
        if site_input(user) is not node:
            raise UnsupportedError
        along = axis == _feature_axis(layer, shape)
        if along and _is_depthwise(layer, shape[axis]):
            return [(user, axis)]
        whole = along and self.inputs(layer) == shape[axis]
        if annotation(user).site is None or not self.takes(user, layer) or not whole:
            raise UnsupportedError
        space.consumers.append(user)
        return []

    def ignores(self, user: fx.Node, axis: int) -> bool:
        """Whether a reader does not depend on the features on an axis."""
        return is_harmless(user, axis)

    def takes(self, user: fx.Node, layer: Site) -> bool:
        """Whether a layer that reads the features may be changed with them."""
        return self.is_layer(user, layer)

    def _owns(self, node: fx.Node, layer: Site) -> bool:
        return owns_weight(self.graph_module, self.users, node, layer)

    def source_axis(self, node: fx.Node, source: fx.Node, axis: int) -> int | None:
        """The axis of a node's features on one of its sources; None if the source is broadcast along them."""
        shape, own = annotation(node).shape, annotation(source).shape
        if shape is None or own is None:
            return None
        if not is_elementwise(self.graph_module, node):  # pools only affect the axes after the features
            return 0 if len(own) == 1 and is_separate(self.graph_module, node, axis) else axis
        from_right = axis - len(shape)
        return len(own) + from_right if len(own) >= -from_right else None

    def user_axis(self, node: fx.Node, user: fx.Node, axis: int) -> int | None:
        """The axis of a node's features on the value of a user; None if the user mixes them."""
        shape, own = annotation(user).shape, annotation(node).shape
        if shape is None or own is None:
            return None
        if passes_on(self.graph_module, user, axis):
            return len(shape) - (len(own) - axis) if is_elementwise(self.graph_module, user) else axis
        return self.moves.keeps(user, node, axis)


def _own_size(user: fx.Node, node: fx.Node, axis: int) -> Size:
    """A node that reads the shape of a value, in which the number of features is that of the original model."""
    shape = annotation(node).shape
    if shape is None or any(reader.op == "output" for reader in user.users):
        raise UnsupportedError
    return Size(user.name, node.name, tuple(None if i == axis else i for i in range(len(shape))), shape)


def _is_depthwise(layer: Site, features: int) -> bool:
    return layer.conv is not None and layer.groups == features and layer.out_features == 1 and not layer.inputs_first
