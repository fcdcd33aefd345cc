"""Batches that need more memory than there is, in pieces of some samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from balf_fx.calibration.batches import (
    MEMORY,
    Calibration,
    Forward,
    graphs_of,
    run_batch,
    sample_count,
    some_samples,
)
from balf_fx.calibration.observers import CovarianceObserver
from balf_fx.errors import CalibrationError
from balf_fx.graph.annotation import annotation

_ALIVE = 8  # values that a walk over two models keeps at once: a residual stream, a layer's input and output, copies


Piece = tuple[Any, Tensor | None]
"""A batch, or some samples of one, with the user's weights of its positions."""


def pieces_for_gradients(prepared: nn.Module, piece: Piece, calibration: Calibration, index: int) -> Iterator[Piece]:
    """A batch, or pieces of it for which the values of all layers fit into memory."""
    return _pieces(prepared, piece, calibration, index, sum(_value_sizes(prepared)))


def pieces_for_walk(prepared: nn.Module, piece: Piece, calibration: Calibration, index: int) -> Iterator[Piece]:
    """A batch, or pieces of it for which the values alive at one layer of two models fit into memory."""
    return _pieces(prepared, piece, calibration, index, _ALIVE * max(_value_sizes(prepared), default=0.0))


def _pieces(prepared: nn.Module, piece: Piece, calibration: Calibration, index: int, nbytes: float) -> Iterator[Piece]:
    """A batch, or the fewest pieces of similar size that each fit into memory.

    A batch is only split if the model computes each sample independently of the others. More memory than `MEMORY` does
    not make pieces larger, so that the result does not depend on it.

    Args:
        nbytes: the memory that one sample takes.
    """
    batch, weights = piece
    samples = sample_count(batch)
    count = min(math.ceil(samples * nbytes / max(min(calibration.memory, MEMORY), 1)), samples)
    if count <= 1 or not _one_by_one(prepared, batch, calibration.forward, index):
        yield piece
        return
    cuts = [samples * part // count for part in range(count + 1)]
    for start, stop in itertools.pairwise(cuts):
        yield some_samples(batch, start, stop), None if weights is None else weights[start:stop]


def _value_sizes(program: nn.Module) -> list[float]:
    """The bytes that each node's value takes for one sample of the example batch."""
    found: list[float] = []
    for graph_module in graphs_of(program):
        marks = [(node, annotation(node).shape) for node in graph_module.graph.nodes]
        samples = max((shape[0] for node, shape in marks if node.op == "placeholder" and shape), default=0)
        size = max((parameter.element_size() for parameter in graph_module.parameters()), default=4)
        shapes = [shape for node, shape in marks if node.op.startswith("call") and shape is not None]
        found += [size * math.prod(shape) / samples for shape in shapes] if samples else []
    return found


def _one_by_one(prepared: nn.Module, batch: Any, forward: Forward, index: int) -> bool:
    """Whether the first few samples have the same outputs together and apart; observers are restored afterwards."""
    moments = {module: module.moments for module in prepared.modules() if isinstance(module, CovarianceObserver)}
    half = min(sample_count(batch) // 2, 2)
    try:
        spans = ((0, 2 * half), (0, half), (half, 2 * half))
        runs = [run_batch(prepared, some_samples(batch, *span), forward, index) for span in spans]
    except CalibrationError:  # the model may only run on batches of one size
        return False
    finally:
        for observer, seen in moments.items():
            observer.moments = seen
    leaves = [[leaf for leaf in pytree.tree_leaves(run) if isinstance(leaf, Tensor)] for run in runs]
    if len(set(map(len, leaves))) > 1:
        return False
    return all(_alike(whole, parts) for whole, *parts in zip(*leaves, strict=True))


def _alike(whole: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether an output equals the concatenation of its parts, up to rounding."""
    if not whole.dim() or len({part.shape[1:] for part in (whole, *parts)}) > 1:
        return False
    joined = torch.cat(list(parts))
    tolerance = 1e-3 * float(whole.abs().max())
    return joined.shape == whole.shape and torch.allclose(joined, whole, rtol=0.0, atol=tolerance)
