"""Choose the allocation whose model's output is closest to the original's on some of the calibration samples.

The losses of the layers predict the loss of the model poorly, and its loss after a refit even less. So a few
allocations are carried out and measured. If there will be a refit, each is refitted quickly on some samples, and
measured on others; this ranks allocations as a full refit on all samples does. Ranks and features are those of all
samples, so that for the trials half of them choose, and others are measured on (`engine.halving`). Where this is not
possible, what ranks and features lose on samples that did not choose them is estimated and added (`_best`).
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from balf_fx.budget.problem import Loss, Problem, predicted_loss
from balf_fx.calibration.batches import Calibration, run_batch, samples_of
from balf_fx.calibration.freed import BETWEEN_WALKS, give_back
from balf_fx.calibration.outputs import divergence, loss_and_weight, outputs_of
from balf_fx.checkpoint.digests import digest_of
from balf_fx.checkpoint.journal import NO_JOURNAL, Journal
from balf_fx.engine.blockwise import with_known_outputs
from balf_fx.engine.halving import fits_samples, half_of, picked, use_first_half
from balf_fx.engine.program import Program
from balf_fx.engine.projecting import projected
from balf_fx.engine.solving import carry_out, settled, without_observers
from balf_fx.engine.stages import TRIAL_SAMPLES
from balf_fx.engine.weighing import output_weights
from balf_fx.errors import CalibrationError
from balf_fx.graph.allocation import Allocation
from balf_fx.passes.allocate import IMPORTANCE, Allocate
from balf_fx.progress import SILENT, Progress
from balf_fx.refit.offload import Shelved

_LOGGER = logging.getLogger(__name__)
_IMPORTANCES = (0.3, 1.0)  # beside the usual one: small powers are better at low budgets, 1 at high budgets
_NEXT_IMPORTANCE = {0.3: 0.15, IMPORTANCE: 0.8, 1.0: 0.8}  # one more power, next to the best of these
_EVENNESSES = (0.0, 0.9)  # without gradients, each is far better on some models
_CAUTIONS = (1.0, 2.0)  # where features may be removed: a refit makes up for low ranks better
_ROWS = {"fit": 16_384, "evaluation": 2_048}  # rows of logits, such as tokens, that are enough in place of more samples
_FEWEST = 8  # samples that are taken even so, since the rows of one sample are similar


@dataclass(frozen=True)
class Trial:
    """How allocations are measured.

    Attributes:
        original: a copy of the program that computes what the original does.
        fit: batches on which an allocation is refitted before it is measured; empty for no refit.
        evaluation: batches on which it is measured.
        references: the original's outputs for `evaluation`.
        refit: whether any process has batches in `fit`.
        journal: has what was measured before a run was killed.
    """

    original: Program
    fit: Calibration
    evaluation: Calibration
    references: Sequence[Any]
    refit: bool
    journal: Journal = NO_JOURNAL

    def measure(self, program: Program, problem: Problem, allocation: Allocation) -> float:
        """The distance of the outputs from the original's; the program is unchanged."""
        stage = f"trial {digest_of(_chosen(allocation))}"
        return self.journal.cached(stage, lambda: self._measure(program, problem, allocation))

    def _measure(self, program: Program, problem: Problem, allocation: Allocation) -> float:
        pages = self.evaluation.pages  # for layers in files, and a model that runs block by block
        tried = None if self.refit else projected(self.original, allocation)
        if tried is None:
            tried = settled(program, problem, allocation)
            use_first_half(tried.graph_modules)
            carry_out(tried, "outputs" if self.refit else None, self.fit, done=None if pages is None else pages.keep)
        module = tried.module if pages is None else with_known_outputs(tried, self.evaluation, pages)
        distance = divergence(
            module, self.evaluation, self.references, partial(output_weights, program, self.evaluation)
        )
        if pages is not None:  # a graph and its module refer to each other, and so would keep all layers
            del tried, module
            gc.collect()
            pages.release()
        give_back(BETWEEN_WALKS, problem.totals.params)
        return distance


def plan_trial(
    program: Program,
    calibration: Calibration,
    refit: bool,
    most: int = TRIAL_SAMPLES["evaluation"],
    journal: Journal = NO_JOURNAL,
) -> Trial:
    """Choose the samples for the measurement, and run the original on them.

    Args:
        calibration: has at least one batch, in one of the processes. Samples are taken from all processes in turn.
        refit: whether the chosen allocation will be refitted.
        most: the most samples for each purpose; fewer are taken where each has many rows of logits.
        journal: as in `Trial`.
    """
    original, group = without_observers(program), calibration.group
    use_first_half(original.graph_modules)
    samples = {purpose: min(most, usual) for purpose, usual in TRIAL_SAMPLES.items()}
    try:
        starts, total = calibration.numbered()
        limits = samples if min(most, total) <= _FEWEST else _limits(program, original, calibration, samples)
        if not fits_samples(program.graph_modules):
            fit, evaluation = _split(calibration, refit, limits, starts, total)
        else:
            fit = _first(half_of(calibration, 0), limits["fit"] if refit else 0)
            evaluation = _first(half_of(calibration, 1), limits["evaluation"])
        references = group.together(partial(_references, original, evaluation))
    except CalibrationError:  # the model may only run on batches of the size that it was captured with
        count = len(calibration.batches)
        half = count // 2 if refit else 0
        size = max(map(samples_of, calibration.batches), default=1)
        few = {purpose: math.ceil(limit / size) for purpose, limit in samples.items()}
        fit = calibration.only(range(min(few["fit"], half)))
        evaluation = calibration.only(range(half, min(half + few["evaluation"], count)))
        references = _references(original, evaluation)
    return Trial(original, fit, evaluation, references, fit.has_batches(), journal)


def _limits(program: Program, original: Program, calibration: Calibration, samples: dict[str, int]) -> dict[str, int]:
    """The most samples for each purpose: `samples`, or fewer with as many rows of logits as are enough."""
    group = calibration.group
    counts = group.gathered(group.together(partial(_rows, program, original, calibration)))
    rows = next(filter(None, counts), 1.0)
    return {purpose: min(samples[purpose], max(math.ceil(count / rows), _FEWEST)) for purpose, count in _ROWS.items()}


def _rows(program: Program, original: Program, calibration: Calibration) -> float:
    """The rows of logits that count in a sample of this process's first batch; 1 for other outputs, 0 without batches.

    They are those of the first sample, or the mean of the batch where the model does not run on one sample.
    """
    batch = calibration.only(range(min(len(calibration.batches), 1)))
    try:
        return _mean_rows(program, original, _samples(batch, [0] * len(batch.batches), 0, 1))
    except CalibrationError:
        return _mean_rows(program, original, batch)


def _mean_rows(program: Program, original: Program, calibration: Calibration) -> float:
    """The rows of logits of each sample that count, on average."""
    outputs = zip(calibration.batches, _references(original, calibration), strict=True)
    counts = [
        loss_and_weight(output, output, batch, output_weights(program, calibration, index))[1]
        for index, (batch, output) in enumerate(outputs)
    ]
    return sum(counts) / (sum(map(samples_of, calibration.batches)) or 1)


def _references(original: Program, evaluation: Calibration) -> Sequence[Any]:
    """The original's outputs, in files where the model goes block by block."""
    if evaluation.pages is None:
        return outputs_of(original.module, evaluation.batches, evaluation.forward)
    module, found = with_known_outputs(original, evaluation, evaluation.pages), Shelved(memory=0)
    for index, batch in enumerate(evaluation.batches):
        found.append(run_batch(module, batch, evaluation.forward, index))
    return found


def best_allocation(
    program: Program, problem: Problem, allocate: Allocate, trial: Trial, progress: Progress = SILENT
) -> tuple[Allocate, Allocation]:
    """Choose the best of a few allocations: over `caution` and `importance`; without gradients, over `evenness`.

    Each round changes one option of the best allocation so far.

    Returns:
        The options that choose it, and the allocation.
    """
    measured: dict[Any, float] = {}

    def attempt(option: Allocate) -> _Attempt:
        allocation = option.solve(problem)
        give_back(BETWEEN_WALKS, problem.totals.params)
        chosen = _chosen(allocation)
        if chosen not in measured:
            measured[chosen] = trial.measure(program, problem, allocation)
        expected = predicted_loss(problem, allocation)
        tried = (option.importance, option.caution, option.evenness, measured[chosen], expected.optimism)
        _LOGGER.info("importance %s, caution %s, evenness %s: %.4g, optimism %.4g", *tried)
        return _Attempt(measured[chosen], expected, option, allocation)

    rounds: list[Callable[[Allocate], list[dict[str, Any]]]] = [
        lambda _: [{"evenness": evenness} for evenness in _EVENNESSES]
    ]
    if allocate.importance > 0:
        cautions = _CAUTIONS if problem.clusters else (allocate.caution,)
        rounds = [
            lambda _: [{"importance": IMPORTANCE, "caution": caution} for caution in cautions],
            lambda _: [{"importance": importance} for importance in _IMPORTANCES],
            lambda best: [{"importance": _NEXT_IMPORTANCE[best.importance]}],
        ]
    option, attempts = allocate, list[_Attempt]()
    for changes, span in zip(rounds, progress.spans([2.0, 2.0, 1.0][: len(rounds)]), strict=True):
        attempts += [attempt(dataclasses.replace(option, **change)) for change in span.track(changes(option))]
        best = _best(attempts, seen=not fits_samples(program.graph_modules))
        option = best.option
    return option, best.allocation


def _chosen(allocation: Allocation) -> tuple[Any, ...]:
    """The ranks and the sizes of an allocation."""
    return (*(choice.chosen.rank for choice in allocation.choices), *sorted(allocation.sizes.items()))


@dataclass(frozen=True)
class _Attempt:
    distance: float  # of the outputs, from the original's
    expected: Loss
    option: Allocate
    allocation: Allocation


def _best(attempts: Sequence[_Attempt], seen: bool) -> _Attempt:
    """The attempt whose outputs should be the closest on samples that nothing has seen.

    Where allocations are measured on the samples by which ranks, features and their predictions were chosen, what they
    should lose beyond that is added (Efron 1986, "How biased is the apparent error rate of a prediction rule?"), in the
    unit in which the attempts' losses were measured.
    """
    finite = [attempt for attempt in attempts if math.isfinite(attempt.distance)] or attempts
    if not seen:
        return min(finite, key=lambda attempt: attempt.distance)
    fitted = math.fsum(attempt.expected.fitted for attempt in finite)
    measured = math.fsum(attempt.distance for attempt in finite)
    unit = measured / fitted if measured > 0 and fitted > 0 else 1.0  # a distance of zero may be negative by rounding
    return min(finite, key=lambda attempt: attempt.distance + unit * attempt.expected.optimism)


def _split(
    calibration: Calibration, refit: bool, limits: Mapping[str, int], starts: Sequence[int], total: int
) -> tuple[Calibration, Calibration]:
    """A few samples for the refit, and others for the measurement.

    Args:
        limits: the most samples for each purpose.
        starts, total: of `Calibration.numbered`.
    """
    half = total // 2 if refit and total > 1 else total
    fit = min(limits["fit"], half) if half < total else 0
    return _samples(calibration, starts, 0, fit), _samples(
        calibration, starts, fit, fit + min(limits["evaluation"], half)
    )


def _first(calibration: Calibration, count: int) -> Calibration:
    """The first samples, of all processes in turn."""
    return _samples(calibration, calibration.numbered()[0], 0, count)


def _samples(calibration: Calibration, starts: Sequence[int], start: int, stop: int) -> Calibration:
    """The samples with numbers start .. stop - 1, in batches; a batch that cannot be counted is one sample.

    Args:
        starts: the number of the first sample of each batch.
    """

    def own(index: int, count: int) -> range:
        return range(max(start - starts[index], 0), min(stop - starts[index], count))

    return picked(calibration, own)
