"""Which positions of a batch a regression reads, and which are held out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from balf_fx.calibration.moments import by_sample
from balf_fx.graph.site import Site
from balf_fx.refit.lockstep import Batch, Lockstep

_HELD_OUT = 4  # one sample of so many
_ENOUGH = 600  # positions per column; beyond these, a convolution's pixels tell little that their neighbours do not
_FEWEST = 32  # columns that are reckoned with at least
_CHUNK_ELEMENTS = 1 << 19  # a chunk's columns stay in the cache
_CHUNK_POSITIONS = 2048  # but so many that adding up products costs little beside taking them


@dataclass(frozen=True)
class Window:
    """Which positions of a batch are read.

    Attributes:
        samples: of these.
        pixels: along each axis of a convolution's output; empty for all positions.
    """

    samples: slice
    pixels: tuple[slice, ...] = ()

    def of(self, value: Tensor) -> Tensor:
        """These positions of a value like the layer's output, samples first."""
        return value[(self.samples, slice(None), *self.pixels)] if self.pixels else value[self.samples]

    def repeat(self, weights: Tensor) -> Tensor:
        """The weights [n] of the positions, from those of one sample's positions, [*sizes]."""
        return weights[self.pixels].flatten().repeat(self.samples.stop - self.samples.start)


@dataclass(frozen=True)
class Visit:
    """A window of a batch that is in memory.

    Attributes:
        share: 0 of the training share, 1 of the held-out share.
        weights: [n], of the window's positions, 1 on average over a sample; None for 1 each.
    """

    batch: Batch
    window: Window
    share: int
    weights: Tensor | None


def visits(
    walk: Lockstep, node: fx.Node, site: Site, shape: tuple[int, int], importance: Tensor | None
) -> Iterator[Visit]:
    """Read all samples, and of these as many positions as a regression needs.

    Args:
        shape: of the map that is solved for, outputs O and inputs D.
        importance: [P], what each position of a sample counts, in any unit; None for all alike, as where batches have
            another number of positions.
    """
    outputs, inputs = shape
    seen = turn = 0  # windows take turns, so that between them they see all pixels
    for batch in walk.batches():
        original = by_sample(batch.original[node], site)
        sizes = tuple(original.shape[2:] if site.conv is not None else original.shape[1:2])
        step = pixel_step(len(walk.inputs) * len(original), sizes, inputs) if site.conv is not None else 1
        positions = math.prod(-(-size // step) for size in sizes)
        weights = None if importance is None else position_weights(importance, sizes)
        for share, samples in chunks(seen, len(original), positions, max(inputs, outputs)):
            window = Window(samples, pixel_grid(sizes, step, turn))
            yield Visit(batch, window, share, None if weights is None else window.repeat(weights))
            turn += 1
        seen += len(original)


def position_weights(importance: Tensor, sizes: tuple[int, ...]) -> Tensor | None:
    """[*sizes], 1 on average, from [P]; None where a sample has another number of positions."""
    if len(importance) != math.prod(sizes):
        return None
    mean = importance.mean().clamp_min(torch.finfo(importance.dtype).tiny)
    return (importance / mean).reshape(sizes)


def chunks(seen: int, samples: int, positions: int, features: int) -> Iterator[tuple[int, slice]]:
    """Cut a batch's samples into its training share, 0, and its held-out share, 1, and these into chunks.

    Args:
        seen: samples of the batches before, so that of small batches a quarter is held out as well.
        positions: of each sample.
        features: in each position.
    """
    cut = samples - ((seen + samples) // _HELD_OUT - seen // _HELD_OUT)
    size = max(_CHUNK_ELEMENTS // max(features * positions, 1), _CHUNK_POSITIONS // max(positions, 1), 1)
    for share, (start, stop) in enumerate(((0, cut), (cut, samples))):
        for begin in range(start, stop, size):
            yield share, slice(begin, min(begin + size, stop))


def pixel_step(samples: int, sizes: tuple[int, ...], inputs: int) -> int:
    """Every how many pixels along each axis to read one, to have enough positions for each column."""
    spare = samples * math.prod(sizes) / (_ENOUGH * max(inputs, _FEWEST))
    return max(int(spare ** (1 / len(sizes))), 1)


def pixel_grid(sizes: tuple[int, ...], step: int, turn: int) -> tuple[slice, ...]:
    """One of the grids of that step, another one each turn; empty for all pixels."""
    if step == 1:
        return ()
    return tuple(slice(turn // step**axis % min(step, size), None, step) for axis, size in enumerate(sizes))
