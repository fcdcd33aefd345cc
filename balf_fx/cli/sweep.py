"""The accuracy at several budgets: one calibration, a model for each budget, and comparisons with the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from balf_fx.api import calibrate, convert, plan, prepare
from balf_fx.calibration.batches import cache_arguments, forward_for, sample_count
from balf_fx.calibration.outputs import find_logits, loss_and_weight, outputs_of
from balf_fx.capture.models import cuda_devices, plain_model
from balf_fx.engine.fields import Stage
from balf_fx.engine.options import options_of, settings_from
from balf_fx.errors import BudgetError, CalibrationError, OptionError
from balf_fx.files.weights import with_weights
from balf_fx.graph.curves import Measure
from balf_fx.reporting.curve import Point, Sweep


@dataclass(frozen=True)
class SweepData:
    """Batches for calibration and others for evaluation, without common samples.

    Attributes:
        labels: the labels of all evaluation samples, in the shape of the model's top-1 predictions.
        is_text: whether the model predicts the next of `input_ids`, so that it has a perplexity.
    """

    calibration: Sequence[Any]
    evaluation: Sequence[Any]
    labels: Tensor | None = None
    is_text: bool = False


def run_sweep(
    model: nn.Module, data: SweepData, budgets: Sequence[float], measure: Measure = "flops", **options: Any
) -> Sweep:
    """Compress to each budget and compare the predictions.

    Args:
        budgets: fractions of the measure to keep.
        options: as in `balf_fx.compile`, without the budget.

    Raises:
        BudgetError: none of the budgets can be reached.
        CalibrationError: there are no batches, or the model cannot run them.
        OptionError: there are not as many labels as predictions.
    """
    calibration, evaluation = data.calibration, data.evaluation
    if not calibration or not evaluation:
        raise CalibrationError("a sweep needs batches for calibration and others for evaluation")
    if "separable" in settings_from({**options, measure: 1.0}).divisions:
        options["separable"] = True  # as `compile` has it with latency, of which `prepare` does not know
    settings = settings_from(options)
    original, _pages = with_weights(plain_model(model), settings.safetensors)
    forward = forward_for(original, **cache_arguments(original))
    references = outputs_of(original, evaluation, forward)
    comparison = _Comparison(evaluation, references, data)
    with torch.random.fork_rng(devices=cuda_devices(model)):
        factors = {"factors": settings.chosen_factors}
        prepared = prepare(model, calibration[0], **{**_for("prepare", options), **factors, "forward": forward})
        calibrate(prepared, calibration, forward=forward, **_for("calibrate", options))
        points, out_of_reach, error = [], [], None
        for budget in tqdm(budgets, desc="budgets", unit="budget", disable=not settings.progress, leave=False):
            asked = {**_for("convert", options), "forward": forward, measure: budget, "model": model}
            if settings.checkpoint is not None:  # each budget is a run of its own
                asked["checkpoint"] = Path(settings.checkpoint) / f"{measure} {budget}"
            try:
                small = convert(prepared, batches=calibration, **{**asked, "refit": settings.refit_mode or False})
            except BudgetError as unreachable:
                out_of_reach.append(budget)
                error = unreachable
                continue
            found = plan(small)
            compared = comparison(outputs_of(small, evaluation, forward))
            points.append(Point(budget, found.flops_kept, found.params_kept, *compared))
    if error is not None and not points:
        raise error
    return Sweep(
        measure=measure,
        effort=settings.effort,
        samples=sum(map(sample_count, evaluation)),
        accuracy=comparison.accuracy(references),
        perplexity=comparison.perplexity(references),
        points=tuple(points),
        out_of_reach=tuple(out_of_reach),
        minimum=None if error is None else error.minimum,
    )


def _for(stage: Stage, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a stage."""
    return {name: value for name, value in options.items() if name in options_of(stage)}


class _Comparison:
    """Compares outputs with the original's, and with labels."""

    def __init__(self, batches: Sequence[Any], references: Sequence[Any], data: SweepData) -> None:
        labels = data.labels
        self.batches, self.references, self.labels, self.is_text = batches, references, labels, data.is_text
        self.wanted = self._classes(references)
        if labels is not None and (self.wanted is None or labels.shape != self.wanted.shape):
            shape = "none" if self.wanted is None else tuple(self.wanted.shape)
            raise OptionError(f"labels have shape {tuple(labels.shape)}, but the model's top-1 predictions {shape}")

    def __call__(self, given: Sequence[Any]) -> tuple[float, float | None, float | None, float | None]:
        """Divergence, agreement, accuracy and perplexity."""
        lost = [float(loss_and_weight(*each)[0]) for each in zip(self.references, given, self.batches, strict=True)]
        counts = [max(sample_count(batch), 1) for batch in self.batches]
        classes = self._classes(given)
        agreement = None if classes is None or self.wanted is None else _equal(classes, self.wanted)
        mean = sum(loss * count for loss, count in zip(lost, counts, strict=True)) / sum(counts)
        return mean, agreement, self.accuracy(given), self.perplexity(given)

    def accuracy(self, given: Sequence[Any]) -> float | None:
        """The share of correct predictions."""
        classes = self._classes(given)
        return None if classes is None or self.labels is None else _equal(classes, self.labels)

    def perplexity(self, given: Sequence[Any]) -> float | None:
        """The perplexity of each next token; None if the data are no text, or the model predicts none."""
        lost: list[Tensor] = []
        for output, batch in zip(given, self.batches, strict=True) if self.is_text else ():
            logits, tokens = find_logits(output, batch), batch["input_ids"]
            if logits is None or logits.shape[:-1] != tokens.shape:
                return None
            wanted = tokens[:, 1:].to(logits.device).flatten()
            lost.append(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, reduction="none"))
        return float(torch.cat(lost).double().mean().exp()) if lost else None

    def _classes(self, given: Sequence[Any]) -> Tensor | None:
        """Top-1 predictions of all batches; None if there are no logits."""
        logits = [find_logits(*each) for each in zip(given, self.batches, strict=True)]
        found = [each.argmax(-1).cpu() for each in logits if each is not None]
        return torch.cat(found) if len(found) == len(logits) else None


def _equal(given: Tensor, wanted: Tensor) -> float:
    return float((given == wanted).double().mean())
