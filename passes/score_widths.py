"""Turn each width's statistics into the loss of every size that it may have."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.calibration.freed import give_back
from balf_fx.calibration.moments import Moments
from balf_fx.calibration.observers import SensitivityObserver, observer_of
from balf_fx.calibration.sample import Sample
from balf_fx.distributed.group import ALONE, Group
from balf_fx.graph.annotation import annotation, graph_record, record_graph
from balf_fx.graph.curves import Spectrum
from balf_fx.graph.parameters import grouped_bias, grouped_weight
from balf_fx.graph.site import Site
from balf_fx.graph.widths import Width, WidthCurve
from balf_fx.passes.base import Pass, scored_alike
from balf_fx.progress import SILENT, Progress
from balf_fx.ranks.spectra import (
    convex_energies,
    damped,
    damped_roots,
    held_out_errors,
    spectrum_from_output,
    tail_energies,
    thin_qr,
    thin_triangle,
)
from balf_fx.widths.elimination import conditioned, eliminate, prediction_errors
from balf_fx.widths.joined import embedded, grouped, restricted, same_from

_GROUPED_SIZES = 32  # at about so many sizes, errors are computed anew where features have got another order
_LOGGER = logging.getLogger(__name__)
_BASIS_DAMPING = 1e-3  # small, because the metric consists of damped ones
_HELD_OUT_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.9375, 0.97)


@dataclass(frozen=True)
class ScoreWidths(Pass):
    """Score every size of every width, where gradients have been observed (`widths.elimination`, `widths.heads`).

    Errors are measured at the outputs of the layers that read the features, or for queries at the queries themselves.
    Metric and unit are the same as for the ranks of these layers (`Score`), so that the two are comparable.

    Attributes:
        damping, group: as in `Score`.
        only: the keys of the widths to score; None for all.
        progress: shows the progress over the widths.

    A width whose statistics have not changed since its last score is not scored again.
    """

    damping: float = 0.1
    only: Collection[str] | None = None
    group: Group = field(default=ALONE, repr=False, compare=False)
    progress: Progress = field(default=SILENT, repr=False, compare=False)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        record = graph_record(graph_module)
        curves = _filled(record.width_curves, len(record.widths))
        scored_with = _filled(record.widths_scored_with, len(record.widths))
        nodes, changed = {node.name: node for node in graph_module.graph.nodes}, []
        for index, width in enumerate(record.widths):
            calls = tuple(annotation(nodes[name]).calls for name in scoring_layers(width))
            own = ((self.damping, calls), *_halves(graph_module, nodes, width))
            if (self.only is None or width.key in self.only) and not scored_alike(scored_with[index], own):
                scored_with[index] = own
                changed.append(index)
        widths = [record.widths[index] for index in changed]
        effort = [float(width.features) ** 3 for width in widths]
        score = partial(self._score, graph_module, nodes)
        for index, curve in zip(changed, self.group.shared_out(widths, effort, score, self.progress), strict=True):
            curves[index] = curve
        if changed or len(record.width_curves) < len(curves):
            record_graph(graph_module, width_curves=tuple(curves), widths_scored_with=tuple(scored_with))
        return PassResult(graph_module, False)

    def _score(self, graph_module: fx.GraphModule, nodes: dict[str, fx.Node], width: Width) -> WidthCurve | None:
        layers = [_read(graph_module, nodes[name], self.damping) for name in scoring_layers(width)]
        known = [layer for layer in layers if layer is not None]
        if len(known) < len(layers):
            _LOGGER.info("no gradient has reached the layers around %s: it keeps its width", width.name)
            return None
        whole, *halves = ([layer[i] for layer in known] for i in range(min(map(len, known))))
        curve = (
            _score_channels(width, whole, halves) if width.kind == "channels" else _score_heads(width, whole[0], halves)
        )
        give_back(freed=width.features**2)
        if all(map(math.isfinite, (curve.loss, *curve.distortion))):
            return curve
        _LOGGER.warning("the loss of narrowing %s is NaN or infinite: it keeps its width", width.name)
        return None


def scoring_layers(width: Width) -> tuple[str, ...]:
    """The nodes of the layers by whose statistics a width is scored: those that read its features, or a producer."""
    return width.consumers or width.producers[:1]


def _halves(graph_module: fx.GraphModule, nodes: Mapping[str, fx.Node], width: Width) -> Iterator[Sample | None]:
    """The statistics by which a width is scored."""
    for name in scoring_layers(width):
        observer = observer_of(graph_module, annotation(nodes[name]).sensitivity, SensitivityObserver)
        yield from () if observer is None else observer.halves


def _filled(values: tuple[Any, ...], count: int) -> list[Any]:
    """As a list, filled up with None."""
    return [*values, *[None] * (count - len(values))]


@dataclass(frozen=True)
class _Layer:
    """A layer and its statistics over some of the samples.

    Attributes:
        weight, bias: [O, D] and [O].
        reduced: [m, D], R of W = Q R on the input side, W itself on the output side. Errors are those of R x.
        unit: [1, 1], the scale by which second moments of gradients are divided.
        loss: the loss of an error of 1 in the metric M.
    """

    site: Site
    sample: Sample
    weight: Tensor
    bias: Tensor | None
    reduced: Tensor
    unit: Tensor
    damping: float
    loss: float

    @property
    def undamped(self) -> _Layer:
        """The layer with the metric in which errors are measured."""
        return dataclasses.replace(self, damping=0.0)

    @property
    def features(self) -> Moments:
        """The moments of the input's features."""
        if self.sample.features is None:
            raise ValueError(f"the input of {self.site.name} was not observed")
        return self.sample.features

    @property
    def center(self) -> Tensor:
        """[1, F], what the bias makes up for: nothing where strides let each output read other taps than the next."""
        mean = self.features.mean
        return mean if self.site.taps_read == 1 else torch.zeros_like(mean)

    @cached_property
    def basis(self) -> Tensor:
        """Q [O, m] of W = Q R."""
        return thin_qr(self.weight)[0]

    @cached_property
    def weighed(self) -> Tensor:
        """M R [m, D], for the metric M of errors: an error e of the input costs e^T R^T M R e."""
        weighed: Tensor = damped(self.sample.gradients.scatter, self.damping, self.unit)[0] @ self.reduced
        return weighed

    def metric(self) -> Tensor:
        """A [F, F], the metric of errors in the input's features; the taps of a kernel count as independent.

        `alike` corrects that.
        """
        by_tap = [each.reshape(len(each), -1, self.site.taps).permute(2, 0, 1) for each in (self.reduced, self.weighed)]
        found = (by_tap[0].mT @ by_tap[1]).sum(0) * self.site.taps_read
        return (found + found.mT) / 2

    def alike(self) -> float:
        """How many times larger errors in the features are at the output than with independent taps, at least 1.

        It is that of the features themselves, as errors: those at neighbouring pixels are alike, and add up.
        """
        if self.site.taps == 1:
            return 1.0
        exact = self.sample.moments.covariance()[0]
        if self.site.side == "input":
            exact = self.reduced @ exact @ self.reduced.mT
        seen = float((self.sample.gradients.scatter[0] * exact).sum() / self.unit)
        apart = float((self.undamped.metric() * self.features.covariance()[0]).sum())
        return max(seen / apart, 1.0) if apart > 0 else 1.0

    def output_block(self, rows: Tensor) -> Tensor:
        """E[y y^T], [F, F] float64, for some rows of the output, with the observer's weights of positions."""
        part = self._part(rows)
        if self.site.side == "output":
            mean, covariance = self.sample.moments.mean[0][rows], self._covariance[0][rows][:, rows]
            return covariance + torch.outer(mean, mean)
        if self.sample.parts is None or part is None:
            mean, covariance = self.sample.moments.mean[0], self._covariance[0]
        else:
            mean, covariance = self.sample.parts.mean[part], self._covariance_of_parts[part]
        weight = self.weight[rows]
        mean = weight @ mean if self.bias is None else weight @ mean + self.bias[rows]
        return weight @ covariance @ weight.mT + torch.outer(mean, mean)

    @cached_property
    def _covariance(self) -> Tensor:
        return self.sample.moments.covariance()

    @cached_property
    def _covariance_of_parts(self) -> Tensor:
        return (self.sample.parts or self.sample.moments).covariance()

    def _part(self, rows: Tensor) -> int | None:
        """The part to which all rows belong; None if there is none."""
        found = torch.unique(rows // (self.site.out_features // self.site.parts))
        return int(found) if self.site.parts > 1 and len(found) == 1 else None

    def gradient_block(self, rows: Tensor) -> Tensor:
        """E[g g^T], [F, F], for some rows of the output."""
        gradients, part = self.sample.gradients, self._part(rows)
        if gradients.parts is not None and part is not None:
            own = rows % (self.site.out_features // self.site.parts)
            return gradients.parts[part][own][:, own]
        if self.site.side == "output":
            return gradients.scatter[0][rows][:, rows]
        return self.basis[rows] @ gradients.scatter[0] @ self.basis[rows].mT


def _read(graph_module: fx.GraphModule, node: fx.Node, damping: float) -> list[_Layer] | None:
    """The layer with the statistics of all samples, then with those of each half."""
    mark = annotation(node)
    observer = observer_of(graph_module, mark.sensitivity, SensitivityObserver)
    whole = None if observer is None else observer.sample
    if mark.site is None or observer is None or whole is None:
        return None
    samples = [whole, *(half for half in observer.halves if half is not None)]
    if observer.wants_features and any(sample.features is None for sample in samples):
        return None
    weight, bias = grouped_weight(graph_module, mark.site)[0], grouped_bias(graph_module, mark.site)
    reduced = weight if mark.site.side == "output" else thin_triangle(weight)
    gradients = whole.gradients
    unit = gradients.unit
    loss = 0.5 * float(unit) * max(mark.calls, 1) / gradients.samples  # samples are counted in every call
    bias = None if bias is None else bias[0]
    units = [unit * (sample.gradients.samples / gradients.samples) for sample in samples]  # sums over samples
    return [
        _Layer(mark.site, sample, weight, bias, reduced, own, damping, loss)
        for sample, own in zip(samples, units, strict=True)
    ]


def _score_channels(width: Width, readers: list[_Layer], halves: list[list[_Layer]]) -> WidthCurve:
    held: list[tuple[int, ...] | None] = [width.read_by(name) for name in width.consumers]
    first = readers[0].loss
    units = [layer.alike() * layer.loss / first if first > 0 else 1.0 for layer in readers]

    def problem(layers: list[_Layer]) -> tuple[list[Tensor], list[Tensor]]:
        covariances = [conditioned(layer.features.second_moment(layer.center)[0]) for layer in layers]
        return covariances, [unit * layer.metric() for unit, layer in zip(units, layers, strict=True)]

    covariances, metrics = problem(readers)
    order, fitted = _elimination(width, held, covariances, metrics)
    errors, seen = fitted, []
    if len(halves) == 2:  # in the order of all samples: to find one for each half would double the time
        size = len(order)
        sizes = sorted({round(size * share / width.block) * width.block for share in _HELD_OUT_SHARES} - {size})
        held_out = [0.0] * len(sizes)
        seen = [(half, *problem([layer.undamped for layer in half])) for half in halves]
        for (own, own_covariances, _), (other, _, other_metrics) in itertools.permutations(seen):
            pairs = zip(own, other, own_covariances, other_metrics, held, strict=True)
            for layer, unseen, covariance, metric, features in pairs:
                moment = unseen.features.second_moment(layer.center)[0]
                lost = prediction_errors(covariance, moment, metric, *restricted(order, sizes, features))
                held_out = [known + own_lost / 2 for known, own_lost in zip(held_out, lost, strict=True)]
        errors = _rescaled(fitted, sizes, held_out)
    curve = WidthCurve(tuple(errors), first * errors[0], order, fitted=tuple(fitted))
    half = _predicting(curve, *seen[0][:2]) if seen and curve.fits_samples else None  # in the order of all samples
    return dataclasses.replace(_predicting(curve, readers, covariances), half=half)


def _predicting(curve: WidthCurve, layers: list[_Layer], covariances: list[Tensor]) -> WidthCurve:
    """The curve with what predicts the removed features from the others, at each reader."""
    means = tuple(layer.center[0] for layer in layers)
    return dataclasses.replace(curve, covariances=tuple(covariances), means=means)


def _elimination(
    width: Width, held: list[tuple[int, ...] | None], covariances: list[Tensor], metrics: list[Tensor]
) -> tuple[Tensor, list[float]]:
    """The order of a width's features and the error of each size; lists have an entry for each reader.

    Args:
        held: the features that it reads; None for all.
    """
    size, count = width.features, range(len(held))
    order, errors = eliminate(
        [embedded(covariances[i], held[i], size, float(covariances[i].diagonal().mean())) for i in count],
        [embedded(metrics[i], held[i], size, 0.0) for i in count],
        width.block,
    )
    if not width.branches:
        return order, errors
    first, order = order, grouped(order, width.branches, width.step)
    last = same_from(first, order)
    sizes = list(range(0, last, max(last // _GROUPED_SIZES // width.step, 1) * width.step))
    pairs = zip(covariances, metrics, held, strict=True)
    lost = [prediction_errors(own, own, metric, *restricted(order, sizes, features)) for own, metric, features in pairs]
    anew = _interpolated(last + 1, [*sizes, last], [*map(sum, zip(*lost, strict=True)), errors[last]])
    return order, [*anew, *errors[last + 1 :]]


def _rescaled(errors: list[float], sizes: list[int], held_out: list[float]) -> list[float]:
    """Scale errors by the ratio of held-out to fitted error, interpolated between sizes, and keep them non-increasing.

    Args:
        sizes: the sizes with held-out errors, ascending.
        held_out: the held-out error of each of them.
    """
    ratios = [error / errors[size] if errors[size] > 0 else 1.0 for size, error in zip(sizes, held_out, strict=True)]
    scaled = _interpolated(len(errors), sizes, ratios)
    found = [error * ratio for error, ratio in zip(errors, scaled, strict=True)]
    return list(itertools.accumulate(found, min))


def _interpolated(count: int, places: list[int], values: list[float]) -> list[float]:
    """Values at 0 .. count - 1 by linear interpolation, constant beyond both ends."""
    found = []
    for index in range(count):
        right = bisect.bisect_left(places, index)
        if right == 0 or right == len(places):
            found.append(values[min(right, len(places) - 1)])
            continue
        share = (index - places[right - 1]) / (places[right] - places[right - 1])
        found.append(values[right - 1] * (1 - share) + values[right] * share)
    return found


def _score_heads(width: Width, layer: _Layer, halves: list[list[_Layer]]) -> WidthCurve:
    moment, metric = _heads(width, layer)
    spectrum = _best_bases(moment, metric)
    energies = fitted = spectrum.energies * _mean_diagonal(metric)
    if len(halves) == 2:
        held_out = []
        for (own,), (other,) in itertools.permutations(halves):
            moment, metric = _heads(width, other.undamped)
            held_out.append(held_out_errors(_best_bases(*_heads(width, own)), moment, None, metric))
        energies = convex_energies((held_out[0] + held_out[1]) / 2)
    tail, own_tail = (tuple(tail_energies(each)) for each in (energies, fitted))
    means = (layer.features.mean[0],) if width.kind == "values" else ()
    loss = layer.loss * tail[0]
    curve = WidthCurve(tail, loss, left=spectrum.left, right=spectrum.right, means=means, fitted=own_tail)
    fitting = len(halves) == 2 and curve.fits_samples
    return dataclasses.replace(curve, half=_score_heads(width, halves[0][0], []) if fitting else None)


def _best_bases(moment: Tensor, metric: Tensor) -> Spectrum:
    """The spectrum of each head, with energies in units of the metric's mean diagonal."""
    return spectrum_from_output(moment, None, damped_roots(metric, _BASIS_DAMPING, _mean_diagonal(metric)))


def _mean_diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)


def _heads(width: Width, layer: _Layer) -> tuple[Tensor, Tensor]:
    """The second moment of each head's features and the metric of errors in them, both [heads, F, F]."""
    if width.kind == "values":
        moment, seen, weighed = layer.features.covariance()[0], layer.reduced, layer.weighed
        rows = torch.arange(len(moment), device="cpu").reshape(width.heads, width.repeat, -1)
        metrics = torch.stack([seen[:, own].mT @ weighed[:, own] for own in rows.flatten(0, 1)])
        moments = torch.stack([moment[own][:, own] for own in rows.flatten(0, 1)])
    else:
        rows = torch.tensor(width.rows[0], device="cpu").reshape(width.heads, width.repeat, width.features)
        blocks = torch.stack([layer.gradient_block(own) for own in rows.flatten(0, 1)])
        metrics = damped(blocks, layer.damping, layer.unit.expand(len(blocks), 1))
        moments = torch.stack([layer.output_block(own) for own in rows.flatten(0, 1)])
    shape = (*rows.shape[:2], *moments.shape[1:])
    return moments.reshape(shape).sum(1), metrics.reshape(shape).mean(1)
