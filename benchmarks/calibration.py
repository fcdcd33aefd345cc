"""What calibration and compression cost, in time and memory, against plain forward passes over the same batches.

python benchmarks/calibration.py --json benchmarks/results/calibration.json

Weights are random: the cost depends on shapes alone. The three are timed in turn within one process, and ratios are
medians over rounds. Memory is what torch's allocator hands out, kernels' own temporaries included; unlike the
process's resident size it is the same in every run.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from cifar import ResNet20
from common import write_json
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.profiler import ProfilerActivity, profile
from torchvision.models import resnet50
from tqdm import tqdm

import balf_fx
from balf_fx.calibration.observers import CovarianceObserver

FLOPS = 0.55
PLAIN, CALIBRATION, COMPRESSION = "forward passes", "calibration", "compression"


@dataclass(frozen=True)
class Case:
    """A model and the images it is calibrated on."""

    name: str
    build: Callable[[], nn.Module]
    image: tuple[int, int, int]
    images: int
    batch_size: int
    fold_batchnorm: bool


CASES = tuple(
    Case(name, build, image, images, batch_size, fold)
    for name, build, image, images, batch_size in (
        ("ResNet-20", ResNet20, (3, 32, 32), 1024, 128),
        ("ResNet-50", resnet50, (3, 224, 224), 32, 32),
        ("ResNet-50", resnet50, (3, 224, 224), 32, 8),
    )
    for fold in (True, False)
)


@dataclass(frozen=True)
class Cost:
    """Medians of seconds and of the ratio to the plain forward passes of the same round; peaks in MiB."""

    seconds: float
    time_ratio: float
    peak_mib: float
    peak_ratio: float


def peak_bytes(task: Callable[[], object]) -> int:
    """Most bytes that torch's allocator holds at once while a task runs, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes), default=0)


def tasks(case: Case) -> dict[str, Callable[[], object]]:
    """The three things to measure, in the order in which they must run."""
    torch.manual_seed(0)
    model = case.build().eval()
    batches = torch.randn(case.images, *case.image).split(case.batch_size)
    prepared = balf_fx.prepare(model, batches[0], fold_batchnorm=case.fold_batchnorm)
    return {
        PLAIN: lambda: _run(model, batches),
        CALIBRATION: lambda: _calibrate(prepared, batches),
        COMPRESSION: lambda: balf_fx.convert(prepared, flops=FLOPS, progress=False),
    }


def _run(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(batch)


def _calibrate(prepared: fx.GraphModule, batches: Sequence[Tensor]) -> None:
    """Calibrate afresh, so that every round does the same and compression has something new to score."""
    for module in prepared.modules():
        if isinstance(module, CovarianceObserver):
            module.reset()
    balf_fx.calibrate(prepared, batches, progress=False)


def measure(case: Case, rounds: int) -> dict[str, Cost]:
    """Time all tasks in turn, `rounds` times."""
    todo = tasks(case)
    peaks = {name: peak_bytes(task) for name, task in todo.items()}  # warms up, too, and starts without statistics
    laps = [{name: _seconds(task) for name, task in todo.items()} for _ in range(rounds)]
    return {
        name: Cost(
            seconds=statistics.median(lap[name] for lap in laps),
            time_ratio=statistics.median(lap[name] / lap[PLAIN] for lap in laps),
            peak_mib=peaks[name] / 2**20,
            peak_ratio=peaks[name] / peaks[PLAIN],
        )
        for name in todo
    }


def _seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def table(results: Mapping[Case, Mapping[str, Cost]]) -> str:
    """One line for each model and task."""
    lines = [
        (
            case.name,
            f"{case.images // case.batch_size} x {case.batch_size}",
            "folded" if case.fold_batchnorm else "kept",
            task,
            *(f"{value:.2f}" for value in asdict(cost).values()),
        )
        for case, costs in results.items()
        for task, cost in costs.items()
    ]
    headers = ("model", "batches", "BatchNorm", "task", "seconds", "ratio", "peak MiB", "ratio")
    return tabulate(lines, headers, disable_numparse=True, colalign=("left",) * 4 + ("right",) * 4)


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Timed rounds.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
def main(rounds: int, output: Path | None) -> None:
    """Measure calibration and compression against plain forward passes."""
    results = {case: measure(case, rounds) for case in tqdm(CASES, unit="case", leave=False)}
    click.echo(table(results))
    if output is not None:
        rows = [
            {
                "model": case.name,
                "images": case.images,
                "batch_size": case.batch_size,
                "fold_batchnorm": case.fold_batchnorm,
                **{task: asdict(cost) for task, cost in costs.items()},
            }
            for case, costs in results.items()
        ]
        write_json(output, {"rounds": rounds, "flops": FLOPS, "results": rows})


if __name__ == "__main__":
    main()
