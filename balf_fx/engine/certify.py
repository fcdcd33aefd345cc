"""Find the smallest budget whose disagreement or divergence is certified, on samples that nothing else has seen.

Budgets are tested from mild to hard, each at the full confidence, up to the first that misses the limit. The chance
that the model before it exceeds the limit is then still at most 1 - confidence, however many budgets were tested
(fixed-sequence testing: Maurer, Hothorn and Lehmacher 1995; Bauer et al., arXiv 2110.01052, section 4.2).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from balf_fx.budget.bounds import clopper_pearson, empirical_bernstein, least_samples
from balf_fx.calibration.batches import Calibration, iterate, run_batch
from balf_fx.calibration.outputs import element_weights, find_logits, find_pixels, real_leaves
from balf_fx.calibration.weights import Weights
from balf_fx.checkpoint.journal import NO_JOURNAL, Journal
from balf_fx.engine.compress import convert
from balf_fx.engine.program import Program
from balf_fx.engine.settings import Settings
from balf_fx.engine.solving import without_observers
from balf_fx.engine.weighing import call_weights
from balf_fx.errors import BudgetError, CalibrationError, OptionError
from balf_fx.graph.certificate import Certificate, Mistakes, Tried
from balf_fx.graph.curves import Measure
from balf_fx.graph.plan import Plan
from balf_fx.progress import SILENT, Progress

_LOGGER = logging.getLogger(__name__)
_SHARES = tuple(share / 100 for share in range(95, 0, -5))


def certify(
    program: Program,
    settings: Settings,
    calibration: Calibration,
    progress: Progress = SILENT,
    journal: Journal = NO_JOURNAL,
) -> tuple[Program, Plan]:
    """Compress a calibrated program as far as the user's limit on disagreement or divergence allows.

    The program itself is unchanged.

    Returns:
        As `compress.convert`; the plan has the certificate. If no budget keeps the limit, nothing but what is free is
        removed.

    Raises:
        OptionError: there are too few validation samples; the message says how many would do. Or the outputs are
            no choices among classes.
    """
    validation = _Validation.of(program, settings, calibration)
    best: tuple[Program, Plan] | None = None
    tried: list[Tried] = []
    for share, span in zip(_SHARES, progress.spans([1.0] * len(_SHARES)), strict=True):
        try:
            candidate = convert(
                program, settings.at(share), calibration, span, journal.within(f"{settings.minimise} {share}")
            )
        except BudgetError:
            break
        tried.append(validation.test(candidate[0], share))
        _LOGGER.info("%s %g: %s", settings.minimise, share, tried[-1])
        if tried[-1].bound > validation.limit:
            break
        best = candidate
    progress.done()
    compressed, plan = best or convert(program, _free(settings), calibration)
    found = Certificate(
        validation.mistakes, validation.limit, settings.confidence, settings.minimise, validation.samples, tuple(tried)
    )
    return compressed, dataclasses.replace(plan, certificate=found)


def _free(settings: Settings) -> Settings:
    """The settings that remove only what is free."""
    without: dict[str, Any] = dict.fromkeys((*get_args(Measure), "factors", "refit"))
    return dataclasses.replace(settings.at(1.0), allocation="free", **without).with_free()


@dataclass(frozen=True)
class _Predictions:
    """The predictions for the samples of a batch.

    Attributes:
        values: choices of classes, int64 [N, k], or outputs, float [N, k].
        weights: how much each of them counts, float64 [N, k]; None for 1 each.
    """

    values: Tensor
    weights: Tensor | None

    @classmethod
    def of(cls, values: Tensor, weights: Tensor | None) -> _Predictions:
        """The predictions for the samples that count, on the CPU."""
        values = values.detach().cpu()
        if weights is None:
            return cls(values, None)
        weights = weights.reshape(values.shape).double().cpu()
        counted = (weights > 0).any(1)
        return cls(values[counted], weights[counted])

    def mistakes(self, given: Tensor, kind: Mistakes) -> list[float]:
        """For each sample, the share of other choices, or the relative error, at most 1."""
        own = torch.ones((), dtype=torch.float64, device="cpu") if self.weights is None else self.weights
        if kind == "disagreement":
            wrong, size = own * (given != self.values), own.expand(self.values.shape)
            return [float(share) for share in wrong.sum(1) / size.sum(1)]
        error, size = ((own * value.double().square()).sum(1) for value in (given - self.values, self.values))
        relative = (error / size.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        return [float(value) for value in relative.nan_to_num(1.0, 1.0).clamp_max(1.0)]


@dataclass(frozen=True)
class _Validation:
    """Counts the mistakes of a program on the validation samples.

    Attributes:
        calibration: the validation batches and how they are run.
        predictions: of the original, for each batch.
        single: whether each sample has one prediction.
        samples: the number of samples, in all processes.
    """

    mistakes: Mistakes
    limit: float
    confidence: float
    calibration: Calibration
    predictions: Sequence[_Predictions] = ()
    single: bool = False
    samples: int = 0

    @classmethod
    def of(cls, program: Program, settings: Settings, calibration: Calibration) -> _Validation:
        """Run the original on the validation samples."""
        kind: Mistakes = "disagreement" if settings.disagreement is not None else "divergence"
        batches = list(iterate(settings.validation))
        validation = dataclasses.replace(calibration, batches=batches, weights=(), turns=())
        blank = cls(kind, settings.limit or 0.0, settings.confidence, validation)
        predictions = blank.run(without_observers(program))
        single = kind == "disagreement" and all(each.values.shape[1] == 1 for each in predictions)
        single = all(calibration.group.gathered(single))
        samples = sum(calibration.group.gathered(sum(len(each.values) for each in predictions)))
        found = dataclasses.replace(blank, predictions=predictions, single=single, samples=samples)
        needed = least_samples(found.limit, found.confidence, single)
        if found.samples < needed:
            raise OptionError(
                f"validation has {found.samples} samples, too few for {kind}={found.limit:g} at confidence "
                f"{found.confidence:g}, even if the models never differ: pass at least {needed}, or a higher limit"
            )
        return found

    def test(self, program: Program, share: float) -> Tried:
        """The mistakes of a compressed program, on the samples of all processes."""
        pairs = zip(self.predictions, self.run(program), strict=True)
        own = [value for one, other in pairs for value in one.mistakes(other.values, self.mistakes)]
        values = list(chain.from_iterable(self.calibration.group.gathered(own)))
        mean = sum(values) / len(values)
        if self.single:
            return Tried(share, mean, clopper_pearson(round(sum(values)), len(values), self.confidence))
        return Tried(share, mean, empirical_bernstein(values, self.confidence))

    def run(self, program: Program) -> list[_Predictions]:
        """The predictions of a program."""
        found = []
        for index, batch in enumerate(self.calibration.batches):
            output = run_batch(program.module, batch, self.calibration.forward, index)
            weights = call_weights(program, batch, self.calibration.given(index, batch)).outputs
            chooses = self.mistakes == "disagreement"
            predictions = _choices(output, batch, weights) if chooses else _values(output, weights)
            found.append(_Predictions.of(*predictions))
        return found


def _choices(output: Any, batch: Any, weights: Weights | None) -> tuple[Tensor, Tensor | None]:
    """The chosen classes of each sample, [N, k], and their weights."""
    logits, classes = find_logits(output, batch), -1
    if logits is None:
        logits, classes = find_pixels(output), 1
    if logits is None:
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        shapes = ", ".join(str(list(leaf.shape)) for leaf in leaves) or "no tensor"
        raise OptionError(
            "disagreement= requires a choice among classes: outputs [N, classes], tokens [N, L, classes], or pixels "
            f"[N, classes, height, width], not {shapes}. Use divergence= for other outputs"
        )
    chosen = logits.argmax(classes)
    own = None if weights is None else weights.of(chosen)
    return chosen.reshape(len(chosen), -1), own


def _values(output: Any, weights: Weights | None) -> tuple[Tensor, Tensor | None]:
    """All outputs of each sample, [N, k], and their weights."""
    leaves = [leaf for leaf in real_leaves(output) if leaf.is_floating_point()]
    if not leaves or any(leaf.dim() == 0 or leaf.shape[0] != leaves[0].shape[0] for leaf in leaves):
        raise CalibrationError("divergence= requires outputs whose first dimension is that of the samples")
    rows = [leaf.reshape(len(leaf), -1).float() for leaf in leaves]
    owns = element_weights(leaves, weights)
    if all(own is None for own in owns):
        return torch.cat(rows, 1), None
    weighed = [
        torch.ones_like(row) if own is None else own.reshape(row.shape).to(row)
        for row, own in zip(rows, owns, strict=True)
    ]
    return torch.cat(rows, 1), torch.cat(weighed, 1)
