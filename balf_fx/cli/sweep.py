"""What budgets cost in accuracy: one calibration, a model for each budget, and how far its answers are from the dense
one's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from balf_fx.api import Effort, calibrate, convert, prepare, settings_of
from balf_fx.calibration.answers import answers, differ, find_logits
from balf_fx.calibration.batches import forward_for, sample_count
from balf_fx.capture.models import cuda_devices
from balf_fx.errors import BudgetError, CalibrationError, OptionError
from balf_fx.graph.curves import Measure
from balf_fx.reporting.curve import Point, Sweep
from balf_fx.reporting.report import report


def run_sweep(
    model: nn.Module,
    calibration: Sequence[Any],
    evaluation: Sequence[Any],
    budgets: Sequence[float],
    *,
    measure: Measure = "flops",
    effort: Effort = "best",
    labels: Tensor | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Sweep:
    """Compress to each budget and compare the answers.

    Args:
        model, exclude, effort, seed: as in `balf_fx.compile`.
        calibration, evaluation: batches; the two should have no sample in common.
        budgets: fractions of the measure to keep.
        labels: of all evaluation samples, as the model's top-1 answers have them.

    Raises:
        BudgetError: none of the budgets can be reached.
        CalibrationError: there are no batches, or the model cannot run them.
        OptionError: there are not as many labels as answers.
    """
    if not calibration or not evaluation:
        raise CalibrationError("a sweep needs batches to calibrate on and others to compare the answers on")
    forward = forward_for(model)
    references = answers(model, evaluation, forward)
    judge = _Judge(evaluation, references, labels)
    factors, refit = settings_of(effort)
    with torch.random.fork_rng(devices=cuda_devices(model)):
        prepared = prepare(model, calibration[0], exclude=exclude, factors=factors)
        calibrate(prepared, calibration, seed=seed, progress=progress)
        points, out_of_reach, error = [], [], None
        for budget in tqdm(budgets, desc="budgets", unit="budget", disable=not progress, leave=False):
            try:
                small = convert(
                    prepared,
                    flops=budget if measure == "flops" else None,
                    params=budget if measure == "params" else None,
                    factors=factors,
                    batches=() if factors == "activations" else calibration,
                    refit=refit,
                    progress=progress,
                )
            except BudgetError as unreachable:
                out_of_reach.append(budget)
                error = unreachable
                continue
            found = report(small)
            compared = judge(answers(small, evaluation, forward))
            points.append(Point(budget, found.flops_kept, found.params_kept, *compared))
    if error is not None and not points:
        raise error
    samples = sum(map(sample_count, evaluation))
    minimum = None if error is None else error.minimum
    return Sweep(measure, effort, samples, judge.accuracy(references), tuple(points), tuple(out_of_reach), minimum)


class _Judge:
    """Compares answers with the original's, and with labels."""

    def __init__(self, batches: Sequence[Any], references: Sequence[Any], labels: Tensor | None) -> None:
        self.batches, self.references, self.labels = batches, references, labels
        self.wanted = self._classes(references)
        if labels is not None and (self.wanted is None or labels.shape != self.wanted.shape):
            shape = "none" if self.wanted is None else tuple(self.wanted.shape)
            raise OptionError(f"labels have shape {tuple(labels.shape)}, and the model's top-1 answers {shape}")

    def __call__(self, given: Sequence[Any]) -> tuple[float, float | None, float | None]:
        """Divergence, agreement and accuracy."""
        lost = [float(differ(*each)) for each in zip(self.references, given, self.batches, strict=True)]
        counts = [max(sample_count(batch), 1) for batch in self.batches]
        classes = self._classes(given)
        agreement = None if classes is None or self.wanted is None else _equal(classes, self.wanted)
        mean = sum(loss * count for loss, count in zip(lost, counts, strict=True)) / sum(counts)
        return mean, agreement, self.accuracy(given)

    def accuracy(self, given: Sequence[Any]) -> float | None:
        """The share of right answers."""
        classes = self._classes(given)
        return None if classes is None or self.labels is None else _equal(classes, self.labels)

    def _classes(self, given: Sequence[Any]) -> Tensor | None:
        """Top-1 answers of all batches; None where there are no logits."""
        logits = [find_logits(*each) for each in zip(given, self.batches, strict=True)]
        found = [each.argmax(-1).cpu() for each in logits if each is not None]
        return torch.cat(found) if len(found) == len(logits) else None


def _equal(given: Tensor, wanted: Tensor) -> float:
    return float((given == wanted).double().mean())
