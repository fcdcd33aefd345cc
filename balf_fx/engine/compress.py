"""The compiler: one budget over all parts of a program, in numbered steps.

The steps are the passes in the order of `balf_fx.passes`, run on one part after another.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from balf_fx.budget.problem import drawn, pose
from balf_fx.calibration.batches import Calibration, is_empty, ordinary, run_batch
from balf_fx.calibration.coverage import unseen
from balf_fx.calibration.gradients import observe_gradients
from balf_fx.calibration.merging import check_merged, merging
from balf_fx.calibration.observers import OBSERVERS, CovarianceObserver, InfluenceObserver, SensitivityObserver
from balf_fx.calibration.pages import Pages
from balf_fx.calibration.pieces import Piece, pieces_for_gradients, pieces_for_walk
from balf_fx.calibration.weights import check_fit, weighing
from balf_fx.checkpoint.journal import NO_JOURNAL, Journal
from balf_fx.engine.allocating import choose_allocation
from balf_fx.engine.blockwise import score_in_blocks
from balf_fx.engine.program import Program, count_calls, join, share_observers
from balf_fx.engine.resuming import Resumption
from balf_fx.engine.rewriting import Written, normalise
from balf_fx.engine.settings import Settings
from balf_fx.engine.solving import carry_out, settled
from balf_fx.engine.stages import work_of
from balf_fx.engine.tempering import temper
from balf_fx.engine.timing import TimeBudget
from balf_fx.engine.weighing import call_weights
from balf_fx.errors import CalibrationError, NonFiniteError, NoSiteError, NotCalibratedError
from balf_fx.graph.annotation import annotate, annotation, graph_record, record_graph, sites
from balf_fx.graph.layers import layers_of
from balf_fx.graph.plan import Plan, plan_of_records
from balf_fx.graph.timing import Timing
from balf_fx.passes import Allocate, Annotate, FindWidths, Follow, InsertObservers, Refine, ScoreWidths
from balf_fx.passes.score import Factors
from balf_fx.progress import SILENT, Progress
from balf_fx.refit.offload import Shelved

_LOGGER = logging.getLogger(__name__)


def observe(program: Program, settings: Settings, factors: Collection[Factors]) -> None:
    """Normalise all parts, find their sites and widths, and insert observers.

    Args:
        factors: the kinds of factors that the statistics must allow.

    Raises:
        NoSiteError: nothing can be factorized, and `strict` is true.
        UnknownSiteError: a pattern matches no layer.
    """
    # FoldBatchNorm, Annotate; then join the sites that several parts have in common.
    for graph_module in program.graph_modules:
        normalise(graph_module, graph_record(graph_module).origin, partial=program.is_traced)
    _check_sites(program, settings, required=settings.strict or not program.is_traced)
    shared = join(program.parts) if program.is_traced else set()
    # FindWidths, InsertObservers.
    for graph_module in filter(sites, program.graph_modules):
        if settings.pivot or (settings.widths and "sensitivity" in factors):
            FindWidths()(graph_module)
        sensitivity, influence = "sensitivity" in factors, "air" in factors
        names, divisions = frozenset(shared), settings.divisions
        InsertObservers(sensitivity, influence, settings.widths, apart=names, divisions=divisions)(graph_module)
    share_observers(program.parts, shared)


def _check_sites(program: Program, settings: Settings, required: bool) -> None:
    """Raise for a program without sites if they are required, and for patterns that match no layer in any part."""
    marks = [annotation(node) for graph_module in program.graph_modules for node in graph_module.graph.nodes]
    if program.is_traced:
        names = [name for graph_module in program.graph_modules for name in layers_of(graph_module)]
        Annotate(settings.include, settings.exclude, settings.dense).check(names)
    if required and not any(mark.site for mark in marks):
        refusals = [mark.refusal for mark in marks if mark.refusal is not None]
        listed = "; ".join(f"{refusal.name}: {refusal}" for refusal in refusals) or "it uses no parameters"
        raise NoSiteError(f"nothing in the model can be factorized ({listed})")


def calibrate(
    program: Program,
    batches: Iterable[Any],
    calibration: Calibration,
    lenient: bool = False,
    progress: Progress = SILENT,
    journal: Journal = NO_JOURNAL,
) -> list[int]:
    """Run batches through an observed program, with gradients if it has observers of gradients.

    Gradients need the values of all layers at once. A batch that needs more than the memory is run in pieces, if the
    model computes each sample independently of the others. Loss and squared gradients of positions are then those of
    each piece.

    Each process of the calibration's group runs its own batches, with probes of its own; all then have the statistics
    of all batches.

    Args:
        batches: read one at a time, in place of the calibration's own; those without samples are skipped.
        lenient: skip batches with NaN or infinity at a site, and run without gradients if none flow through the
            program.
        journal: has the statistics of the first batches if a run was killed; these are read, but not run again.

    Returns:
        The indices of the batches that were used.

    Raises:
        CalibrationError: a batch cannot be run, or holds NaN or infinity at a site; or the user's weights are no
            weights of its positions.
    """
    module = program.module
    generator = torch.Generator("cpu").manual_seed(calibration.seed + calibration.group.rank)
    gradients = any(isinstance(each, SensitivityObserver | InfluenceObserver) for each in module.modules())
    pieces = pieces_for_gradients(module, calibration)
    with merging(module, calibration.group):
        state = Resumption(journal, module, generator, gradients)
        index = -1
        for index, made in enumerate(progress.track(batches)):
            batch = ordinary(made)
            if is_empty(batch) or state.has(index):
                continue
            given = calibration.given(index, batch)
            try:
                if state.gradients:
                    for piece in pieces.of((batch, given), index):
                        _run(program, piece, calibration, index, generator)
                else:
                    _run(program, (batch, given), calibration, index, None)
            except NonFiniteError as error:
                if not lenient:
                    raise
                _LOGGER.warning("%s: this call is not used for calibration", error)
                continue
            except CalibrationError as error:
                if not (lenient and state.gradients):
                    raise
                _LOGGER.warning("there are no gradients, so factors minimise the plain output error: %s", error)
                state.gradients = False
                _run(program, (batch, given), calibration, index, None)
            state.counted.append(index)
        state.done(index + 1)
    return state.counted


def _run(
    program: Program, piece: Piece, calibration: Calibration, index: int, generator: torch.Generator | None
) -> None:
    """Run a batch, or a piece of it, through an observed program.

    Args:
        generator: draws the probe; None for no gradients.
    """
    batch, given = piece
    weights = call_weights(program, batch, given)
    with weighing(program.graph_modules, weights):
        if generator is not None:
            observe_gradients(program.module, batch, calibration, index, generator, weights.outputs)
        else:
            run_batch(program.module, batch, calibration.forward, index)
    check_fit(given, weights, index)


def check_prepared(graph_module: Any) -> None:
    """Check that a graph has observers.

    Raises:
        NotCalibratedError: it is not the result of `balf_fx.prepare`.
    """
    if not isinstance(graph_module, fx.GraphModule) or not hasattr(graph_module, OBSERVERS):
        raise NotCalibratedError(
            "this is not a prepared graph: call balf_fx.prepare first and run a few batches through it"
        )


def convert(
    program: Program,
    settings: Settings,
    calibration: Calibration,
    progress: Progress = SILENT,
    journal: Journal = NO_JOURNAL,
    once: bool = False,
) -> tuple[Program, Plan]:
    """Compress a calibrated program to the budget; the program itself is unchanged.

    Args:
        calibration: its batches are used to measure allocations and to refit layers; without batches, neither is done.
        journal: has the allocation and the layers that a run finished before it was killed.
        once: whether this is the only time, so that the program's statistics are deleted after the score.

    Returns:
        The rewritten parts, and the plan that was carried out.

    Raises:
        NotCalibratedError: there are no observers, or they have observed no batch.
        BudgetError: the budget cannot be reached; the message names the smallest one that can.
    """
    if not program.is_traced:
        check_prepared(program.module)
    check_merged(program.module, calibration.group)
    allocate, mode = settings.allocate(), settings.refit_mode
    program = program if settings.chosen_factors == "svd" else _without_unseen(program)
    time_budget = TimeBudget.start(program, settings, calibration) if settings.times else None
    if settings.measures or mode is not None:
        calibration = in_pieces(program, calibration)
    if calibration.pages is not None:
        calibration.pages.release()
    work = work_of(program, settings, calibration.batches)
    shares = [work.scoring, work.trying, work.solving]
    scoring, trying, solving = progress.spans(shares, ["scoring", "trying allocations", "solving layers"])
    # 1. Align, FindPivots, Score, ScoreWidths, Time: the loss and the cost of each rank and each size.
    score(program, settings, calibration, scoring)
    if once:
        _delete_statistics(program, moments=settings.chosen_factors != "air")
    if time_budget is not None:
        measuring, trying = trying.spans([1.0, 2.0], ["timing layers", "trying allocations"])
        time_budget.measure_sites(measuring)
    # 2. Allocate: one budget over all parts; or Follow: the ranks and sizes of a plan.
    problem = pose(program.counted, program.totals() if time_budget is None else time_budget.totals())
    choose = partial(choose_allocation, program, settings, problem, calibration, time_budget, trying, journal)
    allocation, timing = journal.cached("allocation", choose)
    compressed = settled(program, problem, drawn(problem, allocation))
    # 3. Refine or Refit: solve for the layers' weights. Pivot, Narrow, Factorize: rewrite the graphs.
    if settings.chosen_factors == "air":
        for graph_module in filter(sites, compressed.graph_modules):
            Refine(group=calibration.group, progress=solving, journal=journal)(graph_module)
    written = _written(settings, allocate, timing)
    done = _finishing(settings, calibration.pages)
    carry_out(compressed, mode, calibration, solving, written, journal, done)
    # 4. ScaleLogits: one factor for the logits.
    factor = temper(program, compressed, settings, calibration, done)
    progress.done()
    records = [graph_record(graph_module) for graph_module in compressed.graph_modules]
    plan = plan_of_records(records, records[0].allocation or allocation)
    return compressed, dataclasses.replace(plan, timing=timing, logit_factor=factor)


def _without_unseen(program: Program) -> Program:
    """The program without the sites that no finite value has reached, if there are others; these stay dense."""
    found = [unseen(graph_module) for graph_module in program.graph_modules]
    if not any(found) or sum(map(len, found)) == sum(len(sites(part)) for part in program.graph_modules):
        return program
    copied = program.copy()
    for graph_module, refusals in zip(copied.graph_modules, found, strict=True):
        for site, nodes in sites(graph_module).items():
            if site.name in refusals:
                refusal = refusals[site.name]
                _LOGGER.warning("site %s stays dense: %s", site.name, refusal)
                for node in nodes:
                    annotate(node, site=None, refusal=refusal)
    return copied


def _written(settings: Settings, allocate: Allocate | Follow, timing: Timing | None) -> Written:
    """How low-rank maps are written: as in a plan, or for a budget of time as they were measured to be faster."""
    if isinstance(allocate, Follow):
        return "apart" if any(layer.apart for layer in allocate.plan.layers) else "pivots"
    if not settings.pivot:
        return "pairs"
    return "pivots" if timing is not None and not timing.biases_apart else "apart"


def _finishing(settings: Settings, pages: Pages | None) -> Callable[[nn.Module], None] | None:
    """What is done with new layers: where the model's weights are in files, these stay in files, too."""
    if pages is None:
        return None
    return (lambda _: pages.release()) if settings.safetensors is None else pages.keep


def score(program: Program, settings: Settings, calibration: Calibration, progress: Progress = SILENT) -> None:
    """Score the ranks and widths of all parts, shared out over the processes of the calibration's group."""
    group = calibration.group
    count_calls(program.parts)
    found = [graph_module for graph_module in program.graph_modules if sites(graph_module)]
    for graph_module, span in zip(found, progress.spans([1.0] * len(found)), strict=True):
        ranks, sizes = span.spans([1.0, 2.0])
        scored = dataclasses.replace(settings.score(ranks), group=group)
        dataclasses.replace(settings.align(), group=group)(graph_module)
        settings.find_pivots()(graph_module)
        if calibration.pages is None:
            scored(graph_module)
        else:
            score_in_blocks(graph_module, scored, calibration)
        if scored.factors == "sensitivity" and settings.widths:
            ScoreWidths(scored.damping, group=group, progress=sizes)(graph_module)
        else:
            record_graph(graph_module, width_curves=(), widths_scored_with=())


def _delete_statistics(program: Program, moments: bool) -> None:
    """Delete the statistics of gradients, which nothing reads once all ranks and widths are scored.

    Args:
        moments: delete those of values, too, which only `Refine` reads.
    """
    for module in program.module.modules():
        if isinstance(module, SensitivityObserver):
            module.halves = [None, None]
        if isinstance(module, CovarianceObserver) and moments:
            module.reset()
    for graph_module in program.graph_modules:
        record_graph(graph_module, widths_scored_with=())
        for node in itertools.chain.from_iterable(sites(graph_module).values()):
            annotate(node, scored_with=None)


def in_pieces(program: Program, calibration: Calibration) -> Calibration:
    """Split large batches so that the values of one layer of both models fit into memory."""
    fitting = pieces_for_walk(program.module, calibration)
    pieces = [
        (turn, piece)
        for index, (turn, batch) in enumerate(zip(calibration.in_turn, calibration.batches, strict=True))
        for piece in fitting.of((batch, calibration.given(index, batch)), index)
    ]
    weights = Shelved(calibration.memory)
    for _, (_, given) in pieces:
        if given is not None:
            weights.append(given)
    batches, turns = [batch for _, (batch, _) in pieces], [turn for turn, _ in pieces]
    return dataclasses.replace(calibration, batches=batches, weights=weights, turns=turns)
