"""What `torch.compile(model, backend="balf")` costs: a calibration call, the switch, and a call ever after.

python benchmarks/backend.py --json benchmarks/results/backend.json

All contenders are called in turn on one batch within one process, and ratios are medians over rounds of the ratio
within a round. Weights are random: the cost depends on shapes alone. The switch is timed once, as the call that makes
it, without caches of inductor and after it has compiled something else; next to it `balf_fx.compile` with the first
call of what it returns, and the first call of the dense model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch._inductor.config
from common import write_json
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50, vit_b_16
from tqdm import tqdm

import balf_fx
from balf_fx.backend import balf

FLOPS = 0.55
EAGER, CALIBRATION, INDUCTOR = "eager", "calibration call", "plain inductor"
BACKEND, OFFLINE = "after the switch", "torch.compile(balf_fx.compile(...))"


@dataclass(frozen=True)
class Case:
    """A model and the batch it is called with."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


CASES = {
    case.name: case
    for case in (
        Case("ResNet-18", resnet18, (8, 3, 224, 224)),
        Case("ResNet-18, one image", resnet18, (1, 3, 64, 64)),
        Case("ResNet-50", resnet50, (8, 3, 224, 224)),
        Case("ViT-B/16", vit_b_16, (4, 3, 224, 224)),
    )
}


@dataclass(frozen=True)
class Cost:
    """Medians over rounds: of seconds, and of the ratios to eager, plain inductor and OFFLINE in the same round."""

    seconds: float
    to_eager: float
    to_inductor: float
    to_offline: float


@dataclass(frozen=True)
class Switch:
    """Seconds: of the call that switches, of OFFLINE's compression and first call, of plain inductor's first call."""

    backend: float
    offline: float
    inductor: float


def contenders(case: Case, inner: str) -> tuple[dict[str, Callable[[Tensor], Any]], Tensor, Switch]:
    """Everything that is timed, compiled and warm."""
    torch.compiler.reset()
    torch.manual_seed(0)
    torch.compile(nn.Linear(8, 8), backend=inner)(torch.randn(8, 8))  # compilers start up
    model = case.build().eval()
    batch = torch.randn(case.shape)
    calibrating = torch.compile(model, backend=balf, options=_options(1 << 30, inner))
    calibrating(batch)
    switched = torch.compile(model, backend=balf, options=_options(1, inner))
    switched(batch)
    backend = seconds(switched, batch)
    plain = torch.compile(model, backend=inner)
    inductor = seconds(plain, batch)
    start = time.perf_counter()
    offline = torch.compile(balf_fx.compile(model, batch, flops=FLOPS, progress=False), backend=inner)
    offline(batch)
    switch = Switch(backend, time.perf_counter() - start, inductor)
    found = {EAGER: model, CALIBRATION: calibrating, INDUCTOR: plain, OFFLINE: offline, BACKEND: switched}
    return found, batch, switch


def _options(calibration_steps: int, inner: str) -> dict[str, Any]:
    return {"flops": FLOPS, "calibration_steps": calibration_steps, "inner": inner}


def seconds(model: Callable[[Tensor], Any], batch: Tensor) -> float:
    """Of one call."""
    start = time.perf_counter()
    model(batch)
    return time.perf_counter() - start


def measure(case: Case, rounds: int, inner: str) -> tuple[dict[str, Cost], Switch]:
    """Call all contenders in turn, `rounds` times after one round to warm up."""
    with torch.no_grad():
        with torch._inductor.config.patch(force_disable_caches=True):
            models, batch, switch = contenders(case, inner)
        laps = [{name: seconds(model, batch) for name, model in models.items()} for _ in range(rounds + 1)][1:]
    costs = {
        name: Cost(
            statistics.median(lap[name] for lap in laps),
            *(statistics.median(lap[name] / lap[other] for lap in laps) for other in (EAGER, INDUCTOR, OFFLINE)),
        )
        for name in models
    }
    return costs, switch


def table(results: Mapping[Case, tuple[Mapping[str, Cost], Switch]]) -> str:
    """One line for each model and contender."""
    lines = [
        (case.name, name, *(f"{value:.4f}" for value in asdict(cost).values()))
        for case, (costs, _) in results.items()
        for name, cost in costs.items()
    ]
    headers = ("model", "call", "seconds", "to eager", "to inductor", "to offline")
    switches = [(case.name, *(f"{value:.2f}" for value in asdict(s).values())) for case, (_, s) in results.items()]
    return "\n\n".join(
        (
            tabulate(lines, headers, disable_numparse=True, colalign=("left",) * 2 + ("right",) * 4),
            tabulate(switches, ("model", "switch, s", "offline and first call, s", "plain inductor's first call, s")),
        )
    )


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True, help="Timed rounds.")
@click.option("--model", "names", type=click.Choice(list(CASES)), multiple=True, help="Only these; default: all.")
@click.option("--inner", default="inductor", show_default=True, help="Inner backend.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
def main(rounds: int, names: tuple[str, ...], inner: str, output: Path | None) -> None:
    """Measure calibration calls, the switch and what comes after it."""
    cases = [CASES[name] for name in names or CASES]
    results = {case: measure(case, rounds, inner) for case in tqdm(cases, unit="case", leave=False)}
    click.echo(table(results))
    if output is not None:
        rows = [
            {
                "model": case.name,
                "shape": case.shape,
                "switch_seconds": asdict(switch),
                **{name: asdict(cost) for name, cost in costs.items()},
            }
            for case, (costs, switch) in results.items()
        ]
        write_json(output, {"rounds": rounds, "flops": FLOPS, "inner": inner, "results": rows})


if __name__ == "__main__":
    main()
