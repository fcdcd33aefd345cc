"""Second moments of the values at a site, batch by batch.

`Moments` is an immutable value: count, mean and scatter in float64, merged by Chan's update. Moments of batches,
processes and restarts therefore merge to those of one pass over all samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from balf_fx.calibration.gram import add_lower, mirror
from balf_fx.graph.site import ConvGeometry, Side, Site

CHUNK_ELEMENTS = 1 << 19  # small enough that a chunk's working copy stays in the cache, and extra memory is bounded


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of vectors of length F in each of G groups.

    Attributes:
        count: the number of positions, or the sum of their weights; [G] float64 where groups have different positions.
        mean: [G, F] float64.
        scatter: [G, F, F] float64, the sum of (v - mean)(v - mean)^T over positions.
    """

    count: float | Tensor
    mean: Tensor
    scatter: Tensor

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together (Chan, Golub & LeVeque 1979)."""
        count = self.count + other.count
        share = other.count / _positive(count)
        delta = other.mean - self.mean
        scatter = (delta.unsqueeze(-1) * delta.unsqueeze(-2)).mul_(_columns(self.count * share, 2))
        scatter += self.scatter
        scatter += other.scatter
        return Moments(count, self.mean + delta * _columns(share, 1), scatter)

    def covariance(self) -> Tensor:
        """[G, F, F], the mean of (v - mean)(v - mean)^T."""
        return self.scatter / _columns(_positive(self.count), 2)

    def second_moment(self, offset: Tensor | None = None) -> Tensor:
        """[G, F, F], the mean of (v - offset)(v - offset)^T, with `offset` [G, F] (zero if None)."""
        mean = self.mean if offset is None else self.mean - offset
        return self.covariance() + mean.unsqueeze(-1) * mean.unsqueeze(-2)

    def __deepcopy__(self, memo: dict[int, Any]) -> Moments:
        return self  # immutable and large


def _positive(count: float | Tensor) -> float | Tensor:
    """The count to divide by; a group without positions has sums of zero."""
    return torch.where(count > 0, count, 1.0) if isinstance(count, Tensor) else count


def _columns(count: float | Tensor, dimensions: int) -> float | Tensor:
    """A count [G] with more dimensions of size 1."""
    return count.reshape(-1, *[1] * dimensions) if isinstance(count, Tensor) else count


def by_sample(value: Tensor, site: Site) -> Tensor:
    """A site's input or output with a leading dimension of samples and, for a linear layer, one of positions."""
    if site.conv is not None:
        return with_batch(value, site.conv)
    value = samples_first(value, site)
    leading = value.shape[:-1] or (1,)
    return value.reshape(leading[0], math.prod(leading[1:]), value.shape[-1])


def samples_first(value: Tensor, site: Site) -> Tensor:
    """A site's input or output with its samples in the first dimension."""
    return value.movedim(site.samples, 0) if site.samples else value


def leading_sizes(value: Tensor, site: Site, side: Side) -> tuple[int, ...]:
    """The dimensions of a site's positions, samples first, from its input or output.

    A convolution's positions are those of its output, for both.
    """
    if site.conv is None:
        return tuple(samples_first(value, site).shape[:-1])
    samples, _, *sizes = with_batch(value, site.conv).shape
    return (samples, *(sizes if side == "output" else site.conv.output_sizes(sizes)))


def output_columns(value: Tensor, site: Site) -> Tensor:
    """A site's output as [G, O, n]."""
    if site.conv is None:
        return value.reshape(-1, site.out_features).mT.unsqueeze(0)
    batched = with_batch(value, site.conv)
    return batched.reshape(len(batched), site.groups, site.out_features, -1).movedim(0, 2).flatten(2)


def input_columns(value: Tensor, site: Site, pixels: tuple[slice, ...] = ()) -> Tensor:
    """A site's input as [G, D, n], with positions in the order of the output; of a convolution, some pixels."""
    if site.conv is None:
        return value.reshape(-1, site.in_features).mT.unsqueeze(0)
    return input_patches(with_batch(value, site.conv), site.conv, site.groups, pixels)


def with_batch(value: Tensor, conv: ConvGeometry) -> Tensor:
    """The value of a convolution with a batch dimension, added if it has none."""
    return value if value.dim() == len(conv.kernel_size) + 2 else value.unsqueeze(0)


def in_range(moments: Moments) -> bool:
    """Whether sums of squares are in the range in which float32 is accurate."""
    largest = float(moments.scatter.diagonal(dim1=-2, dim2=-1).max())
    return 1e-30 < largest < float("inf") and is_finite(moments.scatter)


def is_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity; the sum, which is quick, shows it unless it overflows itself."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def batch_moments(
    value: Tensor, site: Site, side: Side, dtype: torch.dtype, weights: Tensor | None = None
) -> Moments | None:
    """Moments of one value on a side of a site; None if it is empty.

    Args:
        weights: [n], the weights of all positions in their order; None for 1 each. What lies at positions without
            weight is not read.
    """
    return sum_moments(_position_chunks(value, site, side), dtype, weights)


def sum_moments(chunks: Iterable[Tensor], dtype: torch.dtype, weights: Tensor | None) -> Moments | None:
    """Moments of [G, F, n] pieces: products in `dtype` around a shift near the mean, totals in float64."""
    shift, total, scatter = None, None, None
    count, seen = 0.0, 0
    for chunk in chunks:
        own = None if weights is None else weights[seen : seen + chunk.shape[-1]].to(chunk.device)
        seen += chunk.shape[-1]
        if own is not None and not (own > 0).all():
            chunk, own = chunk[..., own > 0], own[own > 0]  # not times 0, since padding may be NaN
            if not len(own):
                continue
        chunk = chunk.to(dtype)
        if shift is None:
            shift = chunk.mean(-1)
        centred = chunk - shift.unsqueeze(-1)
        sums = centred.sum(-1) if own is None else centred @ own.to(dtype)
        count += chunk.shape[-1] if own is None else float(own.sum(dtype=torch.float64))
        if total is None or scatter is None:
            total = sums.to(torch.float64)
            scatter = total.new_zeros(*total.shape, total.shape[-1])
        else:
            total.add_(sums)
        add_lower(scatter, centred if own is None else centred * own.to(dtype).sqrt())
    if shift is None or total is None or scatter is None or count <= 0:
        return None
    drift = total / count
    scatter = mirror(scatter)
    scatter -= (drift.unsqueeze(-1) * drift.unsqueeze(-2)).mul_(count)
    return Moments(count, shift.to(torch.float64) + drift, scatter)


def _position_chunks(value: Tensor, site: Site, side: Side) -> Iterator[Tensor]:
    """Split a site's output or input along the batch into [G, F, n] pieces, F = O or D."""
    if value.numel() == 0:
        return
    output = side == "output"
    features = site.out_features if output else site.in_features
    if site.conv is None:
        batched, per_chunk = value.reshape(-1, features), max(CHUNK_ELEMENTS // features, 4 * features)
    else:
        batched = with_batch(value, site.conv)
        pixels = math.prod(batched.shape[2:])
        per_chunk = max(CHUNK_ELEMENTS // (features * pixels), 4 * features // pixels, 1)
    for piece in torch.split(batched, per_chunk):
        yield output_columns(piece, site) if output else input_columns(piece, site)


def input_patches(value: Tensor, conv: ConvGeometry, groups: int, pixels: tuple[slice, ...] = ()) -> Tensor:
    """im2col for any number of spatial dimensions.

    Args:
        value: [B, C_in, *size].
        pixels: the output's pixels to read, along each axis; empty for all.
    Returns:
        [G, D, n]: the patch under the kernel at each of the n output positions, D ordered as in the weight.
    """
    spatial = len(conv.kernel_size)
    if any(pair != (0, 0) for pair in conv.padding):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        value = F.pad(value, [amount for pair in reversed(conv.padding) for amount in pair], mode=mode)
    for axis, (kernel, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        value = value.unfold(2 + axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    value = value[(slice(None), slice(None), *pixels)]
    grouped = value.reshape(len(value), groups, -1, *value.shape[2:])  # [B, G, C_in / G, *out, *kernel]
    kernel_axes = range(3 + spatial, 3 + 2 * spatial)
    patches = grouped.permute(1, 2, *kernel_axes, 0, *range(3, 3 + spatial))
    flat: Tensor = patches.flatten(1, 1 + spatial).flatten(2)
    return flat
