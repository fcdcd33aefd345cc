"""Which allocation to take: the one whose model answers most like the original on some of the calibration samples.

What a layer loses says little about what the model loses, and less about what a refit leaves of that: so a few
allocations are carried out and measured. Where there is going to be a refit they are refitted quickly on some samples,
"up", and measured on others; this orders them as a full refit on all samples does.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import fx

from balf_fx.calibration.answers import Loss, answers, divergence
from balf_fx.calibration.batches import Forward, placeholder_values, sample_count, some_samples
from balf_fx.engine.rewriting import rewrite
from balf_fx.errors import CalibrationError, PassError
from balf_fx.graph.annotation import graph_record
from balf_fx.passes import Allocate, Refit
from balf_fx.passes.allocate import IMPORTANCE
from balf_fx.passes.observe import remove_observers

_LOGGER = logging.getLogger(__name__)


_IMPORTANCES = (IMPORTANCE, 0.3, 1.0, 0.15)  # small powers do better where much goes, one where little does


_CAUTIONS = (3.0, 9.0)  # beside 1: a refit mends low ranks better than features that are gone


_SAMPLES = 128


@dataclass(frozen=True)
class Trial:
    """How allocations are measured.

    Attributes:
        fit: batches on which an allocation is refitted before it is measured; none: it is measured as it is.
        judge: batches on which it is measured.
        memory: for the refit.
        loss: in place of the label-free one.
    """

    forward: Forward
    fit: Sequence[Any]
    judge: Sequence[Any]
    references: Sequence[Any]
    memory: int
    loss: Loss | None

    def measure(self, allocated: fx.GraphModule) -> float:
        """What the answers lose; the graph stays as it is."""
        graph_module = copy.deepcopy(allocated)
        if self.fit:
            inputs = [placeholder_values(graph_module, batch, self.forward) for batch in self.fit]
            Refit(inputs, "up", self.memory)(graph_module)
        return divergence(rewrite(graph_module), self.judge, self.references, self.forward, self.loss)


def plan_trial(
    prepared: fx.GraphModule, batches: Sequence[Any], forward: Forward, refit: bool, memory: int, loss: Loss | None
) -> Trial:
    """Choose the samples to measure by, and run the original on them.

    Args:
        batches: one at least.
        refit: whether the chosen allocation is going to be refitted.
    """
    original = copy.deepcopy(prepared)
    remove_observers(original)
    original.recompile()
    fit, judge = _few(batches, refit)
    try:
        references = answers(original, judge, forward)
    except CalibrationError:  # the model may want batches of the size that it was captured with
        half = len(batches) // 2
        fit, judge = (list(batches[:half]) if refit else []), list(batches[half:] if refit else batches)
        references = answers(original, judge, forward)
    return Trial(forward, fit, judge, references, memory, loss)


def allocate_faithfully(prepared: fx.GraphModule, allocate: Allocate, trial: Trial) -> fx.GraphModule:
    """A copy of the graph with the best of some allocations: first over `importance`, then over `caution`."""
    measured: dict[Any, float] = {}

    def attempt(option: Allocate) -> _Attempt:
        graph_module = copy.deepcopy(prepared)
        option(graph_module)
        allocation = graph_record(graph_module).allocation
        if allocation is None:
            raise PassError("Allocate left no allocation")
        chosen = (*(choice.chosen.rank for choice in allocation.choices), *sorted(allocation.sizes.items()))
        if chosen not in measured:
            measured[chosen] = trial.measure(graph_module)
        _LOGGER.info("importance %s, caution %s: %.4g", option.importance, option.caution, measured[chosen])
        return _Attempt(measured[chosen], option, graph_module)

    best = min((attempt(dataclasses.replace(allocate, importance=i)) for i in _IMPORTANCES), key=attrgetter("lost"))
    if graph_record(prepared).widths:
        cautious = (attempt(dataclasses.replace(best.option, caution=caution)) for caution in _CAUTIONS)
        best = min((best, *cautious), key=attrgetter("lost"))
    return best.graph_module


@dataclass(frozen=True)
class _Attempt:
    lost: float
    option: Allocate
    graph_module: fx.GraphModule


def _few(batches: Sequence[Any], refit: bool) -> tuple[list[Any], list[Any]]:
    """A few samples to refit on, and others to measure by."""
    total = sum(map(_count, batches))
    if not refit or total < 2:
        return [], _samples(batches, 0, min(_SAMPLES, total))
    size = min(_SAMPLES, total // 2)
    return _samples(batches, 0, size), _samples(batches, size, 2 * size)


def _count(batch: Any) -> int:
    return max(sample_count(batch), 1)


def _samples(batches: Sequence[Any], start: int, stop: int) -> list[Any]:
    """The batches, or parts of them, that hold some of all samples; what cannot be counted is one sample."""
    found = []
    seen = 0
    for batch in batches:
        count = _count(batch)
        first, last = max(start - seen, 0), min(stop - seen, count)
        if first < last:
            found.append(batch if last - first == count else some_samples(batch, first, last))
        seen += count
    return found
