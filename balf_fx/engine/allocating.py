"""Choose the allocation: within the budget; by measured times, where it is one of time; and the best of a few."""

from __future__ import annotations

import dataclasses
import logging

from balf_fx.budget.problem import Problem
from balf_fx.calibration.batches import Calibration
from balf_fx.checkpoint.journal import Journal
from balf_fx.engine.program import Program
from balf_fx.engine.settings import Settings
from balf_fx.engine.stages import few_samples
from balf_fx.engine.timing import TimeBudget
from balf_fx.engine.trials import best_allocation, plan_trial
from balf_fx.errors import CalibrationError
from balf_fx.graph.allocation import Allocation
from balf_fx.graph.timing import Timing
from balf_fx.passes import Allocate, Follow
from balf_fx.progress import Progress

_LOGGER = logging.getLogger(__name__)


def choose_allocation(
    program: Program,
    settings: Settings,
    problem: Problem,
    calibration: Calibration,
    time_budget: TimeBudget | None,
    progress: Progress,
    journal: Journal,
) -> tuple[Allocation, Timing | None]:
    """Choose an allocation; where allocations are compared, the best of a few.

    Args:
        program: scored; for a budget of time, with times.
        time_budget: measures whole models; None for other budgets.
        journal: has the measurements that a run made before it was killed.

    Returns:
        The allocation, and for a budget of time the measured times of its model.

    Raises:
        BudgetError: the budget cannot be reached.
    """
    allocate = settings.allocate()
    if isinstance(allocate, Follow):
        return allocate.solve(problem), None
    if time_budget is None:
        best = _best_of_few(program, settings, problem, allocate, calibration, progress, journal)
        return allocate.solve(problem) if best is None else best[1], None
    # Trials have the cost at which the measured time is as asked, so the target is corrected before them.
    asked = min(time_budget.asked, 1.0)
    timed = time_budget.corrected(problem, allocate, asked)
    best = _best_of_few(program, settings, problem, timed.option, calibration, progress, journal)
    if best is not None and best[0] != timed.option:
        timed = time_budget.corrected(problem, best[0], best[0].latency or 1.0, timed)
    time_budget.warn(timed.timing)
    return dataclasses.replace(timed.allocation, target=asked), timed.timing


def _best_of_few(
    program: Program,
    settings: Settings,
    problem: Problem,
    allocate: Allocate,
    calibration: Calibration,
    progress: Progress,
    journal: Journal,
) -> tuple[Allocate, Allocation] | None:
    """The best of a few allocations and the options that choose it; None where they are not compared.

    The fast effort does not require that a compressed model runs with the user's `forward`; where it does not,
    allocations are not compared.
    """
    if not settings.measures or not calibration.has_batches():
        return None
    refit = settings.refit_mode is not None
    if settings.chosen_factors == "sensitivity":
        trial = plan_trial(program, calibration, refit, journal=journal)
        return best_allocation(program, problem, allocate, trial, progress)
    try:
        trial = plan_trial(program, calibration, refit, few_samples(calibration.samples()), journal)
        return best_allocation(program, problem, allocate, trial, progress)
    except CalibrationError as error:
        _LOGGER.warning("allocations are not compared, since the compressed model does not run: %s", error)
        return None
