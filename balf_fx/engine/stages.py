"""How long each stage of compression takes relative to the others, for the shares of the progress bar.

The unit is one floating-point operation of a matrix product. The factors were measured on one core: eigenvectors of
an m x m matrix take as long as about 200 m^3 such operations, and calibration with gradients as long as four forward
passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from balf_fx.calibration.batches import samples_of
from balf_fx.engine.program import Program
from balf_fx.engine.settings import Settings
from balf_fx.graph.annotation import annotation, graph_record, sites

TRIAL_SAMPLES = {"fit": 64, "evaluation": 128}
"""The most samples on which an allocation is refitted for a trial, and on which it is then measured. Twice as many to
refit on choose allocations that are no better."""

FEW_SAMPLES = 32
"""The most samples on which allocations are measured at the fast effort, without gradients."""


def few_samples(samples: int) -> int:
    """The number of samples for trials at the fast effort, which then take a small part of the time of calibration."""
    return max(min(samples // 16, FEW_SAMPLES), 4)


_EIGENVECTORS = 200.0
_GRADIENTS, _OBSERVED = 4.0, 1.5  # forward passes
_REFIT = {"full": 8.0, "up": 4.0}  # forward passes; trials take "up"
_CHOLESKY = 7.0 / 3.0  # one factorization for each strength of the ridge, and one for all samples
_TRIALS = 5
_FAST_TRIALS = 3  # two allocations, and the original


@dataclass(frozen=True)
class Work:
    """The number of operations in each stage."""

    calibrating: float
    scoring: float
    trying: float
    solving: float


def work_of(program: Program, settings: Settings, batches: Sequence[Any], streamed: int = 0) -> Work:
    """Estimate the work of each stage.

    Args:
        batches: the calibration batches that are kept.
        streamed: the number of those that are read once.
    """
    totals, example = program.totals(), _example_samples(program)
    samples = sum(map(samples_of, batches)) + streamed * example or 1
    forward = float(totals.flops) * samples / example
    gradients = settings.chosen_factors in ("sensitivity", "air")
    cubes = cholesky = 0.0
    for graph_module in program.graph_modules:
        for site in sites(graph_module):
            cubes += float(site.full_rank) ** 3 * site.groups
            cholesky += _CHOLESKY * float(site.in_features) ** 3 * site.groups
        for width in graph_record(graph_module).widths if gradients and settings.widths else ():
            cubes += float(width.features) ** 3
    mode = settings.refit_mode
    sensitive = settings.chosen_factors == "sensitivity"
    trials, most = (_TRIALS, TRIAL_SAMPLES["evaluation"]) if sensitive else (_FAST_TRIALS, FEW_SAMPLES)
    fit = 0.0 if mode is None else min(TRIAL_SAMPLES["fit"], most, samples / 2)
    tried = trials * (_REFIT["up"] * fit + min(most, samples - fit)) / samples * forward
    return Work(
        calibrating=(_GRADIENTS if gradients else _OBSERVED) * forward,
        scoring=_EIGENVECTORS * cubes,
        trying=tried if settings.measures else 0.0,
        solving=0.0 if mode is None else _REFIT[mode] * forward + (cholesky if mode == "full" else 0.0),
    )


def _example_samples(program: Program) -> int:
    """The number of samples in the batch on which FLOPs were counted."""
    placeholders = (
        annotation(node).shape
        for graph_module in program.graph_modules
        for node in graph_module.graph.find_nodes(op="placeholder")
    )
    return max((shape[0] for shape in placeholders if shape), default=1) or 1
