"""What a user calls: compile = prepare + calibrate + convert."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import fx, nn
from tqdm import tqdm

from balf_fx.calibration.answers import Loss
from balf_fx.calibration.batches import (
    MEMORY,
    Forward,
    forward_for,
    iterate,
    pieces_for_walk,
    placeholder_values,
    run_batch,
)
from balf_fx.calibration.gradients import observe_gradients
from balf_fx.calibration.observers import OBSERVERS, InfluenceObserver, SensitivityObserver
from balf_fx.capture.models import cuda_devices
from balf_fx.capture.normal_form import Method as CaptureMethod
from balf_fx.capture.normal_form import capture as capture_graph
from balf_fx.engine.rewriting import finish, rewrite
from balf_fx.engine.trials import allocate_faithfully, plan_trial
from balf_fx.errors import CalibrationError, NoSiteError, NotCalibratedError, OptionError
from balf_fx.graph.annotation import annotation, graph_record, record_graph, sites
from balf_fx.graph.curves import Rank
from balf_fx.graph.plan import Plan
from balf_fx.passes import (
    Allocate,
    Annotate,
    FindWidths,
    FoldBatchNorm,
    Follow,
    InsertObservers,
    Refine,
    Refit,
    Score,
    ScoreWidths,
)
from balf_fx.passes.allocate import Method, allocate_for
from balf_fx.passes.refit import RefitMode
from balf_fx.passes.score import Factors

Effort = Literal["fast", "balanced", "best"]
"""What `compile` spends on accuracy; see there."""


def compile(
    model: nn.Module,
    calib_batches: Any,
    *,
    flops: float | None = None,
    params: float | None = None,
    effort: Effort = "best",
    factors: Factors | None = None,
    widths: bool = True,
    allocation: Method | Mapping[str, Rank] | Plan = "budget",
    energy: float | None = None,
    centred: bool = True,
    split: bool = True,
    fold_batchnorm: bool = True,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    strict: bool = True,
    capture: CaptureMethod = "auto",
    loss: Loss | None = None,
    refit: bool | RefitMode | None = None,
    memory: int = MEMORY,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> fx.GraphModule:
    """Make a trained model cheaper without fine-tuning.

    Args:
        model: any module in evaluation mode. It is not touched: parameters, buffers, modes and random state stay as
            they are, bit for bit.
        calib_batches: unlabelled batches, a few hundred samples in all: a tensor, a mapping of keyword arguments, or
            any iterable of tensors, tuples of positional arguments or mappings, DataLoaders and one-shot generators
            included. Labels in `(images, labels)` are recognised as `balf_fx.batches` describes. The first batch
            also sets the shapes on which FLOPs are counted; the others may differ.
        flops, params: the budget, exactly one of them: the fraction of the *whole model's* FLOPs (as
            `torch.utils.flop_counter` counts them) or parameters to keep, in (0, 1].
        effort: "fast": factors by the output error, one-shot. "balanced": factors and widths by what the model's own
            answer minds, and the allocation that changes it least on some of the batches. "best": a refit as well. They
            take about 2, 7 and 22 times as long as the batches through the model; the latter two keep all batches.
        widths: let hidden features, and those of attention heads, become fewer where that is better than lower ranks;
            with factors="sensitivity" and allocation="budget".
        factors: None for what the effort means; "activations" for the least output error over the calibration data;
            "sensitivity" for the least output error that the model's own answer minds, by gradients of a label-free
            loss (`sensitivity`); "air" for an output error in which every weight counts by its influence on the loss
            (`Refine`); "svd" for the weights alone.
        allocation: how the budget is spread over the sites, "budget" (least total loss of energy), "uniform" (same
            share of each site's cost) or "energy" (same share of each site's energy); or, without a budget, explicit
            {site: rank}, or the `Plan` of a model of the same architecture: its ranks and widths, not its values.
        energy: with allocation="energy", the share of energy to keep in each site, in place of a budget.
        centred: move the mean of what is dropped into the bias.
        split: let the parts of fused projections, as of query, key and value, have factors of their own where that
            loses less at the same budget; not with factors="air".
        fold_batchnorm: fold BatchNorm into the layer before it first.
        include, exclude: glob patterns of site names.
        strict: a budget below what is reachable is an error; False takes the closest reachable model instead.
        capture: "symbolic_trace", "export", or "auto", which tries them in this order (`balf_fx.capture`).
        refit: None for what the effort means, with factors="sensitivity"; else whether to solve every layer again, on
            the input that it gets in the compressed model (`passes.Refit`): True or "full" for all of it; "up" for the
            left factors and biases, which is several times faster and recovers less. Keeps all batches in memory; not
            with factors="air".
        memory: bytes that intermediate values may take. A batch that needs more runs in pieces, if the model treats its
            samples one by one; in a refit, values of other batches wait in temporary files (in TMPDIR) beyond it.
        loss: with factors="sensitivity" or "air", `loss(output, batch)`: a scalar that is to stay small, in place of
            the label-free one.
        forward: `forward(model, batch)`, called in place of the rules for batches.
        seed: of the random probes.
        progress: show progress bars on stderr.

    Returns:
        A GraphModule of stock modules. Where site `name` was given a rank it holds `name.0` and `name.1`; everything
        else keeps its name. `balf_fx.report` tells what was done.

    Raises:
        BalfError: see `balf_fx.errors`; the message says what to do.
    """
    meant, refits = settings_of(effort)
    factors = meant if factors is None else factors
    refit = refits and factors == "sensitivity" if refit is None else refit
    score, allocate = _convert_passes(flops, params, factors, allocation, energy, centred, split, strict, progress)
    _check_refit(factors, bool(refit))
    forward = forward or forward_for(model)
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=cuda_devices(model)):
        # 1. The first batch tells how the model is called and what it costs.
        batches = iterate(calib_batches)
        first = next(batches, None)
        if first is None:
            raise CalibrationError("there are no calibration batches: pass at least one, or a fresh iterator")
        # 2. Capture the graph, fold BatchNorm, find the sites and put observers beside them.
        prepared = prepare(
            model,
            first,
            fold_batchnorm=fold_batchnorm,
            include=include,
            exclude=exclude,
            factors=factors,
            widths=widths,
            capture=capture,
            forward=forward,
        )
        # 3. Calibrate: let the batches flow through.
        keep = refit or factors == "sensitivity"
        seen = [first, *batches] if keep else itertools.chain([first], batches)
        if factors != "svd":
            calibrate(prepared, seen, loss=loss, memory=memory, forward=forward, seed=seed, progress=progress)
        # 4. Score every rank and width, solve the budget, refit the layers, rewrite the graph.
        mode: RefitMode | None = ("full" if refit is True else refit) or None
        return _convert(prepared, score, allocate, seen if keep else (), forward, mode, memory, loss)


def settings_of(effort: Effort) -> tuple[Factors, bool]:
    """The factors that an effort means, and whether there is a refit."""
    if effort not in get_args(Effort):
        raise OptionError(f"effort is {', '.join(map(repr, get_args(Effort)))}, not {effort!r}")
    return "activations" if effort == "fast" else "sensitivity", effort == "best"


def prepare(
    model: nn.Module,
    example: Any,
    *,
    fold_batchnorm: bool = True,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    factors: Factors | Collection[Factors] = "activations",
    sensitivity: bool = False,
    widths: bool = True,
    capture: CaptureMethod = "auto",
    forward: Forward | None = None,
) -> fx.GraphModule:
    """A graph with observers beside its sites: calling it, as the model is called, calibrates.

    Args:
        model, fold_batchnorm, include, exclude, capture, forward: as in `compile`.
        example: one batch; it is run, but not counted as calibration.
        factors: what `convert` is to be able to make, one or several; "activations" and "svd" always are. The others
            need gradients: `calibrate` runs them, a plain call of the graph does not.
        sensitivity: the same as "sensitivity" among `factors`.
        widths: with it, find out what fewer features would lose.

    Raises:
        NoSiteError: nothing in the model can be factorized.
    """
    wanted = {factors} if isinstance(factors, str) else set(factors)
    unknown = wanted - set(get_args(Factors))
    if unknown:
        raise OptionError(f"factors are {', '.join(map(repr, get_args(Factors)))}, not {', '.join(map(repr, unknown))}")
    with torch.inference_mode(False), torch.no_grad():
        graph_module = capture_graph(model, example, forward, capture)
        origin = dataclasses.replace(
            graph_record(graph_module).origin,
            fold_batchnorm=fold_batchnorm,
            include=None if include is None else tuple(include),
            exclude=tuple(exclude),
        )
        record_graph(graph_module, origin=origin)
        if fold_batchnorm:
            FoldBatchNorm()(graph_module)
        Annotate(include, exclude)(graph_module)
        if not sites(graph_module):
            refusals = [mark.refusal for mark in map(annotation, graph_module.graph.nodes) if mark.refusal is not None]
            listed = "; ".join(f"{refusal.name}: {refusal}" for refusal in refusals) or "it has no parameters in use"
            raise NoSiteError(f"nothing in {type(model).__name__} can be factorized ({listed})")
        observes_gradients = sensitivity or "sensitivity" in wanted
        if observes_gradients and widths:
            FindWidths()(graph_module)
        InsertObservers(observes_gradients, "air" in wanted)(graph_module)
        return graph_module


def calibrate(
    prepared: fx.GraphModule,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    memory: int = MEMORY,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Run batches through a prepared graph, with gradients where it observes these.

    Args:
        loss, memory, forward, seed, progress: as in `compile`.

    Raises:
        CalibrationError: a batch cannot be run, or holds NaN or infinity at a site.
    """
    forward = forward or forward_for(prepared)
    generator = torch.Generator().manual_seed(seed)
    wants_gradients = any(isinstance(module, SensitivityObserver | InfluenceObserver) for module in prepared.modules())
    for index, batch in enumerate(tqdm(batches, desc="calibrating", unit="batch", disable=not progress, leave=False)):
        if wants_gradients:
            observe_gradients(prepared, batch, forward, index, generator, loss, memory)
        else:
            run_batch(prepared, batch, forward, index)


def convert(
    prepared: fx.GraphModule,
    *,
    flops: float | None = None,
    params: float | None = None,
    factors: Factors | None = None,
    allocation: Method | Mapping[str, Rank] | Plan = "budget",
    energy: float | None = None,
    centred: bool = True,
    split: bool = True,
    strict: bool = True,
    batches: Iterable[Any] = (),
    refit: bool | RefitMode | None = None,
    loss: Loss | None = None,
    memory: int = MEMORY,
    forward: Forward | None = None,
    progress: bool = True,
) -> fx.GraphModule:
    """Compress a calibrated graph; it stays as it is, for other budgets or more calibration.

    Args:
        prepared: from `prepare`, after calibration.
        factors: None for the best that the calibration allows.
        batches: the calibration batches again, to measure allocations and refit the layers on them; none: neither.
        refit: None for a full one where there are batches, unless factors="air".
        Everything else: as in `compile`.

    Raises:
        NotCalibratedError: the graph holds no observers, or none of what the factors need, or they have seen nothing.
        BudgetError: the budget cannot be reached; names the smallest that can.
    """
    if factors is None:
        observers = [module for module in prepared.modules() if isinstance(module, SensitivityObserver)]
        factors = "sensitivity" if any(observer.sample is not None for observer in observers) else "activations"
    score, allocate = _convert_passes(flops, params, factors, allocation, energy, centred, split, strict, progress)
    batches = list(batches)
    if refit is None:
        refit = bool(batches) and factors != "air"
    _check_refit(factors, bool(refit))
    if refit and not batches:
        raise OptionError("a refit needs the calibration batches again: pass batches=")
    mode: RefitMode | None = ("full" if refit is True else refit) or None
    with torch.inference_mode(False), torch.no_grad():
        return _convert(prepared, score, allocate, batches, forward or forward_for(prepared), mode, memory, loss)


def _convert_passes(
    flops: float | None,
    params: float | None,
    factors: Factors,
    allocation: Method | Mapping[str, Rank] | Plan,
    energy: float | None,
    centred: bool,
    split: bool,
    strict: bool,
    progress: bool,
) -> tuple[Score, Allocate | Follow]:
    """The passes that these options mean; checks them before any work is done."""
    sensitive = factors == "sensitivity"
    if isinstance(allocation, Plan):
        given = [
            name for name, value in (("flops", flops), ("params", params), ("energy", energy)) if value is not None
        ]
        if given:
            raise OptionError(f"a plan leaves nothing to a budget: drop {', '.join(given)}")
        return Score(factors, centred, split, progress=progress), Follow(allocation)
    allocate = allocate_for(allocation, flops=flops, params=params, energy=energy, strict=strict, sensitive=sensitive)
    return Score(factors, centred, split, progress=progress), allocate


def _check_refit(factors: Factors, refit: bool) -> None:
    if refit and factors == "air":
        raise OptionError("refit would undo what factors='air' is for: drop one of them")


def _convert(
    prepared: fx.GraphModule,
    score: Score,
    allocate: Allocate | Follow,
    batches: Iterable[Any],
    forward: Forward,
    refit: RefitMode | None,
    memory: int,
    loss: Loss | None,
) -> fx.GraphModule:
    if not isinstance(prepared, fx.GraphModule) or not hasattr(prepared, OBSERVERS):
        raise NotCalibratedError(
            "this is no prepared graph: call balf_fx.prepare first and run a few batches through it"
        )
    batches = [
        piece
        for index, batch in enumerate(batches)
        for piece in pieces_for_walk(prepared, batch, forward, index, memory)
    ]
    score(prepared)
    if score.factors == "sensitivity":
        ScoreWidths(score.damping)(prepared)
    else:
        record_graph(prepared, width_curves=(), widths_scored_with=())
    chooses = isinstance(allocate, Allocate) and allocate.method == "budget" and allocate.ranks is None
    if isinstance(allocate, Allocate) and chooses and score.factors == "sensitivity" and batches:
        trial = plan_trial(prepared, batches, forward, refit is not None, memory, loss)
        graph_module = allocate_faithfully(prepared, allocate, trial)
    else:
        graph_module = copy.deepcopy(prepared)
        allocate(graph_module)
    if score.factors == "air":
        Refine(progress=score.progress)(graph_module)
    if refit is not None:
        Refit([placeholder_values(prepared, batch, forward) for batch in batches], refit, memory)(graph_module)
    rewrite(graph_module)
    return finish(graph_module, Plan.of(graph_module))
