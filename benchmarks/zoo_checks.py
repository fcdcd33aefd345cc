"""What the zoo checks: a model captured, compressed and compared with the original."""

from __future__ import annotations

import copy
import itertools
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from common import Batch, count_flops
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo_subject import Case, Source, Subject, run

import balf_fx
from balf_fx.errors import BudgetError

BUDGET = 0.6
TOLERANCE = 1e-4
"""Largest deviation of the dense graph from the model, relative to the model's largest output."""

EXACT_TOLERANCE = 1e-9
"""The same in float64, for models in which float32 alone deviates by more: random weights make some of them chaotic."""

_MOVED = 0.01
"""The share of the FLOPs by which tokens may move between experts whose costs differ."""


@dataclass(frozen=True)
class Row:
    """What was found out about one model; None where it was not reached.

    Attributes:
        options: keyword arguments that make the model smaller than its name says.
        input: the shapes of the first calibration batch.
        captured: "symbolic_trace" or "export".
        flops_in_sites, flops_refused: shares of the model's FLOPs, the latter by reason.
        minimum: the smallest budget that factorization can reach, where that is above what was asked for.
        flops_kept: share of the FLOPs, counted on the compressed model.
        spread: by how much the model's outputs differ between samples, relative to the largest of them.
        deviation, relative_deviation: of the outputs at budget 1 from the model's own, over all of its batches.
        exact_deviation: relative, of the model and its graph in float64, where rounding in float32 adds up to more
            than the tolerance, as it does in deep models with random weights.
        compile_deviation: relative, of torch.compile's outputs from the compressed model's own.
        problems: one for each check that failed, "check: exception: first line of its message"; empty for success.
    """

    source: Source
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    params: int | None = None
    input: str | None = None
    captured: str | None = None
    flops_in_sites: float | None = None
    flops_refused: Mapping[str, float] = field(default_factory=dict)
    minimum: float | None = None
    flops_kept: float | None = None
    spread: float | None = None
    deviation: float | None = None
    relative_deviation: float | None = None
    exact_deviation: float | None = None
    compile_deviation: float | None = None
    seconds: float = 0.0
    problems: tuple[str, ...] = ()


class CheckError(Exception):
    """A model does not do what balf_fx promises."""


class Examination:
    """Collects what is found out about one model."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.problems: list[str] = []

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Note what the block raises as a problem and go on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the sweep is there to see what models and passes raise
            self.problems.append(f"{name}: {type(error).__name__}: {first_line(error)}")

    def row(self, case: Case, seconds: float) -> Row:
        facts = {"seconds": round(seconds, 1), "problems": tuple(self.problems)}
        return Row(case.source, case.name, dict(case.options), **self.found, **facts)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the paths of this machine."""
    lines = str(error).strip().splitlines()
    return re.sub(r"\S*/site-packages/", "", lines[0])[:300] if lines else ""


def examine_subject(subject: Subject, examination: Examination, compiled: bool = False) -> None:
    """Capture, compress and compare."""
    model, found, check = subject.model, examination.found, examination.check
    found["params"] = sum(parameter.numel() for parameter in model.parameters())
    calibration = [subject.batch(2), subject.batch(2), *(other(2) for other in subject.others)]
    found["input"] = " ".join("x".join(map(str, leaf.shape)) for leaf in pytree.tree_leaves(calibration[0]))
    dense = small = None
    with check("original"):
        outputs = run(model, calibration[0])
        require_finite(outputs)
        found["spread"] = _spread(outputs)
        _require(found["spread"] >= 10 * TOLERANCE, "outputs hardly depend on the input")
    before = fingerprint(model)  # after the first call, since some models keep what they compute in buffers
    with check("compile"):
        prepared = balf_fx.prepare(model, calibration[0], factors="sensitivity")
        balf_fx.calibrate(prepared, calibration, progress=False)
        dense = balf_fx.convert(prepared, flops=1.0, progress=False)
        found.update(_coverage(balf_fx.report(dense)))
        small, found["minimum"] = _compress(prepared)
        del prepared
    with check("untouched"):
        _require(fingerprint(model) == before, "the original's parameters, buffers or modes have changed")
    if dense is not None:
        with check("dense"):
            found.update(_deviations(subject, dense))
    if small is not None:
        with check("budget"):
            found["flops_kept"] = _flops_kept(model, small, calibration[0], found["minimum"] or BUDGET)
        with check("small"):
            _check_small(subject, small)
    if small is not None and compiled:
        with check("torch.compile"):
            found["compile_deviation"] = _compiled_deviation(small, calibration[0])


def _coverage(report: Any) -> dict[str, Any]:
    refused = {reason: round(share, 4) for reason, share in report.flops_refused.items() if share}
    return {
        "captured": report.captured,
        "flops_in_sites": round(report.flops_in_sites, 4),
        "flops_refused": dict(sorted(refused.items(), key=lambda item: -item[1])),
    }


def _compress(prepared: Any) -> tuple[nn.Module, float | None]:
    """The compressed model, and the smallest reachable budget where ours is out of reach."""
    try:
        return balf_fx.convert(prepared, flops=BUDGET, progress=False), None
    except BudgetError as error:
        return balf_fx.convert(prepared, flops=BUDGET, strict=False, progress=False), error.minimum


def _flops_kept(model: nn.Module, small: nn.Module, batch: Batch, budget: float) -> float:
    """Counted on both models.

    A layer of experts, of which some keep their matrices, costs what the tokens cost that the compressed model sends to
    these: a report counts those that the original sends there.
    """
    before, after = count_flops(model, batch), count_flops(small, batch)
    said = balf_fx.report(small)
    moved = _MOVED if any(row.kind == "experts" for row in said.sites) else 0.0
    _require(after <= (budget + moved) * before, f"{after / before:.2%} of the FLOPs are kept")
    _require(
        before == said.flops_before and abs(after - said.flops_after) <= moved * before,
        f"the report counts {said.flops_after:,} of {said.flops_before:,} FLOPs, not {after:,} of {before:,}",
    )
    return round(after / before, 4)


def _deviations(subject: Subject, dense: nn.Module) -> dict[str, float]:
    """Between the model and its dense graph, on new data."""
    batches = subject.batches()
    largest, relative = _largest_deviations(subject.model, dense, batches)
    found = {"deviation": largest, "relative_deviation": relative}
    if relative > TOLERANCE:
        model = copy.deepcopy(subject.model).double()
        batches = [pytree.tree_map_only(Tensor, _in_double, batch) for batch in batches]
        _, found["exact_deviation"] = _largest_deviations(model, balf_fx.prepare(model, batches[0]), batches)
        _require(
            found["exact_deviation"] <= EXACT_TOLERANCE,
            f"outputs at budget 1 deviate by {relative:.2g}, and in float64 by {found['exact_deviation']:.2g}",
        )
    return found


def _largest_deviations(model: nn.Module, other: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    pairs = [deviation(run(model, batch), run(other, batch)) for batch in batches]
    largest, relative = (max(values) for values in zip(*pairs, strict=True))
    return largest, relative


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _check_small(subject: Subject, small: nn.Module) -> None:
    for batch in subject.batches():
        got = run(small, batch)
        require_finite(got)
        wanted = [leaf.shape for leaf in run(subject.model, batch)]
        _require([leaf.shape for leaf in got] == wanted, f"shapes {[leaf.shape for leaf in got]} for {wanted}")


def _compiled_deviation(small: nn.Module, batch: Batch) -> float:
    torch._dynamo.reset()
    _, relative = deviation(run(small, batch), run(torch.compile(small), batch))
    _require(relative <= TOLERANCE, f"torch.compile's outputs deviate by {relative:.2g}")
    return relative


def deviation(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> tuple[float, float]:
    """The largest absolute difference, and the largest relative to the largest wanted value of the same tensor."""
    absolute = relative = 0.0
    for want, have in zip(wanted, got, strict=True):
        _require(want.shape == have.shape, f"an output of shape {tuple(have.shape)} for {tuple(want.shape)}")
        difference = float((want.double() - have.double()).abs().max())
        _require(math.isfinite(difference), "an output is NaN or infinite")
        absolute = max(absolute, difference)
        relative = max(relative, difference / max(float(want.abs().max()), torch.finfo(torch.float32).tiny))
    return absolute, relative


def _spread(outputs: Sequence[Tensor]) -> float:
    """How far outputs differ between samples, relative to the largest."""
    floats = [leaf.double() for leaf in outputs if leaf.is_floating_point() and leaf.dim() and len(leaf) > 1]
    return max((deviation([leaf[:-1]], [leaf[1:]])[1] for leaf in floats), default=0.0)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Checksums of all parameters and buffers, and which modules are in training mode."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    sums = {name: zlib.crc32(tensor.detach().contiguous().numpy()) for name, tensor in tensors}
    return {**sums, "training": [name for name, module in model.named_modules() if module.training]}


def require_finite(outputs: Iterable[Tensor]) -> None:
    """Raise where there is nothing, NaN or infinity in the outputs."""
    leaves = list(outputs)
    _require(bool(leaves), "no tensors come out")
    _require(all(bool(torch.isfinite(leaf).all()) for leaf in leaves), "outputs are not finite")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckError(message)
