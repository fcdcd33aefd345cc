"""The equal pieces into which a graph splits a linear layer's output, such as queries, keys and values."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from balf_fx.graph.annotation import annotation
from balf_fx.graph.operators import aten, operation, value_readers

_RESHAPES: tuple[Any, ...] = (
    *(torch.reshape, torch.unflatten, "reshape", "view", "unflatten"),
    *(aten.reshape.default, aten.view.default, aten.unflatten.int),
)

_SPLITS: tuple[Any, ...] = (
    *(torch.chunk, torch.split, torch.tensor_split, "chunk", "split", "tensor_split"),
    *(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.tensor_split.sections),
)

_MOVES = ("unsqueeze", "transpose", "squeeze", "contiguous")

_PARTS = (2, 3)


def read_parts(node: fx.Node, features: int) -> int:
    """The number of equal pieces into which the graph splits a linear layer's output, 2 or 3, else 1.

    It may chunk or split the last dimension, reshape it to [pieces, heads, features of a head], or reshape it to
    [pieces, features of a piece] and select one piece after the other.
    """
    readers = value_readers(node)
    while (
        len(readers) == 1
        and readers[0].target in _RESHAPES
        and (annotation(readers[0]).shape or ())[-1:] == (features,)
    ):
        readers = value_readers(readers[0])  # rows become positions again
    found = {_pieces(user, features) for user in readers}
    return found.pop() if len(found) == 1 else 1


def _pieces(user: fx.Node, features: int) -> int:
    shape = annotation(user).shape
    if shape is not None:
        reshaped = len(shape) > 2 and all(isinstance(size, int) for size in shape[-3:])
        reshaped = reshaped and shape[-3] in _PARTS and math.prod(shape[-3:]) == features
        if user.target not in _RESHAPES:
            return 1
        return shape[-3] if reshaped else _selected(user, shape[-2:], features)
    widths = [(annotation(item).shape or (0,))[-1] for item in user.users if item.target is operator.getitem]
    equal = len(widths) in _PARTS and set(widths) == {features // len(widths)}
    return len(widths) if equal and features % len(widths) == 0 and user.target in _SPLITS else 1


def _selected(node: fx.Node, sizes: Sequence[int], features: int) -> int:
    """The number of pieces of a value [.., pieces, features of a piece] that are moved to the front and selected."""
    if len(sizes) < 2 or sizes[0] not in _PARTS or math.prod(sizes) != features:
        return 1
    while len(node.users) == 1 and operation(*node.users) in _MOVES:
        (node,) = node.users
    pieces = (annotation(node).shape or (0,))[0]
    selects = all(operation(user) == "select" and user.args[1] == 0 for user in node.users)
    return int(sizes[0]) if selects and pieces == sizes[0] == len(node.users) else 1
