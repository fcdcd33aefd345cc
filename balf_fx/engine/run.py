"""Calibrate an observed program and compress it, to a budget or as far as a limit on its disagreement allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from balf_fx.calibration.batches import Calibration, Stream
from balf_fx.calibration.observers import SensitivityObserver
from balf_fx.checkpoint.journal import NO_JOURNAL, Journal
from balf_fx.engine.agreement import give_alike
from balf_fx.engine.blockwise import calibrate_in_blocks, paged
from balf_fx.engine.certify import certify
from balf_fx.engine.compress import calibrate, convert
from balf_fx.engine.program import Program
from balf_fx.engine.settings import Settings
from balf_fx.engine.stages import work_of
from balf_fx.errors import NotCalibratedError, OptionError
from balf_fx.graph.plan import Plan
from balf_fx.progress import SILENT, Progress
from balf_fx.refit.offload import Shelved


def run(
    program: Program,
    settings: Settings,
    calibration: Calibration,
    *,
    stream: Stream | None = None,
    lenient: bool = False,
    progress: Progress = SILENT,
    journal: Journal = NO_JOURNAL,
) -> tuple[Program, Plan]:
    """Calibrate an observed program and convert it.

    Args:
        stream: batches to calibrate on, read once, where only the samples that it keeps are needed later.
        lenient: as in `calibrate`.
        journal: has what a run finished before it was killed.
    """
    calibration = paged(program, settings, _with_memory(calibration, journal), lenient)
    work = work_of(program, settings, calibration.batches, 0 if stream is None else stream.count)
    first = work.calibrating if calibration.pages is None else work.calibrating + work.scoring
    shares = [first, work.scoring + work.trying + work.solving]
    calibrating, converting = progress.spans(shares, ["calibrating", "compressing"])
    if settings.calibrates:
        batches = calibration.batches if stream is None else stream
        if calibration.pages is not None:
            calibrate_in_blocks(program, settings, batches, calibration, work, calibrating, journal)
        else:
            counted = calibrate(program, batches, calibration, lenient, calibrating, journal)
            calibration = calibration.only(counted) if lenient else calibration
        if stream is not None:
            calibration = dataclasses.replace(calibration, batches=stream.kept, seen=sum(stream.sizes))
    return solve(program, settings, calibration, converting, journal, once=True)


def solve(
    program: Program,
    settings: Settings,
    calibration: Calibration,
    progress: Progress = SILENT,
    journal: Journal = NO_JOURNAL,
    once: bool = False,
) -> tuple[Program, Plan]:
    """Compress a calibrated program to the budget, or as far as a limit on its disagreement allows.

    Arguments as in `compress.convert`.
    """
    chosen = partial(convert, once=once) if settings.limit is None else certify
    compressed, plan = chosen(program, settings, _with_memory(calibration, journal), progress, journal)
    give_alike(compressed, plan, calibration.group)
    return compressed, plan


def _with_memory(calibration: Calibration, journal: Journal) -> Calibration:
    """Calibration with the memory of the run that was killed, since a share of what is free may be another one now."""
    group = calibration.group
    memories = journal.cached("memory", lambda: group.gathered(calibration.memory))
    return dataclasses.replace(calibration, memory=memories[group.rank])


def keep(given: Any, batches: Iterable[Any], memory: int, closing: ExitStack) -> Sequence[Any]:
    """All batches, for reading them again; batches from an iterator are kept in files beyond the memory limit."""
    if isinstance(given, torch.Tensor | Mapping | list | tuple):
        return list(batches)
    shelved = closing.enter_context(Shelved(memory))
    for batch in batches:
        shelved.append(batch)
    return shelved


def with_factors(settings: Settings, prepared: nn.Module) -> Settings:
    """The settings of a conversion, whose factors are weighted by sensitivity where gradients were observed.

    Raises:
        NotCalibratedError: such factors are asked for, but gradients were not observed.
    """
    if settings.factors not in (None, "sensitivity") or (settings.factors is None and settings.effort == "fast"):
        return settings
    observers = [module for module in prepared.modules() if isinstance(module, SensitivityObserver)]
    observed = any(half is not None for observer in observers for half in observer.halves)
    if settings.factors is not None:
        if observed or any(observer.batches for observer in observers):  # where none flow, the output error is used
            return settings
        raise NotCalibratedError(
            "factors='sensitivity' needs gradients, and none were observed: pass factors='sensitivity' to "
            "balf_fx.prepare, too, and the batches to balf_fx.calibrate"
        )
    return dataclasses.replace(settings, factors="sensitivity" if observed else "activations")


def with_refit(settings: Settings, batches: bool) -> Settings:
    """The settings of a conversion, in which only batches allow a refit.

    Args:
        batches: whether there are any.

    Raises:
        OptionError: a refit is asked for without batches.
    """
    if settings.refit is None:
        refit = batches and settings.effort == "best" and settings.chosen_factors != "air"
        settings = dataclasses.replace(settings, refit=refit)
    if settings.refit and not batches:
        raise OptionError("a refit needs the calibration batches: pass batches=")
    return settings
