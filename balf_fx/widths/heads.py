"""Heads: features of attention, whose basis may be changed without changing the output.

The product of queries and keys sums over the features of each head. Values are averaged over positions, and the output
projection reads them. To find the rows of the layers that compute these features, the *indices* of the features are
passed through the model's own reshapes, permutations and splits, so nothing is assumed about how it is written.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from balf_fx.graph.annotation import annotation
from balf_fx.graph.layers import site_input
from balf_fx.graph.operators import operation, reads_metadata
from balf_fx.graph.parameters import owns_weight, parameter_users
from balf_fx.graph.widths import Operand, Width

aten = torch.ops.aten


_ATTENTIONS = (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)


_PRODUCTS = (torch.matmul, torch.bmm, operator.matmul, aten.matmul.default, aten.bmm.default, "matmul", "bmm")


_MOVES = (
    *("reshape", "view", "flatten", "unflatten", "permute", "transpose", "movedim", "swapaxes", "contiguous", "clone"),
    *("unbind", "chunk", "split", "split_with_sizes", "tensor_split", "select", "getitem", "squeeze", "unsqueeze"),
    *("expand", "repeat_interleave", "dropout"),
)


_SCALINGS = ("mul", "div", "truediv", "imul", "itruediv")


_IDENTITIES = (nn.Identity, nn.Dropout)


_LEAST = 8


@dataclass(frozen=True)
class _Operand:
    """The part of a layer that a product reads: its rows [heads, features], moved and scaled."""

    rows: Tensor
    scale: float
    transposed: bool
    sequence_first: bool


def is_attention(product: fx.Node) -> bool:
    """Whether a node computes both products of attention."""
    return product.target in _ATTENTIONS


def has_level_heads(product: fx.Node) -> bool:
    """Whether queries and values must have the same size: attention in one node only has fast kernels then."""
    if not is_attention(product) or len(product.args) < 3:
        return False
    shapes = [annotation(source).shape for source in (product.args[0], product.args[2]) if isinstance(source, fx.Node)]
    return len({shape[-1] if shape else None for shape in shapes} - {None}) == 1


def find_heads(graph_module: fx.GraphModule) -> Iterator[Width]:
    """The widths of kinds "queries" and "values" in an annotated and profiled graph.

    A layer that computes several of queries, keys and values is narrowed as a whole or not at all, so each of its rows
    must belong to one of them.
    """
    reader = _Reader(graph_module)
    writers = {node: reader.operands(node) for node in graph_module.graph.nodes if reader.is_writer(node)}
    by_operand = {
        (product, position): (writer, operand)
        for writer, found in writers.items()
        for (product, position), operand in (found or {}).items()
    }
    products = dict.fromkeys(product for product, _ in by_operand)
    found = [width for product in products for width in reader.widths(product, by_operand)]
    while True:  # dropping a width may leave rows of a layer uncovered, so that other widths must be dropped too
        covered: dict[str, int] = {}
        for width in found:
            for name, rows in zip(width.producers, width.rows, strict=True):
                covered[name] = covered.get(name, 0) + len(set(rows))
        sound = [w for w in found if all(covered[name] == reader.outputs(name) for name in w.producers)]
        if len(sound) == len(found):
            break
        found = sound
    yield from found


class _Reader:
    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.users = parameter_users(graph_module)
        self.interpreter = fx.Interpreter(graph_module)
        self.nodes = {node.name: node for node in graph_module.graph.nodes}

    def outputs(self, name: str) -> int:
        site = annotation(self.nodes[name]).site
        return 0 if site is None else site.out_features

    def is_writer(self, node: fx.Node) -> bool:
        """Whether a node is a linear layer whose weight nothing else reads."""
        site = annotation(node).site
        if site is None or site.conv is not None or site.keeps_weight or site.has_experts:
            return False
        return owns_weight(self.graph_module, self.users, node, site)

    def operands(self, writer: fx.Node) -> dict[tuple[fx.Node, int], _Operand] | None:
        """The operands of products that read a layer's output; None if anything else reads it."""
        shape = annotation(writer).shape
        if shape is None or len(shape) < 3:
            return None
        numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
        arrived = self._follow(writer, numbers)
        if arrived is None:
            return None
        found = {}
        for user, source, numbers_there, scale in arrived:
            if not (is_attention(user) or user.target in _PRODUCTS):
                return None
            for position in [i for i, value in enumerate(user.args) if value is source]:
                operand = _read_rows(numbers, numbers_there, scale)
                if operand is None:
                    return None
                found[user, position] = operand
        return found

    def _follow(self, start: fx.Node, value: Tensor) -> list[tuple[fx.Node, fx.Node, Tensor, float]] | None:
        """The readers of a value behind moves and scalings: (reader, the node it reads, the moved value, its scale)."""
        values: dict[fx.Node, Any] = {start: value}
        scales = {start: 1.0}
        arrived = []
        pending = [start]
        while pending:
            node = pending.pop()
            for user in node.users:
                if reads_metadata(user):
                    continue
                scale = self._scale(user)
                if scale is None:
                    if not isinstance(values[node], Tensor):
                        return None
                    arrived.append((user, node, values[node], scales[node]))
                    continue
                moved = self._move(user, values)
                if moved is None:
                    return None
                values[user], scales[user] = moved, scales[node] * scale
                pending.append(user)
        return arrived

    def _scale(self, node: fx.Node) -> float | None:
        """The factor by which a node scales, if it only moves or scales values; else None."""
        if node.op == "call_module":
            return 1.0 if type(self.graph_module.get_submodule(str(node.target))) in _IDENTITIES else None
        name = operation(node)
        if name in _SCALINGS and len(node.args) == 2 and isinstance(node.args[1], int | float):
            return 1 / node.args[1] if "div" in name else float(node.args[1])
        return 1.0 if name in _MOVES else None

    def _move(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """The indices as a node moves them; None if their new shape is unknown."""
        if node.op == "call_module" or operation(node) in _SCALINGS or operation(node) == "dropout":
            return values[node.all_input_nodes[0]]
        for source in node.all_input_nodes:
            if source not in values:
                number = self._number(source)
                if number is None:
                    return None
                values[source] = number
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: values[source])
        try:
            return getattr(self.interpreter, node.op)(node.target, tuple(args), dict(kwargs))
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None

    def _number(self, node: fx.Node) -> Any:
        """The value of a size, or of a number computed from sizes, on the example batch."""
        if annotation(node).number is not None:
            return annotation(node).number
        if reads_metadata(node):
            shape = annotation(node.all_input_nodes[0]).shape
            if shape is None:
                return None
            if node.target == "size":
                dim: Any = node.args[1] if len(node.args) > 1 else None
                return torch.Size(shape) if dim is None else shape[dim]
            return torch.Size(shape) if node.target is getattr and node.args[1] == "shape" else None
        if node.target is aten.sym_size.int:
            shape = annotation(node.all_input_nodes[0]).shape
            axis: Any = node.args[1]
            return None if shape is None else shape[axis]
        owner = str(getattr(node.target, "__module__", None)).lstrip("_")
        if node.op != "call_function" or owner not in ("operator", "builtins", "math"):
            return None
        numbers = {source: self._number(source) for source in node.all_input_nodes}
        if any(number is None for number in numbers.values()):
            return None
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: numbers[source])
        function: Any = node.target
        return function(*args, **kwargs)

    def widths(
        self, product: fx.Node, by_operand: dict[tuple[fx.Node, int], tuple[fx.Node, _Operand]]
    ) -> Iterator[Width]:
        """The widths at one product."""
        found = {position: by_operand.get((product, position)) for position in range(3)}
        attention = is_attention(product)
        if found[0] is not None and found[1] is not None:
            yield from self._queries(product, found[0], found[1])
        values = found[2] if attention else (found[1] if found[0] is None else None)
        if values is not None:
            yield from self._values(product, *values)

    def _queries(
        self, product: fx.Node, query: tuple[fx.Node, _Operand], key: tuple[fx.Node, _Operand]
    ) -> Iterator[Width]:
        (q_writer, q), (k_writer, k) = query, key
        unique = _unique_heads(k.rows)
        features = q.rows.shape[1]
        alike = q.sequence_first == k.sequence_first and features == k.rows.shape[1] and not q.transposed
        if unique is None or not alike or features < _LEAST or len(q.rows) % len(unique):
            return
        yield Width(
            "queries",
            f"{_site_name(q_writer)}:queries",
            features,
            producers=(q_writer.name, k_writer.name),
            heads=len(unique),
            repeat=len(q.rows) // len(unique),
            rows=(_flat(q.rows), _flat(unique)),
            product=product.name,
            operands=(Operand(0, q.scale), Operand(1, k.scale, k.transposed, len(k.rows) // len(unique))),
            sequence_first=q.sequence_first,
        )

    def _values(self, product: fx.Node, writer: fx.Node, v: _Operand) -> Iterator[Width]:
        shape = annotation(product).shape
        if shape is None or len(shape) < 3 or v.rows.shape[1] < _LEAST:
            return
        heads, features = shape[-3], shape[-1]
        numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
        arrived = self._follow(product, numbers)
        if arrived is None or len(arrived) != 1 or features != v.rows.shape[1]:
            return
        reader, source, moved, scale = arrived[0]
        site = annotation(reader).site
        if site is None or not self.is_writer(reader) or site_input(reader) is not source or scale != 1.0:
            return
        merged = numbers.movedim(-2, 0) if v.sequence_first else numbers.transpose(-3, -2)
        if moved.shape != merged.flatten(-2).shape or not torch.equal(moved, merged.flatten(-2)):
            return
        unique = _unique_heads(v.rows)
        if unique is None or heads % len(unique) or v.transposed:
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
            product=product.name,
            operands=(Operand(2 if is_attention(product) else 1, v.scale, False, len(v.rows) // len(unique)),),
            sequence_first=v.sequence_first,
        )


def _read_rows(numbers: Tensor, moved: Tensor, scale: float) -> _Operand | None:
    """The rows in an operand [..., heads, positions, features]; None if its layout is not supported."""
    for transposed in (False, True):
        operand = moved.mT if transposed else moved
        if operand.dim() < 4:
            return None
        first = operand[(0,) * (operand.dim() - 3)][:, 0]
        rows = (first % numbers.shape[-1]).to(torch.int64)  # [heads, features]
        picked = numbers[..., rows.flatten()].reshape(*numbers.shape[:-1], *rows.shape)
        for sequence_first in (False, True):
            expected = picked.movedim(0, -2) if sequence_first else picked.transpose(-3, -2)
            if expected.shape == operand.shape and torch.equal(expected, operand):
                return _Operand(rows, scale, transposed, sequence_first)
    return None


def _unique_heads(rows: Tensor) -> Tensor | None:
    """The rows of distinct heads, where copies of a head follow it directly; None for any other order."""
    count = len(torch.unique(rows, dim=0))
    unique = rows[:: len(rows) // count] if len(rows) % count == 0 else rows
    same = torch.equal(unique.repeat_interleave(len(rows) // len(unique), 0), rows)
    return unique if same else None


def _flat(rows: Tensor) -> tuple[int, ...]:
    return tuple(rows.flatten().tolist())


def _site_name(node: fx.Node) -> str:
    site = annotation(node).site
    return node.name if site is None else site.name
