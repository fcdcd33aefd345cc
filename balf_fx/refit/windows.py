"""Which positions of a batch a regression reads, and which are held out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

_HELD_OUT = 4  # one sample of so many


_ENOUGH = 600  # positions per column; beyond these, a convolution's pixels tell little that their neighbours do not


_FEWEST = 32  # columns that are reckoned with at least


_CHUNK_ELEMENTS = 1 << 19  # a chunk's columns stay in the cache


_CHUNK_POSITIONS = 2048  # but so many that adding up products costs little beside taking them


@dataclass(frozen=True)
class Window:
    """Which positions of a batch are looked at.

    Attributes:
        samples: of these.
        pixels: along each axis of a convolution's output; empty for all positions.
    """

    samples: slice
    pixels: tuple[slice, ...] = ()

    def of(self, value: Tensor) -> Tensor:
        """These positions of a value like the layer's output, samples first."""
        return value[(self.samples, slice(None), *self.pixels)] if self.pixels else value[self.samples]


def chunks(seen: int, samples: int, positions: int, features: int) -> Iterator[tuple[int, slice]]:
    """Cut a batch's samples into its training share, 0, and its held-out share, 1, and these into chunks.

    Args:
        seen: samples of the batches before, so that of small batches a quarter is held out as well.
    """
    cut = samples - ((seen + samples) // _HELD_OUT - seen // _HELD_OUT)
    size = max(_CHUNK_ELEMENTS // max(features * positions, 1), _CHUNK_POSITIONS // max(positions, 1), 1)
    for share, (start, stop) in enumerate(((0, cut), (cut, samples))):
        for begin in range(start, stop, size):
            yield share, slice(begin, min(begin + size, stop))


def pixel_step(samples: int, sizes: tuple[int, ...], inputs: int) -> int:
    """Every how many pixels along each axis to look at one, to have enough positions for each column."""
    spare = samples * math.prod(sizes) / (_ENOUGH * max(inputs, _FEWEST))
    return max(int(spare ** (1 / len(sizes))), 1)


def pixel_grid(sizes: tuple[int, ...], step: int, turn: int) -> tuple[slice, ...]:
    """One of the grids of that step, another one each turn; empty for all pixels."""
    if step == 1:
        return ()
    return tuple(slice(turn // step**axis % min(step, size), None, step) for axis, size in enumerate(sizes))


def repeated(weights: Tensor, window: Window, x: Tensor) -> Tensor:
    """The weight of each of a window's positions [n], in the precision of its columns."""
    own = weights[window.pixels].flatten().to(x.dtype)
    return own.repeat(x.shape[-1] // len(own))
