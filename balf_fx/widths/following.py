"""Follow features from value to value, through all that treats each of them separately."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from balf_fx.graph.annotation import annotation
from balf_fx.graph.layers import read_layer, site_input
from balf_fx.graph.parameters import get_tensor, owns_weight, parameter_users, readers
from balf_fx.graph.site import Reason, Site
from balf_fx.graph.widths import Reader, Size
from balf_fx.widths.elementwise import (
    is_elementwise,
    is_glu,
    is_separate,
    joins,
    normalised_groups,
    passes_on,
    reduced_from,
)
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
from balf_fx.widths.spaces import Selection, Space, Step, UnsupportedError


def feature_axis_of(layer: fx.Node) -> int:
    """The axis of the output features of a site."""
    site, shape = annotation(layer).site, annotation(layer).shape or ()
    return len(shape) - 1 if site is None else site_axis(site, shape)


def site_axis(site: Site, shape: tuple[int, ...]) -> int:
    """The axis of a site's features in a value of this shape."""
    return len(shape) - 1 if site.conv is None else len(shape) - 1 - len(site.conv.kernel_size)


class Finder:
    """Follows features through one graph."""

    most: float = 4  # layers around one space, as in a gated block with squeeze-and-excitation
    most_joined: float = 12  # the same where values are concatenated, as the branches of an Inception block
    follows_joins: bool = True
    follows_blocks: bool = True

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.users = parameter_users(graph_module)
        self.moves = Moves(graph_module)

    def inputs(self, site: Site) -> int:
        """The number of input features of each group of a layer: the channels for a convolution."""
        return site.in_features // site.taps

    def layer_name(self, node: fx.Node) -> str:
        """The name of a layer, which is the same in all graphs of a model."""
        layer = annotation(node).site or read_layer(self.graph_module, node)
        return layer.name if isinstance(layer, Site) else node.name

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
        space.reach(source, axis, space.more(features))
        pending = [source]
        while pending:
            node = pending.pop()
            axis, held = space.axes[node], space.held[node]
            shape = annotation(node).shape
            if shape is None or not -1 < axis < len(shape) or shape[axis] != len(held):
                raise UnsupportedError
            if self.moves.is_move(node) and is_fixed(self.graph_module, node, axis):
                raise UnsupportedError
            if self.moves.is_move(node) and is_shaped(node):
                space.shaped.append(node)
            steps = self._steps(node, axis, space, parts)
            pending += [own for own, own_axis, own_held in steps if space.reach(own, own_axis, own_held)]
            if len(space.producers) + len(space.consumers) > (self.most_joined if space.joined else self.most):
                raise UnsupportedError
        if space.joined and (space.selections or space.shaped):
            raise UnsupportedError
        if space.block > 1 and (parts or space.joined or space.selections or space.block == space.features):
            raise UnsupportedError
        return space

    def _steps(self, node: fx.Node, axis: int, space: Space, parts: frozenset[fx.Node]) -> Iterator[Step]:
        """The values next to one, which hold the same features or more."""
        held = space.held[node]
        for user in node.users:
            if self._joins(user, axis):
                yield from self._joined(user, axis, space)
        if self._joins(node, axis):
            yield from self._joined(node, axis, space)
        else:
            yield from ((own, own_axis, held) for own, own_axis in self.sources(node, axis, len(held), space))
        yield from ((own, own_axis, held) for own, own_axis in self.readers(node, axis, space, parts))

    def _joins(self, node: fx.Node, axis: int) -> bool:
        return self.follows_joins and joins(node, axis)

    def _joined(self, node: fx.Node, axis: int, space: Space) -> list[Step]:
        """A concatenation and its sources, each with the features that it holds; unknown ones are further features."""
        sources: Any = node.args[0] if node.args else node.kwargs["tensors"]
        shapes = [annotation(source).shape or () for source in sources]
        if len(set(sources)) < len(sources) or any(len(shape) <= axis for shape in shapes):
            raise UnsupportedError
        sizes = [shape[axis] for shape in shapes]
        whole = space.held.get(node)
        if whole is None:
            known = (space.held.get(source) or space.more(size) for source, size in zip(sources, sizes, strict=True))
            whole = tuple(itertools.chain.from_iterable(known))
        starts = itertools.accumulate(sizes, initial=0)
        parts = zip(sources, starts, sizes, strict=False)
        return [*((source, axis, whole[start : start + size]) for source, start, size in parts), (node, axis, whole)]

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
            mixed = each.joined or each.consumers or each.selections or not each.producers
            if mixed or len(covered) != len(set(covered)):
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
            along = axis == site_axis(layer, shape)
            if along and self._is_apart(layer, features) and self._owns(node, layer) and not mark.keeps_weights:
                space.block = math.lcm(space.block, layer.out_features)
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
            space.selections.append(Selection(node, source, axis, rows))
            return []
        groups = normalised_groups(self.graph_module, node, axis)
        if groups is not None:
            return self._normalised(node, features // groups, space)
        if passes_on(self.graph_module, node, axis) or reduced_from(node) is not None:
            if node.op == "call_module" and is_separate(self.graph_module, node, axis):
                space.between.append(self.module(node))
            return self.operands(node, axis, features, space)
        if self.moves.is_move(node):
            return self._moved_from(node, axis, space)
        raise UnsupportedError

    def _normalised(self, node: fx.Node, block: int, space: Space) -> list[tuple[fx.Node, int]]:
        """The source of a normalisation of blocks of features, which is the same without some of the blocks."""
        source: Any = node.args[0] if node.args else None
        if not self.follows_blocks or not isinstance(source, fx.Node):
            raise UnsupportedError
        space.block = math.lcm(space.block, block)
        space.between.append(self.module(node) if node.op == "call_module" else node)
        affine = [each for each in node.all_input_nodes if each is not source]
        if not all(each.op == "get_attr" for each in affine):
            raise UnsupportedError
        space.between += [self.constant(each, 0, space.features) for each in affine]
        return [(source, 1)]

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

    def _selection(self, chain: Sequence[fx.Node], own: int, axis: int) -> Selection | None:
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
        return Selection(chain[-1], source, own, (layout.rows,), reader)

    def readers(self, node: fx.Node, axis: int, space: Space, parts: frozenset[fx.Node]) -> list[tuple[fx.Node, int]]:
        found = []
        for user in node.users:
            if user in parts or self.ignores(user, axis) or self._joins(user, axis):
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
        """What a layer makes of the features: nothing if it mixes them, its output if it treats groups apart."""
        shape = annotation(node).shape or ()
        if site_input(user) is not node:
            raise UnsupportedError
        along = axis == site_axis(layer, shape)
        if along and self._is_apart(layer, shape[axis]):
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

    def _is_apart(self, layer: Site, features: int) -> bool:
        """Whether each group of a convolution's outputs stands for as many of its inputs: one if it is depthwise."""
        together = layer.out_features
        if layer.conv is None or layer.inputs_first or together * layer.groups != features:
            return False
        return together == self.inputs(layer) and (together == 1 or (self.follows_blocks and layer.groups > 1))

    def source_axis(self, node: fx.Node, source: fx.Node, axis: int) -> int | None:
        """The axis of a node's features on one of its sources; None if the source is broadcast along them."""
        shape, own = annotation(node).shape, annotation(source).shape
        if shape is None or own is None:
            return None
        reduced = reduced_from(node)
        if reduced is not None:
            return reduced[axis]
        if not is_elementwise(self.graph_module, node):  # pools only affect the axes after the features
            return 0 if len(own) == 1 and is_separate(self.graph_module, node, axis) else axis
        from_right = axis - len(shape)
        return len(own) + from_right if len(own) >= -from_right else None

    def user_axis(self, node: fx.Node, user: fx.Node, axis: int) -> int | None:
        """The axis of a node's features on the value of a user; None if the user mixes them."""
        shape, own = annotation(user).shape, annotation(node).shape
        if shape is None or own is None:
            return None
        reduced = reduced_from(user)
        if reduced is not None:
            return reduced.index(axis) if axis in reduced else None
        if normalised_groups(self.graph_module, user, axis) is not None:
            return axis
        if passes_on(self.graph_module, user, axis):
            return len(shape) - (len(own) - axis) if is_elementwise(self.graph_module, user) else axis
        return self.moves.keeps(user, node, axis)


def _own_size(user: fx.Node, node: fx.Node, axis: int) -> Size:
    """A node that reads the shape of a value, in which the number of features is that of the original model."""
    shape = annotation(node).shape
    if shape is None or any(reader.op == "output" for reader in user.users):
        raise UnsupportedError
    return Size(user.name, node.name, tuple(None if i == axis else i for i in range(len(shape))), shape)
