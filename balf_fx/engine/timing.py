"""Budgets of time: whole models are measured, and the target is corrected for what single operations do not show."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, get_args

import torch

from balf_fx.budget.problem import Problem, Totals
from balf_fx.calibration.batches import Calibration
from balf_fx.capture.models import device_of
from balf_fx.engine.program import Program, Step, Trace, run_steps
from balf_fx.engine.rewriting import Written
from balf_fx.engine.settings import Settings
from balf_fx.engine.solving import carry_out, settled, without_observers
from balf_fx.engine.units import share_of
from balf_fx.errors import BudgetError, OptionError
from balf_fx.graph.allocation import Allocation
from balf_fx.graph.annotation import graph_record, sites
from balf_fx.graph.timing import Runner, Timing
from balf_fx.latency.stopwatch import Race, Task, race
from balf_fx.latency.table import open_table
from balf_fx.passes import Allocate, Overwrite, Time
from balf_fx.progress import Progress

_LOGGER = logging.getLogger(__name__)
_ROUNDS = 15
_TOLERANCE = 0.03  # of the target
_CORRECTIONS = 5


Shares = tuple[float, float]
"""The time of a model by its operations and as it was measured, as shares of that of the original."""


class Line(NamedTuple):
    """The times of the models between two others."""

    slower: Shares = (1.0, 1.0)
    faster: Shares = (0.0, 0.0)

    def by_operations(self, measured: float) -> float:
        """The share by operations of the model whose measured share is this one."""
        (slow, above), (fast, below) = self
        return fast + (measured - below) * (slow - fast) / (above - below)

    def measured(self, by_operations: float) -> float:
        """The measured share of the model whose share by operations is this one."""
        (slow, above), (fast, below) = self
        return below if slow == fast else max(below + (by_operations - fast) * (above - below) / (slow - fast), 0.0)


class Timed(NamedTuple):
    """An allocation whose model has been timed, and the options that choose it."""

    option: Allocate
    allocation: Allocation
    timing: Timing

    @property
    def shares(self) -> Shares:
        """The time by operations, and as it was measured."""
        return self.timing.by_operations, self.timing.measured


@dataclass(frozen=True)
class TimeBudget:
    """The budget of time of a program, whose compressed forms are timed beside the original.

    Attributes:
        calibration: its first batch is the call that is timed.
        trace: this call.
        original: the program as the user runs it: without observers, and with its operations in place.
        task: runs it on this call.
        asked: the share of its time to keep.
        pivot: whether low-rank maps may be written in other forms than pairs of factors.
    """

    program: Program
    calibration: Calibration
    trace: Trace
    runner: Runner
    device: torch.device
    original: Program
    task: Task
    asked: float
    pivot: bool

    @classmethod
    def start(cls, program: Program, settings: Settings, calibration: Calibration) -> TimeBudget:
        """Time the original; by default, with the runner that is faster.

        Raises:
            OptionError: there is no batch to run, or the runner cannot compile the model here.
        """
        group = calibration.group
        batch = group.once(lambda: next(iter(calibration.batches), None))
        if batch is None:
            raise OptionError(
                "latency= is measured on a batch: pass the calibration batches as batches=, of several processes at "
                "least to the first"
            )
        trace, original = program.trace(batch), without_observers(program)
        for graph_module in original.graph_modules:
            Overwrite()(graph_module)
        device = device_of(original.module)
        tasks = {
            runner: _task(original, trace, runner) for runner in get_args(Runner) if settings.runner in (runner, None)
        }
        eager = tasks.get("eager") or _task(original, trace, "eager")
        races = group.once(lambda: _races(eager, tasks, device))
        runner: Runner = min(races, key=lambda each: races[each].ratio)
        seconds = races[runner].second
        _LOGGER.info("the model takes %.4g ms (%s)", 1e3 * seconds, runner)
        asked, task = share_of(settings.latency, seconds), tasks[runner]
        return cls(program, calibration, trace, runner, device, original, task, asked, settings.pivot)

    def measure_sites(self, progress: Progress) -> None:
        """Measure the times of the candidates of all sites (`passes.Time`)."""
        table = open_table(self.device, self.calibration.group)
        parts = [index for index, graph in enumerate(self.program.graph_modules) if sites(graph)]
        for index, span in zip(parts, progress.spans([1.0] * len(parts)), strict=True):
            inputs = next((step.args for step in self.trace if step.part == index), None)
            if inputs is not None:
                step = (Step(index, inputs),)
                compiled = _task(self.original, step, self.runner) if self.runner == "inductor" else None
                plain = self.original.graph_modules[index]
                Time(inputs, table, span, compiled, plain)(self.program.graph_modules[index])

    def totals(self) -> Totals:
        """The cost of one call of the whole model, whose time is that of its nodes.

        Nodes are timed one by one, as candidates are, or beside the model where it is compiled.
        """
        nodes = sum(part.calls * (graph_record(part.graph_module).nanoseconds or 0) for part in self.program.parts)
        return dataclasses.replace(self.program.totals(), latency=nodes)

    def corrected(self, problem: Problem, allocate: Allocate, target: float, earlier: Timed | None = None) -> Timed:
        """Choose an allocation, measure it, and correct the target until the measured share is as asked.

        Args:
            target: the share of the time by operations to begin with.
            earlier: a model of other options, from which the time of the first one is predicted.

        Returns:
            The slowest allocation within the tolerance, else the fastest; the original if none is faster.
        """
        tried: list[Timed] = []
        line = Line() if earlier is None else nearest_line(self.asked, [earlier.shares]) or Line()
        known, smallest = earlier, False
        for _ in range(_CORRECTIONS + 1):
            try:
                found = self._timed(problem, dataclasses.replace(allocate, latency=target), line, known)
            except BudgetError as error:
                target, smallest = error.minimum, True
                found = self._timed(problem, dataclasses.replace(allocate, latency=target, strict=False), line, known)
            known = found
            tried.append(found)
            _LOGGER.info("target %.4g: %s", target, found.timing)
            over = found.timing.measured / self.asked - 1.0
            if abs(over) <= _TOLERANCE or target >= 1.0 or (smallest and over > 0):
                break
            smallest = False
            shares = [each.shares for each in tried]
            target, line = next_target(self.asked, shares), nearest_line(self.asked, shares) or Line()
        kept = [each for each in tried if each.timing.measured <= (1.0 + _TOLERANCE) * self.asked]
        best = max(kept, key=_measured) if kept else min(tried, key=_measured)
        if smallest and not kept and allocate.strict:
            raise BudgetError(
                f"latency={self.asked:.4g} is out of reach: at its smallest ranks and widths the model takes "
                f"{best.timing.measured:.4f} of its time. Ask for more, or pass strict=False to get the fastest model",
                best.timing.measured,
            )
        if best.timing.measured <= 1.0:
            return best
        return self._timed(problem, dataclasses.replace(allocate, latency=1.0), line, best)

    def warn(self, timing: Timing) -> None:
        """Warn of a model that takes longer than the user has asked for."""
        if timing.measured > (1.0 + _TOLERANCE) * self.asked:
            _LOGGER.warning(
                "the model takes %.3g of the original's time, and %.3g was asked for: no model that was measured is "
                "faster. Ask for more, or try again when the machine is quiet",
                timing.measured,
                self.asked,
            )

    def _timed(self, problem: Problem, option: Allocate, line: Line, known: Timed | None) -> Timed:
        """Choose an allocation and measure it.

        Args:
            known: another model, which has shown how biases are added; None to measure that, too.
        """
        allocation, group = option.solve(problem), self.calibration.group
        apart = group.once(lambda: self._apart(problem, allocation)) if known is None else known.timing.biases_apart
        return Timed(option, allocation, group.once(lambda: self._time(problem, allocation, line, apart)))

    def _apart(self, problem: Problem, allocation: Allocation) -> bool:
        """Whether the model is no slower where biases are added apart."""
        if not self.pivot:
            return False
        apart = self._compressed(problem, allocation, apart=True)
        if not any(layer.apart for part in apart.graph_modules for layer in graph_record(part).replaced):
            return True
        inside = self._compressed(problem, allocation, apart=False)
        first, second = (_task(program, self.trace, self.runner) for program in (apart, inside))
        found = _race(first, second, self.device).ratio
        _LOGGER.info("biases in products take %.3g times as long as apart from them", found)
        return found >= 1.0

    def _compressed(self, problem: Problem, allocation: Allocation, apart: bool) -> Program:
        """The compressed program; its times depend on its sizes alone, so that one-shot weights will do."""
        compressed = settled(self.program, problem, allocation)
        written: Written = "pairs" if not self.pivot else "apart" if apart else "pivots"
        carry_out(compressed, None, self.calibration, written=written)
        return compressed

    def _time(self, problem: Problem, allocation: Allocation, line: Line, apart: bool) -> Timing:
        compressed = self._compressed(problem, allocation, apart)
        found = _race(self.task, _task(compressed, self.trace, self.runner), self.device)
        whole, in_sites = max(problem.totals.latency, 1), sum(choice.dense.latency for choice in allocation.choices)
        by_operations = 1.0 - _saved(allocation) / whole
        return Timing(
            runner=self.runner,
            device=str(self.device),
            threads=torch.get_num_threads(),
            asked=self.asked,
            by_operations=by_operations,
            predicted=line.measured(by_operations),
            measured=found.ratio,
            in_sites=min(in_sites / whole, 1.0),
            biases_apart=apart,
            dense=found.first,
            compressed=found.second,
        )


def next_target(asked: float, tried: Sequence[Shares]) -> float:
    """The share of the time by operations whose measured share is as asked, on `nearest_line`."""
    line = nearest_line(asked, tried)
    if line is None:
        return 0.5 * min(tried[-1][0], 1.0)
    return min(max(line.by_operations(asked), 1e-3), 1.0)


def nearest_line(asked: float, tried: Sequence[Shares]) -> Line | None:
    """The line between the models whose measured shares are nearest to the one asked for; None if nothing was saved.

    Args:
        tried: other models; the shares of the original are 1.
    """
    slow = [(1.0, 1.0), *(each for each in tried if each[1] > asked)]
    fast = [each for each in tried if each[1] <= asked]
    if fast:
        line = Line(min(slow, key=itemgetter(1)), max(fast, key=itemgetter(1)))
    else:  # from the original, beyond the smallest model
        line = Line(slow[0], min(slow, key=itemgetter(0)))
    return None if max(line.faster) >= 1.0 else line


def _measured(timed: Timed) -> float:
    return timed.timing.measured


def _saved(allocation: Allocation) -> int:
    """The nanoseconds that an allocation saves by the times of its operations."""
    saved = sum(choice.dense.latency - choice.chosen.latency for choice in allocation.choices)
    return saved + allocation.saved_elsewhere.latency


def _races(eager: Task, tasks: Mapping[Runner, Task], device: torch.device) -> dict[Runner, Race]:
    """The times of each runner beside eager mode; of several, those that work here."""
    alone = len(tasks) == 1
    working = {runner: task for runner, task in tasks.items() if runner == "eager" or _compiles(task, alone)}
    return {runner: _race(eager, task, device) for runner, task in working.items()}


def _compiles(task: Task, required: bool) -> bool:
    """Whether torch.compile can compile a model here, or an error if it must."""
    from torch._dynamo.exc import TorchDynamoException  # only here: importing Dynamo takes long

    try:
        with torch.no_grad():
            task()
    except TorchDynamoException as error:
        if required:
            raise OptionError(f"torch.compile fails here: {error}. Pass runner='eager'") from error
        _LOGGER.warning("torch.compile fails here, so the model is timed in eager mode: %s", error)
        return False
    return True


def _race(first: Task, second: Task, device: torch.device) -> Race:
    with torch.no_grad():
        return race(first, second, device, _ROUNDS)


def _task(program: Program, trace: Trace, runner: Runner) -> Callable[[], object]:
    """Runs a program as a call."""
    graphs: list[Callable[..., Any]] = list(program.graph_modules)
    if runner == "inductor":
        graphs = [torch.compile(graph_module) for graph_module in graphs]
    return lambda: run_steps(graphs, trace)
