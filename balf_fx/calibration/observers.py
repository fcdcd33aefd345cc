"""Modules that observe the values of a graph and gather their statistics."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from balf_fx.calibration.moments import (
    CHUNK_ELEMENTS,
    Moments,
    batch_moments,
    by_sample,
    in_range,
    output_columns,
    sum_moments,
    with_batch,
)
from balf_fx.errors import NonFiniteError
from balf_fx.graph.parameters import site_matrix
from balf_fx.graph.site import Side, Site

_LOGGER = logging.getLogger(__name__)


class CovarianceObserver(nn.Module):
    """Gathers the `Moments` of a site's output, or of the input positions that several sites read.

    A call returns nothing: the observer is an additional user of the value and does not change it.

    Args:
        site: the first site observed; its geometry determines how a value is split into positions.
        skip_non_finite: skip a value with NaN or infinity and log a warning, in place of an error.
        side: whether the value is the site's input or output; None for the side with the fewer features.
    """

    _is_impure = True  # tells FX that dead-code elimination must keep the call

    def __init__(self, site: Site, skip_non_finite: bool = False, side: Side | None = None) -> None:
        super().__init__()
        self.site = site
        self.side: Side = side or site.side
        self.skip_non_finite = skip_non_finite
        self.moments: Moments | None = None

    def extra_repr(self) -> str:
        count = 0.0 if self.moments is None else self.moments.count
        return f"{self.side} of {self.site.name}, {float(torch.as_tensor(count).sum()):g} positions"

    def reset(self) -> None:
        """Delete all statistics."""
        self.moments = None

    @torch.no_grad()
    def forward(self, value: Tensor) -> None:
        with torch.autocast(value.device.type, enabled=False):
            seen = self._moments(value, torch.promote_types(value.dtype, torch.float32))
            if seen is not None and not in_range(seen):  # squares overflow or underflow long before the values do
                seen = self._moments(value, torch.float64)
        if seen is None:
            return
        if not (torch.isfinite(seen.scatter).all() and torch.isfinite(seen.mean).all()):
            if self.skip_non_finite:
                _LOGGER.warning(
                    "the %s of site %r contains NaN or infinity: this call is not used for calibration",
                    self.side,
                    self.site.name,
                )
                return
            raise NonFiniteError(
                f"the {self.side} of site {self.site.name!r} contains NaN or infinity: check the calibration batch "
                f"and the model's weights, or leave the layer out with exclude=[{self.site.name!r}]"
            )
        self.moments = seen if self.moments is None else self.moments.merge(seen)

    def _moments(self, value: Tensor, dtype: torch.dtype) -> Moments | None:
        return batch_moments(value, self.site, self.side, dtype)


@dataclass(frozen=True)
class Gradients:
    """Second moments of the gradient g at a site's output, summed over positions and samples.

    Attributes:
        samples: the number of samples.
        total: the sum of |g|^2.
        scatter: [G, m, m], the sum of h h^T, where h = g on the output side and h = Q^T g, W = Q R, on the input side;
            m = min(O, D).
        parts: [parts, O / parts, O / parts], the same for the parts of g, for sites that have parts.
    """

    samples: float
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
    """The statistics of a site over some of the samples.

    Attributes:
        gradients: the gradients at the output.
        moments: the moments on the site's side, with positions weighted by their squared gradients.
        features: the moments of the input's features, for a convolution those of pixels, not of patches; None if they
            are not needed.
    """

    gradients: Gradients
    moments: Moments
    features: Moments | None

    def merge(self, other: Sample) -> Sample:
        """Statistics of both samples together."""
        features = self.features if other.features is None else other.features
        if self.features is not None and other.features is not None:
            features = self.features.merge(other.features)
        return Sample(self.gradients.merge(other.gradients), self.moments.merge(other.moments), features)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sample:
        return self


Recorded = tuple[Tensor, Tensor, Tensor | None]
"""A site's output, the value on the site's side, and the input if its features are needed, or what assigns rows."""


class SensitivityObserver(nn.Module):
    """Gathers the sensitivity of the loss to output errors of a site.

    A position's weight is its squared gradient, averaged over the samples of the batch. Some positions matter more
    than others, like the class token in the last block of a vision transformer, and the average reduces the noise of
    single gradients.

    Samples go to the two `halves` alternately, so that a choice based on one half can be evaluated on the other.

    Args:
        site: the site.
        basis: Q [G, O, m] on the input side, None on the output side.
        copies: whether to copy values, since something may change them in place.
        features: whether to gather the moments of the input's features too, for `passes.ScoreWidths`.

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
        self._recorded: list[Recorded] | None = None
        self.batch_samples = 0
        self.halves: list[Sample | None] = [None, None]
        self.sample: Sample | None = None
        self.positions: Tensor | None = None
        self.calls = 0

    @contextmanager
    def recording(self, samples: int = 0) -> Iterator[Sequence[Recorded]]:
        """Record the values of each call during the context; calls outside it record nothing.

        Args:
            samples: the number of samples in the batch; 0 if it is not known.
        """
        recorded: list[Recorded] = []
        self._recorded, self.batch_samples = recorded, samples
        try:
            yield recorded
        finally:
            self._recorded = None

    def forward(self, source: Tensor, output: Tensor) -> None:
        """Record the output and the value on the site's side until the gradient is known."""
        if self._recorded is not None and output.requires_grad:
            value = (output if self.site.side == "output" else source).detach()
            features = source.detach() if self.wants_features else None
            if self.copies:
                value, features = value.clone(), None if features is None else features.clone()
            self._recorded.append((output, value, features))

    @torch.no_grad()
    def take(self, value: Tensor, features: Tensor | None, gradient: Tensor) -> None:
        """Add one value, its input features if they are needed, and the gradient at its output to the statistics."""
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if gradient.numel() == 0 or not torch.isfinite(gradient).all():
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
        """Statistics of some samples; None if no gradient has reached them."""
        columns = output_columns(gradient, self.site)  # [G, O, n]
        samples = columns.shape[-1] // len(positions)
        weights = positions.repeat(samples)
        inner = columns if self.basis is None else self.basis.to(columns).mT @ columns
        parts = None
        if self.site.parts > 1:
            pieces = columns.reshape(self.site.parts, -1, columns.shape[-1])
            parts = (pieces @ pieces.mT).to(torch.float64)
        total = float(columns.square().sum(dtype=torch.float64))
        moments = batch_moments(value, self.site, self.site.side, columns.dtype, weights)
        if moments is None:
            return None
        seen = None if features is None else self._features(features, columns.dtype, weights)
        return Sample(Gradients(samples, total, (inner @ inner.mT).to(torch.float64), parts), moments, seen)

    def _features(self, value: Tensor, dtype: torch.dtype, weights: Tensor) -> Moments | None:
        rows = value if self.site.conv is None else with_batch(value, self.site.conv).movedim(1, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        per_chunk = max(CHUNK_ELEMENTS // rows.shape[1], 4 * rows.shape[1])
        chunks = (piece.mT.unsqueeze(0) for piece in torch.split(rows, per_chunk))
        # With strides or borders, the input's pixels do not match the output's weights: then all have weight 1.
        return sum_moments(chunks, dtype, weights if len(weights) == len(rows) else None)


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

    No node calls it, since it does not observe a value of the graph. `calibration.gradients` passes it the gradient of
    each batch, summed over all uses of the weight.

    Args:
        site: the site.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.gradients: WeightGradients | None = None

    @torch.no_grad()
    def take(self, gradient: Tensor) -> None:
        """Add the gradient of one batch, in the shape of the weight."""
        if not torch.isfinite(gradient).all():
            return
        grouped = site_matrix(gradient, self.site)
        seen = WeightGradients(grouped.abs().float(), grouped.square().float())
        self.gradients = seen if self.gradients is None else self.gradients.merge(seen)


OBSERVERS = "balf_observers"
"""Path of the submodule that holds the observers of a prepared graph."""


_Observer = TypeVar("_Observer", bound=nn.Module)


def observer_of(graph_module: nn.Module, path: str | None, kind: type[_Observer]) -> _Observer | None:
    """The observer at a path; None if there is no path or the module there is of another kind."""
    found = None if path is None else graph_module.get_submodule(path)
    return found if isinstance(found, kind) else None
