"""Modules that observe the values of a graph and gather their statistics."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from balf_fx.calibration.gram import gram
from balf_fx.calibration.moments import (
    CHUNK_ELEMENTS,
    Moments,
    batch_moments,
    by_sample,
    in_range,
    is_finite,
    leading_sizes,
    output_columns,
    samples_first,
    sum_moments,
    with_batch,
)
from balf_fx.calibration.sample import Gradients, Positions, Sample, Statistics, WeightGradients
from balf_fx.calibration.weights import Weights
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

    @property
    def statistics(self) -> Statistics:
        """All that has been gathered, which can be merged one by one and set again."""
        return (self.moments,)

    @statistics.setter
    def statistics(self, values: Statistics) -> None:
        (self.moments,) = values  # type: ignore[assignment]

    def extra_repr(self) -> str:
        count = 0.0 if self.moments is None else self.moments.count
        return f"{self.side} of {self.site.name}, {float(torch.as_tensor(count).sum()):g} positions"

    def reset(self) -> None:
        """Delete all statistics."""
        self.moments = None

    @torch.no_grad()
    def forward(self, value: Tensor, weights: Weights | None = None) -> None:
        own = None if weights is None else weights.at(leading_sizes(value, self.site, self.side))
        value = samples_first(value, self.site)
        with torch.autocast(value.device.type, enabled=False):
            seen = self._moments(value, torch.promote_types(value.dtype, torch.float32), own)
            if seen is not None and not in_range(seen):  # squares overflow or underflow long before the values do
                seen = self._moments(value, torch.float64, own)
        if seen is None:
            return
        if not (is_finite(seen.scatter) and is_finite(seen.mean)):
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

    def _moments(self, value: Tensor, dtype: torch.dtype, weights: Tensor | None) -> Moments | None:
        return batch_moments(value, self.site, self.side, dtype, weights)


class Recorded(NamedTuple):
    """The values of one call of a site.

    Attributes:
        output: the site's output.
        value: the value on the site's side.
        features: the input if its features are needed; for experts, what assigns rows to them.
        weights: the weights of the call's positions.
    """

    output: Tensor
    value: Tensor
    features: Tensor | None
    weights: Weights | None


class _Seen(NamedTuple):
    """The values of one call and the gradient at its output, samples first.

    Attributes:
        value, features, gradient: [N, P, F] or [N, F, *size].
        counted, features_counted: [N, P], the weights of the positions of the output and of the input's features; None
            for 1 each.
    """

    value: Tensor
    features: Tensor | None
    gradient: Tensor
    counted: Tensor | None
    features_counted: Tensor | None

    def only(self, samples: Any) -> _Seen:
        """Some of the samples."""
        return _Seen(*(None if each is None else each[samples] for each in self))  # type: ignore[arg-type]

    @property
    def by_sample(self) -> bool:
        """Whether all have as many samples."""
        return len({len(each) for each in self if each is not None}) == 1


class SensitivityObserver(nn.Module):
    """Gathers the sensitivity of the loss to output errors of a site.

    A position's weight is its squared gradient, averaged over those samples of the batch for which it counts. Some
    positions matter more than others, like the class token in the last block of a vision transformer, and the average
    reduces the noise of single gradients.

    Samples go to the two `halves` alternately, so that a choice based on one half can be evaluated on the other. A
    sample is in the same half in all calls of the site on a batch.

    Args:
        site: the site.
        basis: Q [G, O, m] on the input side, None on the output side.
        copies: whether to copy values, since something may change them in place.
        features: whether to gather the moments of the input's features too, for `passes.ScoreWidths`.
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
        self.batches = 0
        self.squares: Positions | None = None

    @property
    def sample(self) -> Sample | None:
        """The statistics of all samples: those of both halves, merged anew, since they would take as much memory."""
        first, second = self.halves
        return first.merge(second) if first is not None and second is not None else first or second

    @property
    def positions(self) -> Tensor | None:
        """[P], the weights of positions, averaged over all samples; None if batches differ in their positions."""
        return None if self.squares is None else self.squares.mean

    @property
    def statistics(self) -> Statistics:
        """All that has been gathered, which can be merged one by one and set again."""
        return (*self.halves, self.squares)

    @statistics.setter
    def statistics(self, values: Statistics) -> None:
        first, second, self.squares = values  # type: ignore[assignment]
        self.halves = [first, second]  # type: ignore[list-item]

    @contextmanager
    def recording(self, samples: int = 0, number: int | None = None) -> Iterator[Sequence[Recorded]]:
        """Record the values of each call during the context; calls outside it record nothing.

        Args:
            samples: the number of samples in the batch; 0 if it is not known.
            number: the number of the batch; None for the one after the last.
        """
        recorded: list[Recorded] = []
        self._recorded, self.batch_samples = recorded, samples
        self.batches = self.batches if number is None else number
        try:
            yield recorded
        finally:
            self._recorded = None
            self.batches += 1

    def forward(self, source: Tensor, output: Tensor, weights: Weights | None = None) -> None:
        """Record the output and the value on the site's side until the gradient is known."""
        if self._recorded is not None and output.requires_grad:
            value = (output if self.site.side == "output" else source).detach()
            features = source.detach() if self.wants_features else None
            if self.copies:
                value, features = value.clone(), None if features is None else features.clone()
            self._recorded.append(Recorded(output, value, features, weights))

    @torch.no_grad()
    def take(self, recorded: Recorded, gradient: Tensor) -> None:
        """Add the values of one call and the gradient at its output to the statistics."""
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if gradient.numel() and not 1e-12 < float(gradient.abs().max()) < 1e12:  # squares may leave float32's range
            gradient = gradient.to(torch.float64)
        seen = self._seen(recorded, gradient)
        if not len(seen.gradient) or not is_finite(seen.gradient):
            return
        rows, samples = len(by_sample(gradient, self.site)), len(seen.gradient)
        columns = output_columns(seen.gradient, self.site)
        by_part = columns.reshape(self.site.parts, -1, columns.shape[-1]).square().sum(1)
        squares = by_part.reshape(self.site.parts, samples, -1).sum(1)  # [parts, P]
        count = squares.new_full(squares.shape[1:], samples)
        if seen.counted is not None:
            count = (seen.counted > 0).sum(0).to(count)
        positions = squares / count.clamp_min(1)
        parts = {self.batches % 2: seen}
        whole = self.batch_samples and samples == rows and rows % self.batch_samples == 0
        each = rows // self.batch_samples if whole else 1  # rows of a sample, which shall not be in both halves
        if samples > each and seen.by_sample:
            parts = {half: seen.only(_every_second(samples, each, half)) for half in range(2)}
        used = False
        for half, part in parts.items():
            sample = self._sample(part, positions, self._samples_of_row(rows))
            if sample is not None:
                self._merge(half, sample)
                used = True
        if used:
            own = Positions((squares.sum(0), count))
            self.squares = own if self.squares is None else self.squares.merge(own)

    def _samples_of_row(self, rows: int) -> float:
        """The samples for which a row of a value stands: a sample may have several, such as windows or tokens.

        A batch whose samples cannot be counted is one sample, for all layers.
        """
        return (self.batch_samples or 1) / rows

    def _merge(self, half: int, sample: Sample) -> None:
        """Add a sample to one of the halves."""
        before = self.halves[half]
        self.halves[half] = sample if before is None else before.merge(sample)

    def _seen(self, recorded: Recorded, gradient: Tensor) -> _Seen:
        """The samples that count, with a gradient of 0 at positions that do not."""
        site, weights = self.site, recorded.weights
        counted = None if weights is None else weights.at(leading_sizes(recorded.output, site, "output"))
        gradient, value = by_sample(gradient, site), by_sample(recorded.value, site)
        features, features_counted = None, None
        if recorded.features is not None:
            features = by_sample(recorded.features, site)
            if weights is not None:  # a convolution's input may have other pixels than its output
                features_counted = weights.at(leading_sizes(recorded.features, site, "output"))
                features_counted = _by(features_counted, len(features), gradient.device)
        counted = _by(counted, len(gradient), gradient.device)
        seen = _Seen(value, features, gradient, counted, features_counted)
        if counted is None:
            return seen
        ignored = counted.reshape(len(gradient), *_position_sizes(gradient, site)) == 0
        gradient = gradient.masked_fill(ignored.unsqueeze(-1 if site.conv is None else 1), 0.0)
        seen, present = seen._replace(gradient=gradient), (counted > 0).any(1)
        return seen.only(present) if seen.by_sample and not present.all() else seen

    def _sample(self, seen: _Seen, positions: Tensor, of_row: float) -> Sample | None:
        """Statistics of some samples; None if no gradient has reached them.

        Args:
            of_row: the samples for which a row stands.
        """
        columns = output_columns(seen.gradient, self.site)  # [G, O, n]
        samples = columns.shape[-1] // positions.shape[-1]
        by_part = positions.repeat(1, samples)
        if seen.counted is not None:
            by_part = by_part * seen.counted.flatten().to(by_part)
        weights = by_part.sum(0)
        inner = columns if self.basis is None else self.basis.to(columns).mT @ columns
        parts = None
        if self.site.parts > 1:
            pieces = columns.reshape(self.site.parts, -1, columns.shape[-1])
            parts = gram(pieces)
        moments = batch_moments(seen.value, self.site, self.site.side, columns.dtype, weights)
        if moments is None:
            return None
        features = None if seen.features is None else self._features(seen, columns.dtype, weights)
        own = None if parts is None or self.site.side == "output" else self._parts(seen, by_part)
        return Sample(Gradients(samples * of_row, gram(inner), parts), moments, features, own)

    def _parts(self, seen: _Seen, by_part: Tensor) -> Moments | None:
        """The moments with each part's own weights [parts, n]; None if no gradient has reached one of them."""
        found = [batch_moments(seen.value, self.site, "input", by_part.dtype, weights) for weights in by_part]
        own = [each for each in found if each is not None]
        if len(own) < len(found):
            return None
        count = own[0].mean.new_tensor([each.count for each in own])
        return Moments(count, torch.cat([each.mean for each in own]), torch.cat([each.scatter for each in own]))

    def _features(self, seen: _Seen, dtype: torch.dtype, weights: Tensor) -> Moments | None:
        value: Any = seen.features
        rows = value if self.site.conv is None else with_batch(value, self.site.conv).movedim(1, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        per_chunk = max(CHUNK_ELEMENTS // rows.shape[1], 4 * rows.shape[1])
        chunks = (piece.mT.unsqueeze(0) for piece in torch.split(rows, per_chunk))
        # With strides or borders, the input's pixels do not match the output's weights: then gradients do not count.
        own = None if seen.features_counted is None else seen.features_counted.flatten()
        return sum_moments(chunks, dtype, weights if len(weights) == len(rows) else own)


def _every_second(rows: int, each: int, half: int) -> slice | Tensor:
    """The rows of every second sample, of which each has so many rows that follow each other."""
    if each == 1:
        return slice(half, None, 2)
    return torch.arange(rows, device="cpu").reshape(-1, each)[half::2].flatten()


def _by(counted: Tensor | None, samples: int, device: torch.device) -> Tensor | None:
    """Weights [n] as [N, P]."""
    return None if counted is None else counted.to(device).reshape(samples, -1)


def _position_sizes(value: Tensor, site: Site) -> tuple[int, ...]:
    """The dimensions of the positions of a sample, from a value of `by_sample`."""
    return tuple(value.shape[1:2] if site.conv is None else value.shape[2:])


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

    @property
    def statistics(self) -> Statistics:
        """All that has been gathered, which can be merged one by one and set again."""
        return (self.gradients,)

    @statistics.setter
    def statistics(self, values: Statistics) -> None:
        (self.gradients,) = values  # type: ignore[assignment]

    @torch.no_grad()
    def take(self, gradient: Tensor) -> None:
        """Add the gradient of one batch, in the shape of the weight."""
        if not is_finite(gradient):
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
