"""The positions of a batch that a regression reads, and those that are held out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from balf_fx.calibration.moments import CHUNK_ELEMENTS, by_sample, leading_sizes
from balf_fx.graph.layers import site_input
from balf_fx.graph.site import Site
from balf_fx.refit.lockstep import Batch, Lockstep

_HELD_OUT = 4  # one sample in four
_ENOUGH = 300  # positions per column; more pixels of a convolution add little, since neighbours are similar
_FEWEST = 32  # the least number of columns for which positions are counted
_CHUNK_POSITIONS = 2048  # enough that adding up products costs little compared to computing them


@dataclass(frozen=True)
class Window:
    """The positions of a batch that are read.

    Attributes:
        samples: the samples that are read, as a slice or their numbers [n].
        pixels: the pixels that are read, along each axis of a convolution's output; empty for all positions.
    """

    samples: slice | Tensor
    pixels: tuple[slice, ...] = ()

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self.samples) if isinstance(self.samples, Tensor) else self.samples.stop - self.samples.start

    def of(self, value: Tensor) -> Tensor:
        """These positions of a value with the shape of the layer's output, samples first."""
        value = value[self.samples]
        return value[(slice(None), slice(None), *self.pixels)] if self.pixels else value

    def weights(self, importance: Tensor | None, counted: Tensor | None) -> Tensor | None:
        """The weights [n] of these positions; None if each is 1.

        Args:
            importance: [*sizes], the weights of the positions of any sample.
            counted: [N, *sizes], the weights of the positions of each sample.
        """
        own = None if counted is None else counted[self.samples][(slice(None), *self.pixels)].flatten()
        if importance is None:
            return own
        repeated = importance[self.pixels].flatten().repeat(self.count)
        return repeated if own is None else repeated * own.to(repeated)


@dataclass(frozen=True)
class Visit:
    """A window of a batch that is in memory.

    Attributes:
        share: 0 for the training share, 1 for the held-out share.
        weights: [m], the weights of the m positions of the window that count; None for 1 each.
        kept: [n], which of the window's n positions these are; None for all.
    """

    batch: Batch
    window: Window
    share: int
    weights: Tensor | None
    kept: Tensor | None = None

    def keep(self, values: Tensor) -> Tensor:
        """Values at the window's positions, [G, F, n], at those that count."""
        return values if self.kept is None else values[..., self.kept]


def visits(
    walk: Lockstep, node: fx.Node, site: Site, shape: tuple[int, int], importance: Tensor | None
) -> Iterator[Visit]:
    """Read all samples, and as many of their positions as a regression needs.

    Args:
        shape: the outputs O and inputs D of the map that is solved for.
        importance: [P], the weight of each position of a sample, in any unit; None for equal weights, as in batches
            with another number of positions.
    """
    outputs, inputs = shape
    seen = turn = 0  # the grid is shifted each turn: together they read all pixels
    for batch in walk.batches():
        count, sizes = _positions(batch, node, site)
        counted = _counted(walk, node, site, batch, (count, *sizes))
        numbers = _present(counted)
        samples = count if numbers is None else len(numbers)
        together = walk.samples_like(batch, samples)
        steps = pixel_steps(together, sizes, inputs) if site.conv is not None else (1,) * len(sizes)
        positions = grid_count(sizes, steps)
        weights = None if importance is None else position_weights(importance, sizes)
        for other in walk.rows_of_others(batch, samples):  # what one process would have read before
            turn += sum(1 for _ in chunks(seen, other, positions, max(inputs, outputs)))
            seen += other
        for share, span in chunks(seen, samples, positions, max(inputs, outputs)):
            window = Window(span if numbers is None else numbers[span], pixel_grid(sizes, steps, turn))
            own, kept = window.weights(weights, counted), None
            if counted is not None and own is not None:
                kept = own > 0
                own = own[kept]
            yield Visit(batch, window, share, own, kept)
            turn += 1
        seen += samples


def _positions(batch: Batch, node: fx.Node, site: Site) -> tuple[int, tuple[int, ...]]:
    """The number of samples, and the sizes of their positions, which a linear layer's input has, too."""
    value = by_sample(batch.before(node if site.conv is not None else site_input(node)), site)
    return len(value), tuple(value.shape[2:] if site.conv is not None else value.shape[1:2])


def _counted(walk: Lockstep, node: fx.Node, site: Site, batch: Batch, shape: Sequence[int]) -> Tensor | None:
    """The weights of the positions of each sample, [N, *sizes]; None if each is 1."""
    weights, value = walk.weights(node, batch), batch.before(site_input(node))
    found = None if weights is None else weights.at(leading_sizes(value, site, "input"))
    return None if found is None else found.to(value.device).reshape(*shape)


def _present(counted: Tensor | None) -> Tensor | None:
    """The numbers of the samples of which a position counts; None for all."""
    if counted is None:
        return None
    present = (counted.flatten(1) > 0).any(1)
    return None if bool(present.all()) else present.nonzero().squeeze(1)


def position_weights(importance: Tensor, sizes: tuple[int, ...]) -> Tensor | None:
    """The weights as [*sizes], 1 on average, from [P]; None if a sample has another number of positions."""
    if len(importance) != math.prod(sizes):
        return None
    mean = importance.mean().clamp_min(torch.finfo(importance.dtype).tiny)
    return (importance / mean).reshape(sizes)


def chunks(seen: int, samples: int, positions: int, features: int) -> Iterator[tuple[int, slice]]:
    """Split a batch's samples into the training share, 0, and the held-out share, 1, and these into chunks.

    Args:
        seen: the number of samples in the batches before, so that a quarter is held out even of small batches.
        positions: the number of positions in each sample.
        features: the number of features at each position.
    """
    cut = samples - ((seen + samples) // _HELD_OUT - seen // _HELD_OUT)
    size = max(CHUNK_ELEMENTS // max(features * positions, 1), _CHUNK_POSITIONS // max(positions, 1), 1)
    for share, (start, stop) in enumerate(((0, cut), (cut, samples))):
        for begin in range(start, stop, size):
            yield share, slice(begin, min(begin + size, stop))


def pixel_steps(samples: int, sizes: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    """The steps of the pixel grid, nearly alike along all axes, that leave enough positions for each column."""
    spare = samples * math.prod(sizes) / (_ENOUGH * max(inputs, _FEWEST))
    steps = [max(int(spare ** (1 / len(sizes))), 1)] * len(sizes)
    for axis, step in enumerate(steps):
        if math.prod(steps) // step * (step + 1) <= spare:
            steps[axis] += 1
    return tuple(steps)


def grid_count(sizes: tuple[int, ...], steps: tuple[int, ...]) -> int:
    """The number of pixels of a grid, at most."""
    return math.prod(-(-size // step) for size, step in zip(sizes, steps, strict=True))


def pixel_grid(sizes: tuple[int, ...], steps: tuple[int, ...], turn: int) -> tuple[slice, ...]:
    """A grid of pixels with these steps, with another offset each turn; empty for all pixels."""
    if all(step == 1 for step in steps):
        return ()
    slices = []
    for size, step in zip(sizes, steps, strict=True):
        slices.append(slice(turn % step % size, None, step))
        turn //= step
    return tuple(slices)
