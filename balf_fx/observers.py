"""Second-moment statistics of the values that flow through a graph, gathered batch by batch.

`Moments` is an immutable value: count, mean and scatter in float64, merged by Chan's update, so that batches, ranks
of a cluster and restarts add up to what one pass over everything would give.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from balf_fx.errors import NonFiniteError
from balf_fx.linalg import weight_matrix
from balf_fx.sites import ConvGeometry, Side, Site

_LOGGER = logging.getLogger(__name__)
_CHUNK_ELEMENTS = 1 << 19  # a chunk's working copy stays in the cache, and calibration's extra memory is bounded


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of vectors of length F in each of G groups.

    Attributes:
        count: number of positions seen, or the sum of their weights.
        mean: [G, F] float64.
        scatter: [G, F, F] float64, the sum of (v - mean)(v - mean)^T over positions.
    """

    count: float
    mean: Tensor
    scatter: Tensor

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together (Chan, Golub & LeVeque 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        between = delta.unsqueeze(-1) * delta.unsqueeze(-2) * (self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), self.scatter + other.scatter + between)

    def affine(self, scale: Tensor, shift: Tensor) -> Moments:
        """Moments of `scale * v + shift`, both [G, F]."""
        between = scale.unsqueeze(-1) * scale.unsqueeze(-2)
        return Moments(self.count, self.mean * scale + shift, self.scatter * between)

    def covariance(self) -> Tensor:
        """[G, F, F], the mean of (v - mean)(v - mean)^T."""
        return self.scatter / self.count

    def second_moment(self, offset: Tensor | None = None) -> Tensor:
        """[G, F, F], the mean of (v - offset)(v - offset)^T, with `offset` [G, F] (zero if None)."""
        mean = self.mean if offset is None else self.mean - offset
        return self.covariance() + mean.unsqueeze(-1) * mean.unsqueeze(-2)

    def __deepcopy__(self, memo: dict[int, Any]) -> Moments:
        return self  # never changed in place, and large


class CovarianceObserver(nn.Module):
    """Gathers the `Moments` of a site's output, or of the input positions that several sites read.

    A call returns nothing: the observer stands beside the value's own users, so it delays and keeps nothing.

    Args:
        site: the first site served; its side says what the value is, its geometry how to cut it into positions.
        skip_non_finite: pass over a value with NaN or infinity, with a warning in the log, in place of an error.
        side: what the value is; None for the side where the site's statistics cost least.
    """

    _is_impure = True  # tells FX that dead-code elimination must keep the call

    def __init__(self, site: Site, skip_non_finite: bool = False, side: Side | None = None) -> None:
        super().__init__()
        self.site = site
        self.side: Side = side or site.side
        self.skip_non_finite = skip_non_finite
        self.moments: Moments | None = None

    def extra_repr(self) -> str:
        return f"{self.side} of {self.site.name}, {0 if self.moments is None else self.moments.count} positions"

    def reset(self) -> None:
        """Forget everything seen."""
        self.moments = None

    @torch.no_grad()
    def forward(self, value: Tensor) -> None:
        with torch.autocast(value.device.type, enabled=False):
            seen = _batch_moments(value, self.site, self.side, torch.promote_types(value.dtype, torch.float32))
            if seen is not None and not _in_range(seen):  # squares overflow or underflow long before the values do
                seen = _batch_moments(value, self.site, self.side, torch.float64)
        if seen is None:
            return
        if not (torch.isfinite(seen.scatter).all() and torch.isfinite(seen.mean).all()):
            if self.skip_non_finite:
                _LOGGER.warning(
                    "the %s of site %r holds NaN or infinity: this call does not count", self.side, self.site.name
                )
                return
            raise NonFiniteError(
                f"the {self.side} of site {self.site.name!r} holds NaN or infinity: check the calibration batch "
                f"and the model's weights, or leave the layer out with exclude=[{self.site.name!r}]"
            )
        self.moments = seen if self.moments is None else self.moments.merge(seen)


@dataclass(frozen=True)
class Gradients:
    """Second moments of the gradient g at a site's output, summed over positions and samples.

    Attributes:
        samples: how many samples have been seen.
        total: the sum of |g|^2.
        scatter: [G, m, m], the sum of h h^T with h = Q^T g in the range of W = Q R, m = min(O, D); h = g on the output
            side.
        parts: [parts, O / parts, O / parts], the same of the parts of g, for sites that have parts.
    """

    samples: int
    total: float
    scatter: Tensor
    parts: Tensor | None

    def merge(self, other: Gradients) -> Gradients:
        """Both samples together."""
        parts = None if self.parts is None or other.parts is None else self.parts + other.parts
        return Gradients(self.samples + other.samples, self.total + other.total, self.scatter + other.scatter, parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gradients:
        return self


@dataclass(frozen=True)
class Sample:
    """What some of the samples have shown of a site.

    Attributes:
        gradients: at the output.
        moments: on the site's side, in which positions count by their gradients.
        features: of the input, of a convolution by pixels rather than by patches; None where not wanted.
    """

    gradients: Gradients
    moments: Moments
    features: Moments | None

    def merge(self, other: Sample) -> Sample:
        """Both together."""
        features = self.features if other.features is None else other.features
        if self.features is not None and other.features is not None:
            features = self.features.merge(other.features)
        return Sample(self.gradients.merge(other.gradients), self.moments.merge(other.moments), features)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sample:
        return self


class SensitivityObserver(nn.Module):
    """Gathers what the loss minds at a site.

    A position's weight is its squared gradient, averaged over the samples of the batch: some positions matter more
    than others, as the class token in the last block of a vision transformer does, and the average keeps out the
    noise of single gradients.

    Every other sample goes into the second half of `halves`, so that what is chosen by one half can be judged by the
    other.

    Args:
        site: the site.
        basis: Q [G, O, m] on the input side, None on the output side.
        copies: keep copies of values, since something may change them in place.
        features: also gather the moments of the input's features, for widths (`widths`).

    Attributes:
        positions: [P], the sum over batches of the positions' weights; None once batches differ in their positions.
    """

    _is_impure = True  # tells FX that dead-code elimination must keep the call

    def __init__(self, site: Site, basis: Tensor | None, copies: bool, features: bool = False) -> None:
        super().__init__()
        self.site = site
        self.copies = copies
        self.basis = basis
        self.wants_features = features
        # a list of (output, value, input) while `sensitivity` runs a batch
        self.pending: list[tuple[Tensor, Tensor, Tensor | None]] | None = None
        self.halves: list[Sample | None] = [None, None]
        self.sample: Sample | None = None
        self.positions: Tensor | None = None
        self.calls = 0

    def forward(self, source: Tensor, output: Tensor) -> None:
        """Hold on to the output, and to the value on the site's side, until the gradient is known."""
        if self.pending is not None and output.requires_grad:
            value = (output if self.site.side == "output" else source).detach()
            features = source.detach() if self.wants_features else None
            if self.copies:
                value, features = value.clone(), None if features is None else features.clone()
            self.pending.append((output, value, features))

    @torch.no_grad()
    def take(self, value: Tensor, features: Tensor | None, gradient: Tensor) -> None:
        """Count one value, the input if it is wanted, and the gradient at the output that belongs to them."""
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if not torch.isfinite(gradient).all():
            return
        gradient, value = by_sample(gradient, self.site), by_sample(value, self.site)
        features = None if features is None else by_sample(features, self.site)
        samples = len(gradient)
        positions = output_columns(gradient, self.site).square().sum((0, 1)).reshape(samples, -1).mean(0)
        parts = [(value, features, gradient)]
        if samples > 1 and len(value) == samples and (features is None or len(features) == samples):
            halves = (slice(0, None, 2), slice(1, None, 2))
            parts = [(value[own], None if features is None else features[own], gradient[own]) for own in halves]
        counted = False
        for part in parts:
            seen = self._sample(*part, positions)
            if seen is not None:
                half = self.calls % 2
                before = self.halves[half]
                self.halves[half] = seen if before is None else before.merge(seen)
                self.sample = seen if self.sample is None else self.sample.merge(seen)
                counted = True
            self.calls += 1
        if counted and self.positions is None and self.calls == len(parts):
            self.positions = positions
        elif counted and self.positions is not None:
            alike = len(positions) == len(self.positions)
            self.positions = self.positions + positions if alike else None

    def _sample(self, value: Tensor, features: Tensor | None, gradient: Tensor, positions: Tensor) -> Sample | None:
        """Statistics of some samples; None where no gradient has reached them."""
        columns = output_columns(gradient, self.site)  # [G, O, n]
        samples = columns.shape[-1] // len(positions)
        weights = positions.repeat(samples)
        inner = columns if self.basis is None else self.basis.to(columns).mT @ columns
        parts = None
        if self.site.parts > 1:
            pieces = columns.reshape(self.site.parts, -1, columns.shape[-1])
            parts = (pieces @ pieces.mT).to(torch.float64)
        total = float(columns.square().sum(dtype=torch.float64))
        moments = _batch_moments(value, self.site, self.site.side, columns.dtype, weights)
        if moments is None:
            return None
        seen = None if features is None else self._features(features, columns.dtype, weights)
        return Sample(Gradients(samples, total, (inner @ inner.mT).to(torch.float64), parts), moments, seen)

    def _features(self, value: Tensor, dtype: torch.dtype, weights: Tensor) -> Moments | None:
        rows = value if self.site.conv is None else _batched(value, self.site.conv).movedim(1, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        per_chunk = max(_CHUNK_ELEMENTS // rows.shape[1], 4 * rows.shape[1])
        chunks = (piece.mT.unsqueeze(0) for piece in torch.split(rows, per_chunk))
        # Strides and borders part the pixels of the input from those of the output: then all count alike.
        return _sum_moments(chunks, dtype, weights if len(weights) == len(rows) else None)


@dataclass(frozen=True)
class WeightGradients:
    """The gradient of the loss at a site's weight, summed over batches.

    Attributes:
        absolute, squares: [G, O, D] float32, the sums of |dL/dW| and of (dL/dW)^2.
    """

    absolute: Tensor
    squares: Tensor

    def merge(self, other: WeightGradients) -> WeightGradients:
        """Both samples together."""
        return WeightGradients(self.absolute + other.absolute, self.squares + other.squares)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightGradients:
        return self


class InfluenceObserver(nn.Module):
    """Gathers the `WeightGradients` of a site.

    No node calls it, since no value in the graph is what it observes: `sensitivity` hands it the gradient of each
    batch, that of all uses of the weight together.

    Args:
        site: the site.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.gradients: WeightGradients | None = None

    @torch.no_grad()
    def take(self, gradient: Tensor) -> None:
        """Count the gradient of one batch, in the shape of the weight."""
        if not torch.isfinite(gradient).all():
            return
        grouped = weight_matrix(gradient, self.site.groups, self.site.inputs_first)
        seen = WeightGradients(grouped.abs().float(), grouped.square().float())
        self.gradients = seen if self.gradients is None else self.gradients.merge(seen)


def by_sample(value: Tensor, site: Site) -> Tensor:
    """A site's input or output with a leading dimension of samples, and for a linear layer one of positions."""
    if site.conv is not None:
        return _batched(value, site.conv)
    leading = value.shape[:-1] or (1,)
    return value.reshape(leading[0], math.prod(leading[1:]), value.shape[-1])


def output_columns(value: Tensor, site: Site) -> Tensor:
    """A site's output as [G, O, n]."""
    if site.conv is None:
        return value.reshape(-1, site.out_features).mT.unsqueeze(0)
    batched = _batched(value, site.conv)
    return batched.reshape(len(batched), site.groups, site.out_features, -1).movedim(0, 2).flatten(2)


def input_columns(value: Tensor, site: Site, pixels: tuple[slice, ...] = ()) -> Tensor:
    """A site's input as [G, D, n], positions in the order of the output's; of a convolution, of some pixels."""
    if site.conv is None:
        return value.reshape(-1, site.in_features).mT.unsqueeze(0)
    return input_patches(_batched(value, site.conv), site.conv, site.groups, pixels)


def _batched(value: Tensor, conv: ConvGeometry) -> Tensor:
    """With a batch dimension, which convolutions may lack."""
    return value if value.dim() == len(conv.kernel_size) + 2 else value.unsqueeze(0)


def _in_range(moments: Moments) -> bool:
    """Whether sums of squares stayed where float32 is accurate."""
    largest = float(moments.scatter.diagonal(dim1=-2, dim2=-1).max())
    return 1e-30 < largest < float("inf") and bool(torch.isfinite(moments.scatter).all())


def _batch_moments(
    value: Tensor, site: Site, side: Side, dtype: torch.dtype, weights: Tensor | None = None
) -> Moments | None:
    """Moments of one value on a side of a site.

    Args:
        weights: [n], of all positions in their order; None for 1 each.
    """
    return _sum_moments(_position_chunks(value, site, side), dtype, weights)


def _sum_moments(chunks: Iterable[Tensor], dtype: torch.dtype, weights: Tensor | None) -> Moments | None:
    """Moments of [G, F, n] pieces: products in `dtype` around a shift near the mean, totals in float64."""
    shift, total, scatter = None, None, None
    count, seen = 0.0, 0
    for chunk in chunks:
        chunk = chunk.to(dtype)
        if shift is None:
            shift = chunk.mean(-1)
        centred = chunk - shift.unsqueeze(-1)
        weighted = centred
        if weights is not None:
            own = weights[seen : seen + chunk.shape[-1]].to(dtype)
            weighted = centred * own
        products, sums = weighted @ centred.mT, weighted.sum(-1)
        seen += chunk.shape[-1]
        count += chunk.shape[-1] if weights is None else float(own.sum(dtype=torch.float64))
        if total is None or scatter is None:
            total, scatter = sums.to(torch.float64), products.to(torch.float64)
        else:
            total, scatter = total.add_(sums), scatter.add_(products)
    if shift is None or total is None or scatter is None or count <= 0:
        return None
    drift = total / count
    scatter -= drift.unsqueeze(-1) * drift.unsqueeze(-2) * count
    return Moments(count, shift.to(torch.float64) + drift, scatter)


def _position_chunks(value: Tensor, site: Site, side: Side) -> Iterator[Tensor]:
    """Cut a site's output or input into [G, F, n] pieces, F = O or D, along the batch."""
    if value.numel() == 0:
        return
    output = side == "output"
    features = site.out_features if output else site.in_features
    if site.conv is None:
        batched, per_chunk = value.reshape(-1, features), max(_CHUNK_ELEMENTS // features, 4 * features)
    else:
        batched = _batched(value, site.conv)
        pixels = math.prod(batched.shape[2:])
        per_chunk = max(_CHUNK_ELEMENTS // (features * pixels), 4 * features // pixels, 1)
    for piece in torch.split(batched, per_chunk):
        yield output_columns(piece, site) if output else input_columns(piece, site)


def input_patches(value: Tensor, conv: ConvGeometry, groups: int, pixels: tuple[slice, ...] = ()) -> Tensor:
    """im2col for any number of spatial dimensions.

    Args:
        value: [B, C_in, *size].
        pixels: which of the output's, along each axis; empty for all.
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
