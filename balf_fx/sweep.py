"""What budgets cost in accuracy: one calibration, a model for each budget, and how far its answers are from the dense
one's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from balf_fx.api import Effort, calibrate, convert, prepare, settings_of
from balf_fx.batches import forward_for, sample_count
from balf_fx.capture import cuda_devices
from balf_fx.divergence import answers, differ
from balf_fx.errors import BudgetError, CalibrationError, FileError, OptionError
from balf_fx.report import report
from balf_fx.sensitivity import find_logits
from balf_fx.sites import Measure


@dataclass(frozen=True)
class Point:
    """One compressed model.

    Attributes:
        budget: as asked for.
        flops_kept, params_kept: what came of it, of the whole model.
        divergence: of its answers from the original's: Kullback-Leibler, in nats, of classes or tokens; of anything
            else the squared error relative to the mean square.
        agreement: the share of its top-1 answers that are the original's; None where it does not classify.
        accuracy: the share of right top-1 answers; None without labels.
    """

    budget: float
    flops_kept: float | None
    params_kept: float
    divergence: float
    agreement: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Sweep:
    """The curve.

    Attributes:
        measure: what the budgets are of.
        samples: on which the answers were compared.
        accuracy: of the original; None without labels.
        points: for the budgets that can be reached, in their order.
        out_of_reach: the other budgets.
        minimum: the smallest budget that can be reached, where one could not.
    """

    measure: Measure
    effort: Effort
    samples: int
    accuracy: float | None
    points: tuple[Point, ...]
    out_of_reach: tuple[float, ...] = ()
    minimum: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold."""
        return asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Sweep:
        """The inverse of `to_json`.

        Raises:
            FileError: this is no sweep.
        """
        try:
            data = json.loads(text)
            points = tuple(Point(**point) for point in data["points"])
            return cls(**{**data, "points": points, "out_of_reach": tuple(data["out_of_reach"])})
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"this is no sweep as JSON: {type(error).__name__} {error}") from error

    def rows(self) -> list[tuple[str, ...]]:
        """A table: headers, the original where its accuracy is known, and the points."""
        headers = (self.measure, "FLOPs kept", "params kept", "same top-1", "divergence", "accuracy")
        found: list[tuple[str, ...]] = [headers]
        if self.accuracy is not None:
            found.append(("dense", *(["100.00 %"] * 3), "0", _percent(self.accuracy)))
        for point in self.points:
            shares = map(_percent, (point.flops_kept, point.params_kept, point.agreement))
            found.append((f"{point.budget:g}", *shares, f"{point.divergence:.4g}", _percent(point.accuracy)))
        return found

    @property
    def note(self) -> str:
        """On what it was measured, and which budgets were out of reach."""
        note = f"on {self.samples:,} samples, effort {self.effort!r}"
        if not self.out_of_reach:
            return note
        listed = ", ".join(f"{budget:g}" for budget in self.out_of_reach)
        return f"{note}; out of reach: {listed}; the smallest is {self.minimum:.4f}"

    def __str__(self) -> str:
        headers, *rows = self.rows()
        table = tabulate(rows, headers, disable_numparse=True, colalign=("right",) * len(headers))
        return f"{table}\n\n{self.note}"


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


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}".replace("%", " %")
