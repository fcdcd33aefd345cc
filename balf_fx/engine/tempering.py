"""Choose one factor for the logits of a compressed program on some of the calibration samples, and apply it."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from balf_fx.calibration.batches import Calibration, run_batch
from balf_fx.calibration.outputs import find_logits, find_token_logits
from balf_fx.calibration.temperature import FACTORS, closest_to_one, row_divergences
from balf_fx.engine.blockwise import with_known_outputs
from balf_fx.engine.program import Program
from balf_fx.engine.settings import Settings
from balf_fx.engine.solving import without_observers
from balf_fx.engine.weighing import output_weights
from balf_fx.errors import CalibrationError
from balf_fx.graph.annotation import annotation
from balf_fx.graph.parameters import locate
from balf_fx.graph.scaling import returned_values, table_sizes
from balf_fx.passes import ScaleLogits

_LOGGER = logging.getLogger(__name__)
_ROWS, _SAMPLES = 2_048, 256  # rows of logits, such as tokens, that are enough, and samples with one row each
_FEWEST_SAMPLES, _FEWEST_ROWS = 8, 128  # fewer rows change nothing


def temper(
    program: Program,
    compressed: Program,
    settings: Settings,
    calibration: Calibration,
    done: Callable[[nn.Module], None] | None = None,
) -> float:
    """Multiply the logits of a compressed program by the factor that brings them closest to the original's.

    Args:
        program: the original, with the shapes of its values; it is unchanged.
        compressed: rewritten; some of its parameters are replaced.
        calibration: without batches, nothing is changed.
        done: called with the modules whose parameters are replaced.

    Returns:
        The factor; 1 if nothing was changed.
    """
    wanted = settings.temperature is not False and settings.loss is None and settings.calibrates
    if not wanted or not calibration.has_batches():
        return 1.0
    end, any_logits = _end(program, calibration.batches), settings.temperature is True
    candidates = {} if end is None else _candidates(program, compressed, end, any_logits)
    if end is None or not candidates:
        return 1.0
    few = calibration.only(_few(candidates.values(), calibration.numbered()[0]))
    try:
        measured = calibration.group.together(partial(_measure, program, compressed, candidates, few, any_logits))
    except CalibrationError as error:  # as in trials, some efforts do not require that the compressed model runs
        _LOGGER.warning("the logits keep their scale, since the compressed model does not run: %s", error)
        return 1.0
    found = calibration.group.gathered(measured)
    outputs = [each.output for each in found if len(each.rows)]
    output = outputs[0] if outputs else None
    if output is None or set(outputs) != {output}:
        return 1.0
    rows, weights = (torch.cat(parts) for parts in zip(*chain(*(each.rows for each in found)), strict=True))
    if len(rows) < _FEWEST_ROWS:
        return 1.0
    factor = closest_to_one(rows, weights)
    if factor != 1:
        graph_module = compressed.graph_modules[end]
        scale = ScaleLogits(factor, output, shared=compressed.is_traced)
        paths = scale.parameters(graph_module)
        scale(graph_module)
        if done is not None:
            for path in paths:
                done(locate(graph_module, path)[0])
    return factor


@dataclass(frozen=True)
class _Measured:
    """What one process has measured.

    Attributes:
        rows: of each batch, as in `row_divergences`; empty without batches.
        output: the index of the logits among the outputs; None if there are none that can be scaled.
    """

    rows: list[tuple[Tensor, Tensor]]
    output: int | None = None


def _measure(
    program: Program,
    compressed: Program,
    candidates: Mapping[int, tuple[int, ...]],
    calibration: Calibration,
    any_logits: bool,
) -> _Measured:
    """Run both models on the batches.

    Args:
        candidates, any_logits: as in `_candidates`.
    """
    original, found = without_observers(program), list[tuple[Tensor, Tensor]]()
    words = max(chain.from_iterable(map(table_sizes, program.graph_modules)), default=0)
    modules = [_module(each, calibration) for each in (original, compressed)]
    output: int | None = None
    for index, batch in enumerate(calibration.batches):
        wanted, given = (run_batch(module, batch, calibration.forward, index) for module in modules)
        logits = find_logits(wanted, batch) if any_logits else find_token_logits(wanted, batch, words)
        if output is None and logits is not None:
            output = next((each for each, shape in candidates.items() if _kind(shape) == _kind(logits.shape)), None)
        rows = (
            None
            if output is None
            else row_divergences(wanted, given, batch, output_weights(program, calibration, index))
        )
        if rows is None:
            return _Measured([(torch.zeros(1, len(FACTORS)), torch.zeros(1))])
        found.append(rows)
    return _Measured(found, output)


def _module(program: Program, calibration: Calibration) -> nn.Module:
    """The module that computes the outputs; block by block where the weights are in files."""
    pages = calibration.pages
    return program.module if pages is None else with_known_outputs(program, calibration, pages)


def _candidates(program: Program, compressed: Program, end: int, any_logits: bool) -> dict[int, tuple[int, ...]]:
    """The outputs of a part that have the shape of logits, alone, and can be multiplied: their indices and shapes.

    Args:
        any_logits: whether those of samples count, too, which may as well be numbers that a model predicts.
    """
    graph_module = compressed.graph_modules[end]
    placeholders = chain.from_iterable(each.graph.find_nodes(op="placeholder") for each in program.graph_modules)
    inputs = {annotation(node).shape for node in placeholders}
    others = {id(module) for each in compressed.graph_modules if each is not graph_module for module in each.modules()}
    shapes = [annotation(node).shape or () for node in returned_values(program.graph_modules[end])]
    kinds = Counter(map(_kind, shapes))
    found: dict[int, tuple[int, ...]] = {}
    for index, shape in enumerate(shapes):
        possible = (any_logits and len(shape) == 2) or (len(shape) == 3 and shape[:2] in inputs)
        if possible and kinds[_kind(shape)] == 1:
            paths = ScaleLogits(1.0, index, shared=compressed.is_traced).parameters(graph_module)
            if paths and others.isdisjoint(id(locate(graph_module, path)[0]) for path in paths):
                found[index] = shape
    return found


def _kind(shape: Sequence[int]) -> tuple[int, int]:
    """By what outputs are told apart whatever the number of samples and their length is: dimensions and classes."""
    return len(shape), shape[-1] if len(shape) else 0


def _end(program: Program, batches: Sequence[Any]) -> int | None:
    """The part that returns the output in all calls of the model; None if it is not always the same one."""
    if not program.is_traced:
        return 0
    found: set[int] = set()
    for trace in map(program.trace, batches):
        read = {link.step for step in trace for link in step.links}
        last = [step.part for index, step in enumerate(trace) if index not in read]
        found |= set(last) if len(last) == 1 else {-1}
    return found.pop() if len(found) == 1 and -1 not in found else None


def _few(shapes: Iterable[tuple[int, ...]], starts: Sequence[int]) -> list[int]:
    """The indices of the batches that have enough rows together with those before them.

    Args:
        shapes: of the logits that there may be.
        starts: the number of samples before each batch.
    """
    rows = max(math.prod(shape[1:-1]) for shape in shapes)
    most = _SAMPLES if rows == 1 else max(math.ceil(_ROWS / rows), _FEWEST_SAMPLES)
    return [index for index, start in enumerate(starts) if start < most]
