"""Batches that need more memory than there is, in pieces: some samples, or some positions of long sequences.

A sequence is only cut where the model is causal and nothing is padded. The positions of a piece then see those of their
own piece alone, as in a shorter text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
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
from balf_fx.graph.blocks import Block

_SHORTEST = 32  # the fewest positions of a piece of a sequence
_ALIVE = 8  # values that a walk over two models keeps at once: a residual stream, a layer's input and output, copies


Piece = tuple[Any, Tensor | None]
"""A batch, or some samples of one, with the user's weights of its positions."""


class Pieces:
    """Splits batches into the fewest pieces of similar size that each fit into memory.

    A batch is only split if the model computes each sample independently of the others, which is found on the first
    batch that is too large. More memory than `MEMORY` does not make pieces larger, so that the result does not depend
    on it.

    Args:
        nbytes: the memory that one sample of the example takes.
    """

    def __init__(self, prepared: nn.Module, calibration: Calibration, nbytes: float) -> None:
        self._prepared, self._calibration, self._nbytes = prepared, calibration, nbytes
        self._independent: bool | None = None
        self._causal: bool | None = None

    def of(self, piece: Piece, index: int) -> Iterator[Piece]:
        """The pieces of a batch.

        Args:
            index: the index of the batch, for messages.
        """
        batch, weights = piece
        memory, nbytes = max(min(self._calibration.memory, MEMORY), 1), self._nbytes * _growth(self._prepared, batch)
        samples, length = sample_count(batch), 0 if weights is not None and weights.dim() > 1 else _length(batch)
        count = max(min(math.ceil(samples * nbytes / memory), samples), 1)
        if count > 1 and not self._one_by_one(batch, index):
            yield piece
            return
        windows = min(math.ceil(nbytes / memory), length // _SHORTEST) if count == samples else 1
        if windows > 1 and not self._is_causal(batch, index):
            windows = 1
        for start, stop in _cuts(samples, count):
            own = piece if count == 1 else _samples(piece, start, stop)
            yield from [own] if windows <= 1 else (_positions(own, *cut) for cut in _cuts(length, windows))

    def _one_by_one(self, batch: Any, index: int) -> bool:
        if self._independent is None:
            self._independent = _one_by_one(self._prepared, batch, self._calibration.forward, index)
        return self._independent

    def _is_causal(self, batch: Any, index: int) -> bool:
        if self._causal is None:
            first = some_samples(batch, 0, 1)
            self._causal = _is_causal(self._prepared, first, self._calibration.forward, index)
        return self._causal


def pieces_for_gradients(prepared: nn.Module, calibration: Calibration) -> Pieces:
    """Pieces for which the values of all layers fit into memory."""
    return Pieces(prepared, calibration, sum(_value_sizes(prepared).values()))


def pieces_for_blocks(prepared: nn.Module, calibration: Calibration, blocks: Sequence[Block]) -> Pieces:
    """The pieces that gradients at all layers have in ample memory; smaller ones if a block does not fit with these."""
    sizes = _value_sizes(prepared)
    largest = max(sum(sizes.get(node, 0.0) for node in block.nodes) for block in blocks)
    share = min(calibration.memory / MEMORY, 1.0)
    return Pieces(prepared, calibration, max(largest, share * sum(sizes.values())))


def pieces_for_walk(prepared: nn.Module, calibration: Calibration) -> Pieces:
    """Pieces for which the values alive at one layer of two models fit into memory."""
    return Pieces(prepared, calibration, _ALIVE * max(_value_sizes(prepared).values(), default=0.0))


def _cuts(length: int, count: int) -> list[tuple[int, int]]:
    """`count` ranges of similar size."""
    return list(itertools.pairwise(length * part // count for part in range(count + 1)))


def _samples(piece: Piece, start: int, stop: int) -> Piece:
    batch, weights = piece
    return some_samples(batch, start, stop), None if weights is None else weights[start:stop]


def _positions(piece: Piece, start: int, stop: int) -> Piece:
    """Some positions of sequences [N, L] with weights for whole samples."""
    batch, weights = piece
    cut = pytree.tree_map_only(Tensor, lambda tensor: tensor[:, start:stop], _plain(batch))
    return cut, weights


def _length(batch: Any) -> int:
    """The length of the batch's sequences: all tensors are [N, L], and nothing is padded; 0 for other batches."""
    batch = _plain(batch)
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    lengths = {leaf.shape[1] if leaf.dim() == 2 and not leaf.is_floating_point() else 0 for leaf in leaves}
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    padded = isinstance(mask, Tensor) and not bool((mask != 0).all())
    return 0 if padded or len(lengths) != 1 else lengths.pop()


def _plain(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch  # of mappings, pytree only traverses dict


def _growth(prepared: nn.Module, batch: Any) -> float:
    """How many times as large a sample of the batch is as one of the example, such as a longer sequence."""
    samples = sample_count(batch)
    if not isinstance(prepared, fx.GraphModule) or not samples:
        return 1.0
    shapes = [annotation(node).shape or () for node in prepared.graph.find_nodes(op="placeholder")]
    first = max((math.prod(shape) / shape[0] for shape in shapes if shape and shape[0]), default=0.0)
    leaves = [leaf for leaf in pytree.tree_leaves(_plain(batch)) if isinstance(leaf, Tensor)]
    return max(leaf.numel() for leaf in leaves) / samples / first if first else 1.0


def _value_sizes(program: nn.Module) -> dict[fx.Node, float]:
    """The bytes that each node's value takes for one sample of the example batch."""
    found: dict[fx.Node, float] = {}
    for graph_module in graphs_of(program):
        marks = [(node, annotation(node).shape) for node in graph_module.graph.nodes]
        samples = max((shape[0] for node, shape in marks if node.op == "placeholder" and shape), default=0)
        size = max((parameter.element_size() for parameter in graph_module.parameters()), default=4)
        shapes = {node: shape for node, shape in marks if node.op.startswith("call") and shape is not None}
        found |= {node: size * math.prod(shape) / samples for node, shape in shapes.items()} if samples else {}
    return found


def _one_by_one(prepared: nn.Module, batch: Any, forward: Forward, index: int) -> bool:
    """Whether the first few samples have the same outputs together and apart."""
    half = min(sample_count(batch) // 2, 2)
    whole, *parts = (some_samples(batch, *span) for span in ((0, 2 * half), (0, half), (half, 2 * half)))
    leaves = _outputs(prepared, [whole, *parts], forward, index)
    return leaves is not None and all(_alike(whole, parts) for whole, *parts in zip(*leaves, strict=True))


def _is_causal(prepared: nn.Module, batch: Any, forward: Forward, index: int) -> bool:
    """Whether the first few positions of a sequence have the same outputs with those behind them and without."""
    runs = [_positions((batch, None), 0, stop)[0] for stop in (2 * _SHORTEST, _SHORTEST)]
    leaves = _outputs(prepared, runs, forward, index)
    return leaves is not None and all(
        whole.dim() > 2 and _alike(whole[:, :_SHORTEST], [start]) for whole, start in zip(*leaves, strict=True)
    )


def _outputs(prepared: nn.Module, batches: Sequence[Any], forward: Forward, index: int) -> list[list[Tensor]] | None:
    """The tensors that the model returns for each batch, equally many; observers are restored afterwards.

    None if it cannot run one of them: it may only run on batches of one size.
    """
    moments = {module: module.moments for module in prepared.modules() if isinstance(module, CovarianceObserver)}
    try:
        runs = [run_batch(prepared, batch, forward, index) for batch in batches]
    except CalibrationError:
        return None
    finally:
        for observer, seen in moments.items():
            observer.moments = seen
    leaves = [[leaf for leaf in pytree.tree_leaves(run) if isinstance(leaf, Tensor)] for run in runs]
    return leaves if len(set(map(len, leaves))) == 1 else None


def _alike(whole: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether an output equals the concatenation of its parts, up to rounding."""
    if not whole.dim() or len({part.shape[1:] for part in (whole, *parts)}) > 1:
        return False
    if sum(map(len, parts)) != len(whole) or not whole.numel():
        return False
    rounding = torch.finfo(whole.dtype).eps if whole.is_floating_point() else 0.0
    tolerance = max(1e-3, 4 * rounding) * float(whole.abs().max())
    own = torch.split(whole, list(map(len, parts)))
    pairs = [pair for each in zip(own, parts, strict=True) for pair in zip(*each, strict=True)]  # one sample at a time
    return all(torch.allclose(one, other, rtol=0.0, atol=tolerance) for one, other in pairs)
