"""Heads: features of attention, whose basis may be changed without changing the output.

The product of queries and keys sums over the features of each head. Values are averaged over positions, and the output
projection reads them. To find the rows of the layers that compute these features, the *indices* of the features are
passed through the model's own reshapes, permutations and splits (`widths.moves`).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from balf_fx.graph.annotation import annotation
from balf_fx.graph.layers import site_input
from balf_fx.graph.operators import aten, operation
from balf_fx.graph.parameters import owns_weight, parameter_users
from balf_fx.graph.widths import Operand, Size, View, Width
from balf_fx.widths.moves import Moves, is_harmless, is_shaped, numbered, read_size, reads_size

_ATTENTIONS = (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)
_PRODUCTS = (torch.matmul, torch.bmm, operator.matmul, aten.matmul.default, aten.bmm.default, "matmul", "bmm")
_SUMS = (torch.baddbmm, aten.baddbmm.default, "baddbmm")  # a product that is added to the first argument
_SCALINGS = ("mul", "div", "imul", "itruediv")
_LEAST = 8


@dataclass(frozen=True)
class _Operand:
    """The part of a layer that a product reads: its rows [heads, features], moved and scaled.

    Attributes:
        merged: whether the batch and the heads are one axis.
        source: the value that holds the whole output of the layer.
    """

    rows: Tensor
    scale: float
    transposed: bool
    sequence_first: bool
    merged: bool
    source: fx.Node


_Arrival = tuple[fx.Node | None, fx.Node, Tensor, float]
"""(reader, the node it reads, the moved value, its scale); the reader is None if the value cannot be followed."""


_Sized = Callable[[fx.Node, Any], Size | None]


def is_attention(product: fx.Node) -> bool:
    """Whether a node computes both products of attention."""
    return product.target in _ATTENTIONS


def requires_equal_heads(product: fx.Node) -> bool:
    """Whether heads of queries and of values must have one size: attention in one node only has fast kernels then."""
    if not is_attention(product) or len(product.args) < 3:
        return False
    shapes = [annotation(source).shape for source in (product.args[0], product.args[2]) if isinstance(source, fx.Node)]
    return len({shape[-1] if shape else None for shape in shapes} - {None}) == 1


def find_heads(graph_module: fx.GraphModule) -> Iterator[Width]:
    """The widths of kinds "queries" and "values" in an annotated and profiled graph."""
    finder = _Finder(graph_module)
    by_operand = {
        place: (node, operand)
        for node in graph_module.graph.nodes
        if finder.is_writer(node)
        for place, operand in finder.operands(node).items()
    }
    for product in dict.fromkeys(product for product, _ in by_operand):
        yield from finder.widths(product, by_operand)


class _Finder:
    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.users = parameter_users(graph_module)
        self.moves = Moves(graph_module)
        self.sizes: dict[fx.Node, list[Size]] = {}  # the readers of shapes behind a value

    def is_writer(self, node: fx.Node) -> bool:
        """Whether a node is a linear layer whose weight nothing else reads."""
        site = annotation(node).site
        if site is None or site.conv is not None or site.keeps_weight or site.has_experts:
            return False
        return owns_weight(self.graph_module, self.users, node, site)

    def operands(self, writer: fx.Node) -> dict[tuple[fx.Node, int], _Operand]:
        """The operands of products that read a part of a layer's output which nothing else reads."""
        found: dict[tuple[fx.Node, int], _Operand] = {}
        others: list[Tensor] = []  # rows that are read in other ways, or twice
        for root in self.roots(writer):
            shape = annotation(root).shape or ()
            numbers = numbered(shape)
            sized = partial(_size_before, root, shape)
            for user, source, moved, scale in self._follow(root, numbers, sized):
                places = [] if user is None else [i for i in _slots(user) if user.args[i] is source]
                operand = _read_rows(numbers, moved, scale, root) if len(places) == 1 else None
                if user is not None and operand is not None:
                    found[user, places[0]] = operand
                    others.append(torch.unique(operand.rows))
                else:
                    if moved is numbers:  # all rows, as of logits, whose numbers are many
                        rows = torch.arange(shape[-1], device="cpu")
                    else:
                        rows = torch.unique(moved % shape[-1]).to(torch.int64)
                    others += [rows, rows]
        reads = torch.cat(others).bincount() if others else torch.zeros(0, device="cpu")
        return {place: operand for place, operand in found.items() if (reads[operand.rows.flatten()] == 1).all()}

    def roots(self, writer: fx.Node) -> list[fx.Node]:
        """A layer whose output has at least three axes, or the reshapes that give it these."""
        rank = len(annotation(writer).shape or ())
        if rank > 2:
            return [writer]
        roots = [user for user in writer.users if not is_harmless(user, rank - 1)]
        ranks = [len(annotation(user).shape or ()) for user in roots]
        kept = [self.moves.keeps(user, writer, rank - 1) if is_shaped(user) else None for user in roots]
        return roots if min(ranks, default=0) > 2 and kept == [own - 1 for own in ranks] else []

    def _follow(self, start: fx.Node, value: Tensor, sized: _Sized) -> list[_Arrival]:
        """The readers of a value behind moves and scalings.

        Args:
            sized: how a node that reads the shape of a moved value can read it from the first one; these nodes are
                recorded in `sizes`.
        """
        values: dict[fx.Node, Any] = {start: value}
        scales = {start: 1.0}
        arrived: list[_Arrival] = []
        sizes = self.sizes[start] = []
        pending = [start]
        while pending:
            node = pending.pop()
            held = values[node]
            for user in node.users:
                if node is start and is_harmless(user, value.dim() - 1):
                    continue
                size = sized(user, held)
                if size is not None:
                    sizes.append(size)
                    continue
                scale = self._scale(user)
                moved = None
                if scale is not None:
                    moved = held if operation(user) in _SCALINGS else self.moves.run(user, values)
                if scale is None or moved is None:
                    reader = user if scale is None else None
                    pieces = [held] if isinstance(held, Tensor) else [each for each in held if each.numel() > 0]
                    arrived += [(reader if held is each else None, node, each, scales[node]) for each in pieces]
                    continue
                values[user], scales[user] = moved, scales[node] * scale
                pending.append(user)
        return arrived

    def _scale(self, node: fx.Node) -> float | None:
        """The factor by which a node scales, if it only moves or scales values; else None."""
        if operation(node) in _SCALINGS and len(node.args) == 2 and isinstance(node.args[1], int | float):
            return 1 / node.args[1] if "div" in operation(node) else float(node.args[1])
        return 1.0 if self.moves.is_move(node) else None

    def widths(
        self, product: fx.Node, by_operand: dict[tuple[fx.Node, int], tuple[fx.Node, _Operand]]
    ) -> Iterator[Width]:
        """The widths at one product."""
        query, key, *others = [by_operand.get((product, position)) for position in _slots(product)]
        if query is not None and key is not None:
            yield from self._queries(product, query, key)
        values = others[0] if others else (key if query is None else None)
        if values is not None and product.target not in _SUMS:
            yield from self._values(product, *values)

    def _queries(
        self, product: fx.Node, query: tuple[fx.Node, _Operand], key: tuple[fx.Node, _Operand]
    ) -> Iterator[Width]:
        (q_writer, q), (k_writer, k) = query, key
        unique = _unique_heads(k.rows)
        features = q.rows.shape[1]
        alike = (q.sequence_first, q.merged) == (k.sequence_first, k.merged) and not q.transposed
        alike = alike and k.transposed != is_attention(product)  # else their features are not summed
        if unique is None or not alike or features != k.rows.shape[1] or features < _LEAST:
            return
        if len(q.rows) % len(unique) or len(torch.unique(q.rows)) != q.rows.numel():
            return
        first, second = _slots(product)[:2]
        yield Width(
            "queries",
            f"{_site_name(q_writer)}:queries",
            features,
            producers=(q_writer.name, k_writer.name),
            heads=len(unique),
            repeat=len(q.rows) // len(unique),
            rows=(_flat(q.rows), _flat(unique)),
            views=(*_views(q_writer, q), *_views(k_writer, k)),
            sizes=(*self.sizes[q.source], *self.sizes[k.source]),
            product=product.name,
            operands=(_operand(first, q_writer, q, q.rows), _operand(second, k_writer, k, unique)),
            sequence_first=q.sequence_first,
        )

    def _values(self, product: fx.Node, writer: fx.Node, v: _Operand) -> Iterator[Width]:
        shape, unique = annotation(product).shape, _unique_heads(v.rows)
        if shape is None or len(shape) < 3 or v.rows.shape[1] < _LEAST or unique is None or v.transposed:
            return
        if v.merged:
            shape = (shape[0] // len(v.rows), len(v.rows), *shape[1:])
        heads, features = shape[-3], shape[-1]
        numbers = numbered(shape)
        merged = (numbers.movedim(-2, 0) if v.sequence_first else numbers.transpose(-3, -2)).flatten(-2)
        sized = partial(_size_behind, product, v, merged)
        arrived = self._follow(product, numbers.flatten(0, 1) if v.merged else numbers, sized)
        if len(arrived) != 1 or features != v.rows.shape[1] or heads % len(unique):
            return
        reader, source, moved, scale = arrived[0]
        site = None if reader is None else annotation(reader).site
        if reader is None or site is None or not self.is_writer(reader) or site_input(reader) is not source:
            return
        flat = moved.dim() == 2 and merged.dim() > 2
        expected = merged.flatten(0, -2) if flat else merged
        if scale != 1.0 or moved.shape != expected.shape or not torch.equal(moved, expected):
            return
        yield Width(
            "values",
            site.name,
            features,
            producers=(writer.name,),
            consumers=(reader.name,),
            heads=len(unique),
            repeat=heads // len(unique),
            rows=(_flat(unique),),
            views=_views(writer, v),
            sizes=(*self.sizes[v.source], *self.sizes[product]),
            product=product.name,
            operands=(_operand(2 if is_attention(product) else 1, writer, v, unique),),
            sequence_first=v.sequence_first,
        )


def _slots(product: fx.Node) -> tuple[int, ...]:
    """The positions of the arguments that a product multiplies; () if a node is no product."""
    slots: tuple[int, ...] = ()
    if is_attention(product):
        slots = (0, 1, 2)
    elif product.target in _PRODUCTS:
        slots = (0, 1)
    elif product.target in _SUMS:
        slots = (1, 2)
    return slots if len(product.args) > max(slots, default=0) else ()


def _read_rows(numbers: Tensor, moved: Tensor, scale: float, source: fx.Node) -> _Operand | None:
    """The rows in an operand [..., heads, positions, features]; None if its layout is not supported, or ambiguous."""
    found = []
    merged = moved.dim() == 3 and numbers.dim() == 3
    for transposed in (False, True):
        operand = moved.mT if transposed else moved
        for sequence_first in (False, True):
            batch = numbers.shape[1 if sequence_first else 0]
            if merged and len(operand) % batch:
                continue
            heads = operand.reshape(batch, -1, *operand.shape[1:]) if merged else operand
            if heads.dim() != numbers.dim() + 1 or heads.dim() < 4 or heads.numel() == 0:
                continue
            leading = (*numbers.shape[1:-1], numbers.shape[0]) if sequence_first else numbers.shape[:-1]
            if (*heads.shape[:-3], heads.shape[-2]) != leading:
                continue
            first = heads[(0,) * (heads.dim() - 3)][:, 0]
            rows = (first % numbers.shape[-1]).to(torch.int64)  # [heads, features]
            picked = numbers[..., rows.flatten()].reshape(*numbers.shape[:-1], *rows.shape)
            expected = picked.movedim(0, -2) if sequence_first else picked.transpose(-3, -2)
            if torch.equal(expected, heads):
                found.append(_Operand(rows, scale, transposed, sequence_first, merged, source))
    return found[0] if len(found) == 1 else None


def _size_before(root: fx.Node, shape: Sequence[int], user: fx.Node, moved: Any) -> Size | None:
    """How a node can read the shape of a part of a layer's output from the whole output."""
    return read_size(user, root, moved, shape, len(shape) - 1)


def _size_behind(product: fx.Node, v: _Operand, merged: Tensor, user: fx.Node, moved: Any) -> Size | None:
    """How a node can read the shape of a moved output of a product from that output.

    Args:
        merged: where the output's elements lie in the value that the output projection reads, [..., positions, heads *
            features] or sequence first.
    """
    if not isinstance(moved, Tensor) or not reads_size(user):
        return None
    place = merged.new_empty(merged.numel())
    place[merged.flatten().to(torch.int64)] = numbered(place.shape)
    size = read_size(user, product, place[moved.to(torch.int64)], merged.shape, merged.dim() - 1)
    batch, positions = (1, 0) if v.sequence_first else (0, 1)
    leading = {batch: None if v.merged else 0, positions: 1 if v.merged else 2}
    if size is None or merged.dim() != 3 or any(axis is not None and leading[axis] is None for axis in size.axes):
        return None
    return dataclasses.replace(size, axes=tuple(None if axis is None else leading[axis] for axis in size.axes))


def _operand(position: int, writer: fx.Node, read: _Operand, unique: Tensor) -> Operand:
    copies = len(read.rows) // len(unique)
    source = "" if read.source is writer else read.source.name
    return Operand(position, read.scale, read.transposed, copies, read.merged, source)


def _views(writer: fx.Node, read: _Operand) -> tuple[View, ...]:
    """The reshape from which an operand is read, if it is not the layer itself."""
    if read.source is writer:
        return ()
    return (View(read.source.name, len(annotation(read.source).shape or ()) - 1, writer.name),)


def _unique_heads(rows: Tensor) -> Tensor | None:
    """The rows of distinct heads, where copies of a head follow it directly; None for any other order."""
    count = len(torch.unique(rows, dim=0))
    unique = rows[:: len(rows) // count] if len(rows) % count == 0 else rows
    same = torch.equal(unique.repeat_interleave(len(rows) // len(unique), 0), rows)
    return unique if same and len(torch.unique(unique)) == unique.numel() else None


def _flat(rows: Tensor) -> tuple[int, ...]:
    return tuple(rows.flatten().tolist())


def _site_name(node: fx.Node) -> str:
    site = annotation(node).site
    return node.name if site is None else site.name
