"""What calibration and compression take, against plain forward passes over the calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from subjects import FLOPS, Subject
from timing import Measure
from torch import Tensor, nn

import balf_fx

PASSES = "forward passes"
ROUNDS = {
    ("ResNet-20", "fast"): 5,
    ("ResNet-20", "balanced"): 3,
    ("ResNet-20", "best"): 3,
    ("ResNet-18", "fast"): 5,
}


def _run(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(batch)


@pytest.mark.parametrize("name", ["ResNet-20", "ResNet-18"])
def test_calibration(name: str, subject: Callable[[str], Subject], measure: Measure) -> None:
    """Statistics of outputs, as effort "fast" gathers them."""
    found = subject(name)
    prepared = balf_fx.prepare(found.model, found.calibration[0])
    forward = {PASSES: lambda: _run(found.model, found.calibration)}
    calibrate = lambda: balf_fx.calibrate(prepared, found.calibration, progress=False)  # noqa: E731
    measure(f"calibration, {name}", calibrate, 5, forward)


@pytest.mark.parametrize(("name", "effort"), ROUNDS)
def test_compression(name: str, effort: str, subject: Callable[[str], Subject], measure: Measure) -> None:
    """All of `balf_fx.compile`, calibration included."""
    found = subject(name)
    forward = {PASSES: lambda: _run(found.model, found.calibration)}

    def compress() -> None:
        balf_fx.compile(found.model, found.calibration, flops=FLOPS, effort=effort, progress=False)

    measure(f"compression, {name}", compress, ROUNDS[name, effort], forward, warmup=1 if effort == "fast" else 0)
