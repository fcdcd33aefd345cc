"""What calibration and compression take, against plain forward passes over the calibration batches.

Compression is timed by stage, too, and large models also report the most memory above their own in a fresh process:
`python -m pytest benchmarks/bench_compression.py --large -k "Llama and fast"`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from memory import footprint_apart
from stages import StageClock
from subjects import FLOPS, Subject
from timing import Measure

import balf_fx

PASSES = "forward passes"
LARGE = (
    "ResNet-50",
    "ViT-B",
    "Llama-100M",
    "Llama-100M-bfloat16",
    "ResNet-18, 256 images",
    "ResNet-50, 256 images",
    "ViT-B, 256 images",
)
ROUNDS = {
    ("ResNet-20", "fast"): 5,
    ("ResNet-20", "balanced"): 3,
    ("ResNet-20", "best"): 3,
    ("ResNet-18", "fast"): 5,
    ("ResNet-18", "balanced"): 2,
    ("ResNet-18", "best"): 2,
    **dict.fromkeys(itertools.product(LARGE, ("fast", "balanced", "best")), 1),
}


@pytest.mark.parametrize("name", ["ResNet-20", "ResNet-18"])
def test_calibration(name: str, subject: Callable[[str], Subject], measure: Measure) -> None:
    """Statistics of outputs, as effort "fast" gathers them."""
    found = subject(name)
    prepared = balf_fx.prepare(found.model, found.calibration[0])
    forward = {PASSES: found.run}
    calibrate = lambda: balf_fx.calibrate(prepared, found.calibration, progress=False)  # noqa: E731
    measure(f"calibration, {name}", calibrate, 5, forward)


@pytest.mark.parametrize(("name", "effort"), ROUNDS)
def test_compression(
    name: str, effort: str, subject: Callable[[str], Subject], measure: Measure, request: pytest.FixtureRequest
) -> None:
    """All of `balf_fx.compile` by stage, calibration included."""
    _skip_if_unwanted(name, request)
    found, clock = subject(name), StageClock()
    forward = {PASSES: found.run}

    @clock.around
    def compress() -> None:
        balf_fx.compile(found.model, found.calibration, flops=FLOPS, effort=effort, progress=False)

    rounds = ROUNDS[name, effort]
    warmup = 1 if effort == "fast" and rounds > 1 else 0
    measure(f"compression, {name}", compress, rounds, forward, warmup=warmup, clock=clock)


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
@pytest.mark.parametrize("name", LARGE)
def test_memory(name: str, effort: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    """The most memory above the model's own, in a process that does nothing else; the time is that of the process."""
    _skip_if_unwanted(name, request)
    found = benchmark.pedantic(lambda: footprint_apart(name, effort), rounds=1)
    benchmark.group = f"memory, {name}"
    benchmark.extra_info["gib"] = asdict(found)


def _skip_if_unwanted(name: str, request: pytest.FixtureRequest) -> None:
    if name in LARGE and not request.config.getoption("--large"):
        pytest.skip("it takes minutes: pass --large")
    if name.startswith("Llama"):
        pytest.importorskip("transformers")
