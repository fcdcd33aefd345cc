"""Large batches in pieces, so that the values of their layers fit into memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from balf_fx.batches import Forward, run_batch, sample_count, some_samples
from balf_fx.errors import CalibrationError
from balf_fx.observers import CovarianceObserver
from balf_fx.sites import annotation

_ALIVE = 8  # values that a walk over two models holds at once: a residual stream, a layer's input and output, copies


def pieces_for_gradients(
    prepared: fx.GraphModule, batch: Any, forward: Forward, index: int, memory: int
) -> Iterator[Any]:
    """The batch, or pieces for which the values of all layers fit into `memory` bytes."""
    return _pieces(prepared, batch, forward, index, sum(_value_sizes(prepared)) / max(memory, 1))


def pieces_for_walk(prepared: fx.GraphModule, batch: Any, forward: Forward, index: int, memory: int) -> Iterator[Any]:
    """The batch, or pieces for which what is alive in one layer of two models fits into `memory` bytes."""
    return _pieces(prepared, batch, forward, index, _ALIVE * max(_value_sizes(prepared), default=0.0) / max(memory, 1))


def _pieces(prepared: fx.GraphModule, batch: Any, forward: Forward, index: int, share: float) -> Iterator[Any]:
    """The batch, or as few pieces of like size as each fit into memory, if the model treats samples one by one.

    Args:
        share: of the memory, what one sample takes.
    """
    samples = sample_count(batch)
    count = min(math.ceil(samples * share), samples)
    if count <= 1 or not _one_by_one(prepared, batch, forward, index):
        yield batch
        return
    cuts = [samples * piece // count for piece in range(count + 1)]
    for start, stop in itertools.pairwise(cuts):
        yield some_samples(batch, start, stop)


def _value_sizes(prepared: fx.GraphModule) -> list[float]:
    """The bytes that each node's value takes for one sample of the example batch."""
    marks = [(node, annotation(node).shape) for node in prepared.graph.nodes]
    samples = max((shape[0] for node, shape in marks if node.op == "placeholder" and shape), default=0)
    size = max((parameter.element_size() for parameter in prepared.parameters()), default=4)
    shapes = [shape for node, shape in marks if node.op.startswith("call") and shape is not None]
    return [size * math.prod(shape) / samples for shape in shapes] if samples else []


def _one_by_one(prepared: fx.GraphModule, batch: Any, forward: Forward, index: int) -> bool:
    """Whether the first few samples have the same outputs together and apart; the observers forget what they saw."""
    moments = {module: module.moments for module in prepared.modules() if isinstance(module, CovarianceObserver)}
    half = min(sample_count(batch) // 2, 2)
    try:
        spans = ((0, 2 * half), (0, half), (half, 2 * half))
        runs = [run_batch(prepared, some_samples(batch, *span), forward, index) for span in spans]
    except CalibrationError:  # it may want batches of one size
        return False
    finally:
        for observer, seen in moments.items():
            observer.moments = seen
    leaves = [[leaf for leaf in pytree.tree_leaves(run) if isinstance(leaf, Tensor)] for run in runs]
    if len(set(map(len, leaves))) > 1:
        return False
    return all(_alike(whole, parts) for whole, *parts in zip(*leaves, strict=True))


def _alike(whole: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether an output is its parts one below the other, up to rounding."""
    if not whole.dim() or len({part.shape[1:] for part in (whole, *parts)}) > 1:
        return False
    joined = torch.cat(list(parts))
    tolerance = 1e-3 * float(whole.abs().max())
    return joined.shape == whole.shape and torch.allclose(joined, whole, rtol=0.0, atol=tolerance)
