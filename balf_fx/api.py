"""The functions for users: compile = prepare + calibrate + convert."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import torch
from torch import fx, nn

from balf_fx.calibration.batches import (
    Calibration,
    Forward,
    Stream,
    batch_count,
    cache_arguments,
    forward_for,
    is_empty,
    iterate,
    several,
)
from balf_fx.capture.checks import check_values
from balf_fx.capture.models import cuda_devices, device_of, plain_model
from balf_fx.capture.normal_form import capture
from balf_fx.distributed.group import Group, group_of
from balf_fx.engine import compress
from balf_fx.engine.agreement import check_alike
from balf_fx.engine.checks import chosen_among
from balf_fx.engine.effects import check_effects
from balf_fx.engine.grafting import check_same, graft
from balf_fx.engine.memory import size_of
from balf_fx.engine.options import settings_from, takes_settings
from balf_fx.engine.program import Program, whole_program
from balf_fx.engine.resuming import check_batches, open_journal, with_validation
from balf_fx.engine.rewriting import finish, own_memory, with_plan
from balf_fx.engine.run import keep, run, solve, with_factors, with_refit
from balf_fx.engine.settings import Settings
from balf_fx.engine.stages import FEW_SAMPLES
from balf_fx.errors import CalibrationError, OptionError
from balf_fx.files import checkpoint, storage
from balf_fx.files.restore import Stored, recorded_call, restore, stored
from balf_fx.files.weights import with_weights
from balf_fx.graph.annotation import graph_record, record_graph
from balf_fx.graph.owners import parameters_named_once, stock_modules
from balf_fx.graph.parameters import count_parameters
from balf_fx.graph.plan import PLAN_ATTRIBUTE, Plan
from balf_fx.huggingface.registry import describe
from balf_fx.passes.score import Factors
from balf_fx.progress import progress_bar
from balf_fx.reporting.report import Report

_NOTHING = object()


@takes_settings()
def compile(model: nn.Module, calib_batches: Any, *, forward: Forward | None = None, **options: Any) -> nn.Module:
    """Make a trained model smaller and faster without fine-tuning.

    Args:
        model: any module in evaluation mode, also inside `torch.compile` or `DataParallel`. It is not changed:
            parameters, buffers, modes and random state stay the same, bit for bit.
        calib_batches: batches without labels, a few hundred samples in all: a tensor, a mapping of keyword arguments,
            or any iterable of tensors, tuples of positional arguments or mappings, including DataLoaders and one-shot
            generators. Labels in `(images, labels)` are recognised as `calibration.batches` describes. The first
            batch also sets the shapes for which FLOPs are counted; the others may have other shapes.
        forward: a function forward(model, batch) that runs the model, in place of the rules for batches.
        {options}

    Returns:
        A GraphModule of stock modules. In place of a layer `name` of lower rank stand `name.0` and `name.1` (with
        several parts, `name.1.0` and so on); other layers keep their names, and BatchNorms may be folded.
        `balf_fx.report` shows what was done. With result="module", a copy of the model in which this was done.

    Raises:
        BalfError: see `balf_fx.errors`; the message says what to do.
    """
    settings = settings_from(options).with_free()
    settings.allocate()  # checks the budget before any work is done
    check_effects(settings)
    group = group_of(device_of(model), settings.distributed)
    with ExitStack() as closing:
        for context in (torch.inference_mode(False), torch.no_grad(), group.guarded()):
            closing.enter_context(context)
        bar = closing.enter_context(progress_bar(settings.progress and group.rank == 0, "capturing"))
        model, pages = with_weights(plain_model(model), settings.safetensors)
        closing.enter_context(torch.random.fork_rng(cuda_devices(model)))
        check_values(model)
        check_alike(model, settings, group)
        forward = forward or _forward_for(model, settings)
        # 1. The first batch of all processes determines how the model is called and what it costs.
        batches = iterate(calib_batches)
        own = list(itertools.islice(batches, 1))
        first = _first_of_all(own, group)
        if first is _NOTHING:
            raise CalibrationError(
                "there are no calibration batches, or all are empty: pass at least one, or a fresh iterator"
            )
        # 2. Capture the graph, fold BatchNorm, find the sites and insert observers.
        program = whole_program(
            _prepared(model, first, forward, settings, {settings.chosen_factors}, share=True), forward
        )
        journal = open_journal(program, settings, forward, group)
        settings = with_validation(settings, journal)
        # 3. Keep the batches where something is measured or solved on them later; else read them once, as a stream.
        everything, memory = journal.checked(itertools.chain(own, batches)), settings.memory_bytes
        kept: Sequence[Any] = ()
        stream = None
        if settings.keeps_batches:
            kept = keep(calib_batches, everything, memory, closing)
        else:
            stream = Stream(everything, batch_count(calib_batches), FEW_SAMPLES if settings.measures else 0)
        finished = checkpoint.read_result(journal, group)
        if finished is not None:
            if stream is not None and settings.calibrates:
                collections.deque(stream, maxlen=0)  # a changed batch is an error, which only reading them shows
            return _rebuilt(finished, program, model)
        calibration = dataclasses.replace(_calibration(kept, forward, settings, memory, group), pages=pages)
        # 4. Calibrate, score every rank and width, solve the budget, refit the layers, rewrite the graph.
        compressed, plan = run(program, settings, calibration, stream=stream, progress=bar, journal=journal)
        # 5. Leave a plain module with its plan, or put the layers into a copy of the model.
        graph_module = compressed.graph_modules[0]
        plain = settings.result == "graph"
        small = finish(graph_module, plan) if plain else _grafted(model, graph_module, plan, first, forward)
        own_memory(small, model)
        checkpoint.write_result(journal, stored(small), group)
        return small


@takes_settings("prepare")
def prepare(
    model: nn.Module,
    example: Any,
    *,
    forward: Forward | None = None,
    factors: Factors | Collection[Factors] = "activations",
    sensitivity: bool = False,
    **options: Any,
) -> fx.GraphModule:
    """Return the model's graph with observers; calling it like the model calibrates it.

    Args:
        model, forward: as in `compile`.
        example: one batch; it is run, but not used for calibration.
        factors: the factors that `convert` shall support, one or several, whatever the effort; "activations" and "svd"
            are always supported. The others need gradients, which `calibrate` computes and a plain call of the graph
            does not; "sensitivity" is what efforts above "fast" use.
        sensitivity: the same as "sensitivity" among `factors`.
        {options}

    Raises:
        NoSiteError: nothing in the model can be factorized.
    """
    wanted: set[Factors] = set(chosen_among("factors", factors, get_args(Factors)))
    wanted |= {"sensitivity"} if sensitivity else set()
    settings = settings_from(options, "prepare")
    model, _pages = with_weights(plain_model(model), settings.safetensors)
    check_values(model)
    with torch.inference_mode(False), torch.no_grad():
        return _prepared(model, example, forward or _forward_for(model, settings), settings, wanted)


@takes_settings("calibrate")
def calibrate(
    prepared: fx.GraphModule, batches: Iterable[Any], *, forward: Forward | None = None, **options: Any
) -> None:
    """Run batches through a prepared graph, with gradients if it has observers of gradients.

    Args:
        prepared: the result of `prepare`.
        batches, forward: as `calib_batches` and `forward` in `compile`.
        {options}

    Raises:
        OptionError: an option has a wrong value.
        CalibrationError: a batch cannot be run, or holds NaN or infinity at a site.
    """
    settings = settings_from(options, "calibrate")
    compress.check_prepared(prepared)
    forward = forward or forward_for(prepared)
    group = group_of(device_of(prepared), settings.distributed)
    shown = progress_bar(settings.progress and group.rank == 0, "calibrating")
    random_state = torch.random.fork_rng(cuda_devices(prepared))
    with torch.inference_mode(False), group.guarded(), shown as bar, random_state:
        calibration = _calibration([], forward, settings, settings.memory_bytes, group)
        compress.calibrate(whole_program(prepared, forward), several(batches), calibration, progress=bar)


@takes_settings("convert", factors=None)
def convert(
    prepared: fx.GraphModule,
    *,
    batches: Iterable[Any] = (),
    forward: Forward | None = None,
    model: nn.Module | None = None,
    **options: Any,
) -> nn.Module:
    """Compress a calibrated graph; the graph itself is not changed, so it can be converted or calibrated again.

    By default, factors are the best that the calibration allows, and effort="best" refits layers if there are batches.

    Args:
        prepared: the result of `prepare`, after calibration.
        batches: the calibration batches again, to measure allocations and refit the layers on them. Without batches,
            neither is done.
        forward: as in `compile`.
        model: the model that was prepared, for result="module", which must be passed to both calls.
        {options}

    Returns:
        As `compile`.

    Raises:
        OptionError: an option has a wrong value, or needs batches or the model.
        NotCalibratedError: the graph has no observers, lacks those that the factors need, or was not calibrated.
        BudgetError: the budget cannot be reached; the message names the smallest one that can.
    """
    settings = settings_from(options, "convert").with_free()
    settings.allocate()  # checks the budget before any work is done
    compress.check_prepared(prepared)
    group = group_of(device_of(prepared), settings.distributed)
    shown = progress_bar(settings.progress and group.rank == 0, "compressing")
    random_state = torch.random.fork_rng(cuda_devices(prepared))
    with torch.inference_mode(False), torch.no_grad(), group.guarded(), shown as bar, random_state:
        # 1. What the calibration and the batches allow.
        batches = list(iterate(batches))
        settings = with_factors(settings, prepared)
        if settings.result == "module" and (model is None or graph_record(prepared).modules is None):
            raise OptionError('result="module" needs the model: pass it as model=, and result="module" to prepare, too')
        check_alike(prepared, settings, group)
        first = _first_of_all(batches, group)
        settings = with_refit(settings, first is not _NOTHING)
        # 2. Return the result at once if a checkpoint has it.
        forward_graph = forward or forward_for(prepared)
        program = whole_program(prepared, forward_graph)
        journal = open_journal(program, settings, forward_graph, group)
        settings = with_validation(settings, journal)
        check_batches(journal, batches)
        finished = checkpoint.read_result(journal, group)
        if finished is not None:
            return _rebuilt(finished, program, model)
        # 3. Score every rank and width, solve the budget, refit the layers, rewrite the graph.
        calibration = _calibration(batches, forward_graph, settings, settings.memory_bytes, group)
        compressed, plan = solve(program, settings, calibration, bar, journal)
        # 4. Leave a plain module with its plan, or put the layers into a copy of the model.
        graph_module = compressed.graph_modules[0]
        if settings.result == "graph" or model is None:
            small: nn.Module = finish(graph_module, plan)
        else:
            model, _pages = with_weights(plain_model(model), settings.safetensors)
            if first is _NOTHING:  # the model and its graph are compared on arguments in the recorded shapes
                first, forward = (), recorded_call(plan.origin, model)
            small = _grafted(model, graph_module, plan, first, forward or _forward_for(model, settings))
        checkpoint.write_result(journal, stored(small), group)
        return small


def plan(source: Any) -> Plan:
    """Return the plan of a compressed model: its ranks and widths, which can be stored and applied again.

    Args:
        source: the result of `compile`, `convert` or `load`, or of `torch.compile(..., backend="balf")`; or the path
            of what `save` or `save_pretrained` wrote, or of a .json file with the result of `Plan.to_json`.

    Raises:
        PassError: the module has no plan.
        NotCalibratedError: the backend is still calibrating; the message says how many calls were observed.
        FileError: the file is damaged, or was not written by balf_fx.
        PlanError: the plan is damaged, or of another version.
    """
    if isinstance(source, str | os.PathLike):
        return storage.read_plan(Path(source))
    return Plan.of(source) if _has_plan(source) else _stored(source).plan


def report(compressed: Any) -> Report:
    """Return a report of what balf_fx did to a model: its `plan` as readable tables.

    Args:
        compressed: as `plan` takes it.

    Raises:
        BalfError: as `plan`.
    """
    return Report.of(plan(compressed))


def save(compressed: Any, path: str | os.PathLike[str], *, shard: int | str | None = None) -> None:
    """Write a compressed model to a file; of a model that the backend compiled, only the replaced layers.

    Args:
        compressed: the result of `compile`, `convert` or `load`, which may have been fine-tuned or cast since; or the
            result of `torch.compile(..., backend="balf")`.
        path: the file, "small.safetensors" for instance; an existing file is replaced once everything is written.
        shard: the bytes of each of several files, such as "2GiB", that are written one by one to a new folder `path`.

    Raises:
        PassError: the module has no plan.
        OptionError: `shard` is no number of bytes.
        FileError: a tensor cannot be stored by safetensors, such as a quantized weight; or there is no such folder, or
            one in place of the file.
        NotCalibratedError: the backend is still calibrating.
    """
    storage.write(_stored(compressed), path, None if shard is None else size_of(shard, "shard"))


def load(
    path: str | os.PathLike[str], model: nn.Module, *, example: Any | None = None, forward: Forward | None = None
) -> nn.Module:
    """Read a compressed model from a file.

    Args:
        path: a file or a folder written by `save`.
        model: a model of the architecture that was compressed, in evaluation mode, with any weights. It is not changed,
            and the result is on its device.
        example: one batch, if the model cannot be called with tensors of ones in the shapes of the first calibration
            batch.
        forward: a function forward(model, batch), if the example needs one.

    Returns:
        The model that was saved, bit for bit: a GraphModule, or a copy of `model` with the compressed layers.

    Raises:
        FileError: the file is truncated, was changed, or was not written by balf_fx.
        PlanError: the file has another format of plans, or was written for another architecture.
    """
    found = storage.read(path)
    loaded = restore(found, model, example, forward)
    if found.plan.modules is not None:
        describe(loaded, found.plan)
    return loaded


def _has_plan(compressed: Any) -> bool:
    """Whether it is a graph, which may have a plan, or a model that has one."""
    return isinstance(compressed, fx.GraphModule) or PLAN_ATTRIBUTE in getattr(compressed, "__dict__", {})


def _stored(compressed: Any) -> Stored:
    """The plan and the tensors of a compressed model."""
    if _has_plan(compressed):
        return stored(compressed)
    from balf_fx import backend  # only here: it imports Dynamo

    return backend.plan(compressed) if backend.is_compiled(compressed) else stored(compressed)


def _prepared(
    model: nn.Module, example: Any, forward: Forward, settings: Settings, factors: set[Factors], share: bool = False
) -> fx.GraphModule:
    """The captured graph with observers (`share`: see `capture`)."""
    if is_empty(example):
        raise CalibrationError("the example batch has no samples: pass one with samples")
    graph_module = capture(model, example, forward, settings.capture, share)
    if settings.result == "module":
        unused = count_parameters(model) - count_parameters(graph_module)
        names = parameters_named_once(model)
        record_graph(graph_module, modules=stock_modules(model), parameters=names, unused=unused)
    record_graph(graph_module, origin=settings.origin(graph_record(graph_module).origin.arguments))
    compress.observe(whole_program(graph_module, forward), settings, factors)
    return graph_module


def _first_of_all(own: Sequence[Any], group: Group) -> Any:
    """The first batch of the first process that has any; `_NOTHING` if none has."""
    return next(itertools.chain.from_iterable(group.gathered(own[:1])), _NOTHING)


def _forward_for(model: nn.Module, settings: Settings) -> Forward:
    """The default way to call the model; one that becomes a model again is captured without its cache."""
    return forward_for(model, **(cache_arguments(model) if settings.result == "module" else {}))


def _grafted(model: nn.Module, graph_module: fx.GraphModule, plan: Plan, batch: Any, forward: Forward) -> nn.Module:
    """A copy of the model with the layers of a compressed graph, after a comparison of both on a batch."""
    compressed, recipes = graft(model, graph_module, plan)
    plan = dataclasses.replace(plan, modules=recipes)
    check_same(compressed, finish(graph_module, plan), batch, forward)
    describe(compressed, plan)
    return with_plan(compressed, plan)


def _rebuilt(finished: Stored, program: Program, model: nn.Module | None) -> nn.Module:
    """The result of a run that is complete."""
    compressed = checkpoint.rebuild(finished, program.graph_modules[0], model)
    describe(compressed, finished.plan)
    return compressed


def _calibration(
    batches: Sequence[Any], forward: Forward, settings: Settings, memory: int, group: Group
) -> Calibration:
    return Calibration(batches, forward, settings.loss, memory, settings.seed, settings.weights, group=group)
