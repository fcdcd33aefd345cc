"""Moves: operations that only rearrange values. They are run on numbers, to see which value goes where.

Nothing is assumed about how a model writes its reshapes, permutations and splits. A *row* is an index on the axis of a
value that holds a layer's output features; all other axes of that value are *leading*, even those after it.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from balf_fx.graph.annotation import annotation
from balf_fx.graph.operators import aten, is_transposition, makes_alike, operation, reads_metadata
from balf_fx.graph.parameters import called_module, get_tensor
from balf_fx.graph.widths import Reader, Size

_RESHAPES = ("reshape", "view", "_unsafe_view", "expand")
_SELECTIONS = (
    *("unbind", "chunk", "split", "split_with_sizes", "tensor_split", "select", "getitem", "slice", "narrow"),
    *("index_select", "index"),
)


_MOVES = (
    *(*_RESHAPES, *_SELECTIONS),
    *("flatten", "ravel", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "alias", "dropout"),
    *("permute", "transpose", "movedim", "t", "mT", "numpy_T", "roll"),
    *("repeat_interleave", "broadcast_to"),
)


_COPIES = ("lift_fresh", "lift_fresh_copy", "detach", "clone")  # of constant indices, in exported graphs
_END = 2**63 - 1  # the end of a whole slice in exported graphs
_MODULES = (nn.Identity, nn.Dropout, nn.Flatten, nn.Unflatten)


@dataclass(frozen=True)
class Layout:
    """A value that holds some rows of a source [.., O, ..]: source[rows].unflatten(axis, sizes).permute(axes)."""

    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    axes: tuple[int, ...]


class Moves:
    """Runs the moves of one graph on numbers."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.interpreter = fx.Interpreter(graph_module)

    def is_move(self, node: fx.Node) -> bool:
        """Whether a node only moves values."""
        if node.op == "call_module":
            return type(called_module(self.graph_module, node)) in _MODULES
        return is_transposition(node) or (operation(node) in _MOVES and "out" not in node.kwargs)

    def run(self, node: fx.Node, values: Mapping[fx.Node, Any], picks: bool = False) -> Any:
        """The numbers as a move arranges them; None if it cannot be run.

        Args:
            values: the numbers, or tuples of them, by the nodes from which the move may read.
            picks: whether the move may pick one entry of an axis that has only one on the example batch.
        """
        if operation(node) == "dropout":
            return values.get(node.all_input_nodes[0])
        known = {}
        for source in node.all_input_nodes:
            known[source] = values[source] if source in values else self.number(source)
            if known[source] is None:
                return None
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: known[source])
        if not picks and operation(node) in _SELECTIONS and _picks_from_one(operation(node), args):
            return None
        try:
            return getattr(self.interpreter, node.op)(node.target, tuple(args), dict(kwargs))
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None

    def number(self, node: fx.Node) -> Any:
        """The value of a size or a constant index, or of a number computed from sizes, on the example batch."""
        if annotation(node).number is not None:
            return annotation(node).number
        if operation(node) in _COPIES:
            return self.number(node.all_input_nodes[0])
        if node.op == "get_attr":
            value = get_tensor(self.graph_module, str(node.target))
            return value if isinstance(value, Tensor) and value.dtype is torch.int64 else None
        if reads_size(node):
            shape = annotation(node.all_input_nodes[0]).shape
            if shape is None:
                return None
            if node.target is getattr:
                return torch.Size(shape) if node.args[1] == "shape" else None
            dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            return torch.Size(shape) if dim is None else shape[dim]
        owner = str(getattr(node.target, "__module__", None)).lstrip("_")
        computed = owner in ("operator", "builtins", "math") or node.target is torch.Size
        if node.op != "call_function" or not computed:
            return None
        numbers = {source: self.number(source) for source in node.all_input_nodes}
        if any(number is None for number in numbers.values()):
            return None
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: numbers[source])
        function: Any = node.target
        return function(*args, **kwargs)

    def along(self, node: fx.Node, axis: int) -> Tensor | None:
        """The index on one axis of a node's value, in the shape of the value, int32."""
        shape = annotation(node).shape
        if shape is None or not -1 < axis < len(shape):
            return None
        line = [1] * len(shape)
        line[axis] = shape[axis]
        return torch.arange(shape[axis], dtype=torch.int32, device="cpu").view(line).expand(shape)

    def keeps(self, node: fx.Node, source: fx.Node, axis: int) -> int | None:
        """The axis on which a move leaves all features of an axis of its source, in their order; None if it does not.

        The other axes may change in any way, except that the features stay single values (no copies).
        """
        labels = self.along(source, axis)
        if labels is None or not self.is_move(node) or node.kwargs.keys() & {"shape", "size"}:
            return None
        found = self.run(node, {source: labels}, picks=True)  # which entry of another axis makes no difference
        held = feature_axis(found) if isinstance(found, Tensor) else None
        return held[0] if held is not None and held[1] == tuple(range(labels.shape[axis])) else None

    def chain(self, node: fx.Node) -> list[fx.Node]:
        """The moves that lead to a node, from the value that they move to the node itself."""
        found = [node]
        while self.is_move(found[-1]) and found[-1].args and isinstance(found[-1].args[0], fx.Node):
            found.append(found[-1].args[0])
        return found[::-1]

    def run_chain(self, chain: Sequence[fx.Node], start: Tensor) -> dict[fx.Node, Any] | None:
        """The numbers of the first node of a chain, moved along it."""
        values: dict[fx.Node, Any] = {chain[0]: start}
        for node in chain[1:]:
            values[node] = self.run(node, values)
            if values[node] is None:
                return None
        return values

    def rests(
        self, source: fx.Node, axis: int, covered: Collection[int], known: Collection[fx.Node]
    ) -> tuple[list[Reader], list[Size]] | None:
        """The first nodes behind a value that hold none of the covered rows.

        Args:
            axis: the axis of the rows.
            known: nodes that may read covered rows.

        Returns:
            These nodes, and the nodes that read shapes of values before them; None if another node reads covered rows,
            or if a node cannot be separated from them.
        """
        shape = annotation(source).shape
        if shape is None or math.prod(shape) == 0:
            return None
        is_covered = torch.zeros(shape[axis], dtype=torch.bool, device="cpu")
        is_covered[list(covered)] = True
        unit = math.prod(shape[axis + 1 :])
        values: dict[fx.Node, Any] = {source: numbered(shape)}
        found: list[Reader] = []
        sizes: list[Size] = []
        pending = [source]
        while pending:
            node = pending.pop()
            for user in node.users:
                if user in known or (node is source and is_harmless(user, axis)):
                    continue
                size = read_size(user, source, values[node], shape, axis)
                if size is not None:
                    sizes.append(size)
                    continue
                moved = self.run(user, values) if self.is_move(user) else None
                if moved is None:
                    return None
                values[user] = moved
                if isinstance(moved, Tensor) and not is_covered[_rows(moved, unit, shape[axis])].any():
                    layout = read_layout(moved, shape, axis)
                    if layout is None:
                        return None
                    found.append(Reader(source.name, axis, user.name, layout.rows, layout.sizes, layout.axes))
                else:
                    pending.append(user)
        return found, sizes


def _picks_from_one(name: str, args: Sequence[Any]) -> bool:
    """Whether an axis of size 1 is indexed: on a longer one, this would select."""
    value, *rest = args
    if not isinstance(value, Tensor):
        return False
    if name == "getitem":
        index = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
        after = index[index.index(Ellipsis) + 1 :] if Ellipsis in index else ()
        before = index[: len(index) - len(after)]
        pairs = [*zip(before, value.shape, strict=False), *zip(after[::-1], value.shape[::-1], strict=False)]
        return any(size == 1 and item not in (slice(None), Ellipsis, None) for item, size in pairs)
    if name in ("select", "slice", "narrow", "index_select") and value.dim() > 0:
        dim = rest[0] if rest and isinstance(rest[0], int) else 0
        whole = name == "slice" and rest[1:] in ([], [0], [None], [0, _END], [None, None], [0, None])
        return value.shape[dim] == 1 and not whole
    return False


def _rows(numbers: Tensor, unit: int, count: int) -> Tensor:
    found: Tensor = torch.unique(numbers // unit % count)
    return found.to(torch.int64)


def feature_axis(labels: Tensor) -> tuple[int, tuple[int, ...]] | None:
    """The axis along which labels differ, and the labels on it; None if they also differ along others."""
    for axis in range(labels.dim()):
        if labels.shape[axis] > 1 and labels.numel() > 0:
            line = labels[tuple(slice(None) if i == axis else 0 for i in range(labels.dim()))]
            shape = [-1 if i == axis else 1 for i in range(labels.dim())]
            if torch.equal(labels, line.view(shape).expand_as(labels)) and len(torch.unique(line)) == len(line):
                return axis, tuple(line.tolist())
    return None


def numbered(shape: Sequence[int]) -> Tensor:
    """The numbers of a value's entries, on which moves are run, in its shape."""
    return torch.arange(math.prod(shape), dtype=torch.int32, device="cpu").view(tuple(shape))


def read_layout(moved: Tensor, shape: Sequence[int], axis: int) -> Layout | None:
    """The layout of a value that holds some rows of a source, and every index of its leading axes exactly once.

    Args:
        moved: the value where the source is arange(n).view(shape).
        axis: the axis of the rows in the source.

    Returns:
        None if the value has no layout of this kind, or if leading axes of size 1 leave it open.
    """
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    unit, whole = strides[axis], strides[axis] * shape[axis]
    offset = int(moved[(0,) * moved.dim()])
    steps = [
        int(moved[tuple(int(i == j) for j in range(moved.dim()))]) - offset if size > 1 else 0
        for i, size in enumerate(moved.shape)
    ]
    expected = torch.tensor(offset, dtype=moved.dtype, device="cpu").expand(moved.shape)
    for i, (step, size) in enumerate(zip(steps, moved.shape, strict=True)):
        line = [-1 if i == j else 1 for j in range(moved.dim())]
        expected = expected + step * torch.arange(size, dtype=moved.dtype, device="cpu").view(line)
    if not torch.equal(moved, expected) or offset % unit or offset >= whole:
        return None
    leading = {strides[i]: i for i in range(len(shape)) if i != axis and shape[i] > 1}
    single = [i for i in range(len(shape)) if i != axis and shape[i] == 1]
    roles: list[int | None] = []  # the leading axis of the source, or None for an axis of rows
    for step, size in zip(steps, moved.shape, strict=True):
        lead = leading.pop(step, None) if size > 1 else None
        if size > 1 and (shape[lead] != size if lead is not None else not (0 < step < whole and step % unit == 0)):
            return None
        roles.append(lead)
    units = [i for i, size in enumerate(moved.shape) if size == 1]
    if leading or len(single) > 1 or (single and len(units) != 1):
        return None
    if single:
        roles[units[0]] = single[0]
    sizes = tuple(size for size, role in zip(moved.shape, roles, strict=True) if role is None)
    rows = moved[tuple(slice(None) if role is None else 0 for role in roles)].flatten() // unit
    places = itertools.count(axis)  # where the axes of rows lie in source.unflatten(axis, sizes)
    axes = [next(places) if role is None else role + (role > axis) * (len(sizes) - 1) for role in roles]
    return Layout(tuple(rows.tolist()), sizes, tuple(axes)) if sizes else None


def reads_size(node: fx.Node) -> bool:
    """Whether a node only returns the shape or the type of a value."""
    return (reads_metadata(node) and not makes_alike(node)) or node.target is aten.sym_size.int


def read_size(user: fx.Node, source: fx.Node, moved: Any, shape: Sequence[int], axis: int) -> Size | None:
    """How a node that reads the shape of a moved value can read it from the source; None if it does not, or cannot.

    Args:
        moved: the value where the source is arange(n).view(shape).
        axis: the axis of the rows in the source.
    """
    if not reads_size(user) or not isinstance(moved, Tensor) or any(reader.op == "output" for reader in user.users):
        return None
    layout = read_layout(moved, shape, axis)
    if layout is None:
        return None
    count = len(layout.sizes)
    axes = [None if axis <= i < axis + count else i if i < axis else i - count + 1 for i in layout.axes]
    return Size(user.name, source.name, tuple(axes), tuple(moved.shape))


def redirect(node: fx.Node, source: fx.Node, size: Size) -> None:
    """Let the readers of a shape read it from another value."""
    graph = node.graph
    with graph.inserting_before(node):
        if node.target is getattr and node.args[1] in ("dtype", "device"):
            new: Any = graph.call_function(getattr, (source, node.args[1]))
        elif node.target == "dim" or (node.target is getattr and node.args[1] == "ndim"):
            new = len(size.shape)
        else:
            dim: Any = node.args[1] if len(node.args) > 1 and node.target is not getattr else node.kwargs.get("dim")
            pairs = list(zip(size.axes, size.shape, strict=True))
            pairs = pairs if dim is None else [pairs[dim]]
            values = [length if own is None else graph.call_method("size", (source, own)) for own, length in pairs]
            new = tuple(values) if dim is None else values[0]
    for reader in list(node.users):
        reader.args = map_arg(reader.args, lambda each: new if each is node else each)
        reader.kwargs = map_arg(reader.kwargs, lambda each: new if each is node else each)
    graph.erase_node(node)


def is_harmless(user: fx.Node, axis: int) -> bool:
    """Whether a node only reads a value's type, or sizes of other axes than this one."""
    if user.target is aten.sym_size.int:
        return isinstance(user.args[1], int) and user.args[1] % _rank(user) != axis
    if not reads_metadata(user):
        return False
    if makes_alike(user) or (user.target is getattr and user.args[1] in ("ndim", "dtype", "device")):
        return True
    if user.op == "call_method" and user.target == "dim":
        return True
    if user.op == "call_method" and len(user.args) > 1:
        return isinstance(user.args[1], int) and _rank(user) > 0 and user.args[1] % _rank(user) != axis
    items = [reader.args[1] if operation(reader) == "getitem" else None for reader in user.users]
    return all(_skips(item, axis, _rank(user)) for item in items)


def _rank(user: fx.Node) -> int:
    return len(annotation(user.all_input_nodes[0]).shape or ())


def _skips(item: Any, axis: int, rank: int) -> bool:
    """Whether an index into a shape leaves out an axis."""
    if isinstance(item, int):
        return rank > 0 and item % rank != axis
    plain = isinstance(item, slice) and all(isinstance(part, int | None) for part in (item.start, item.stop, item.step))
    return plain and axis not in range(rank)[item]


def is_shaped(node: fx.Node) -> bool:
    """Whether a move is given the sizes of its result, so that it can be resized."""
    return operation(node) in _RESHAPES


def is_fixed(graph_module: fx.GraphModule, node: fx.Node, axis: int) -> bool:
    """Whether a move that cannot be resized is given the size of an axis of its result."""
    rank = len(annotation(node).shape or ())
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    dim: Any
    sizes: Any
    if isinstance(module, nn.Unflatten):
        dim, sizes = module.dim, module.unflattened_size
    elif operation(node) == "unflatten":
        dim, sizes = (*node.args[1:], *node.kwargs.values())[:2]
    elif operation(node) == "broadcast_to":
        dim, sizes = 0, node.args[1] if len(node.args) > 1 else node.kwargs.get("size")
    else:
        return False
    if not isinstance(dim, int) or not isinstance(sizes, list | tuple):
        return True
    place = axis - dim % (rank - len(sizes) + 1)
    return place in range(len(sizes)) and sizes[place] != -1


def resize(node: fx.Node, axis: int, size: int) -> None:
    """Let a reshape return another size on one axis."""
    given: Any = node.args[1:] if len(node.args) != 2 else node.args[1]
    if isinstance(given, fx.Node):
        rank = len(annotation(node).shape or ())
        with node.graph.inserting_before(node):
            given = [node.graph.call_function(operator.getitem, (given, i)) if i != axis else size for i in range(rank)]
    elif isinstance(given, int):
        given = [given]
    sizes = list(given)
    if sizes[axis] != -1:
        sizes[axis] = size
    node.args = (node.args[0], tuple(sizes))


def rebuild(graph: fx.Graph, piece: fx.Node, axis: int, sizes: Sequence[int], axes: Sequence[int]) -> fx.Node:
    """The value with a layout, from its rows alone, at the graph's insertion point."""
    if len(sizes) > 1:
        piece = graph.call_method("unflatten", (piece, axis, tuple(sizes)))
    return piece if list(axes) == sorted(axes) else graph.call_method("permute", (piece, tuple(axes)))
