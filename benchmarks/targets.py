"""How well budgets of time are met: predicted, measured by the compiler, and measured again.

python benchmarks/targets.py --threads 1 --json benchmarks/results/targets.json
python benchmarks/targets.py --threads 2 --resume --json benchmarks/results/targets.json
python benchmarks/targets.py --model MobileNetV2 --effort balanced --resume --json benchmarks/results/targets.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import click
import torch
from common import write_json
from models import load
from tabulate import tabulate
from torch import Tensor, fx, nn
from torchvision.models import resnet50
from tqdm import tqdm

import balf_fx
from balf_fx.engine.settings import Effort
from balf_fx.errors import BudgetError
from balf_fx.graph.timing import Timing
from balf_fx.latency.stopwatch import race
from balf_fx.passes import Overwrite, RemoveObservers

Case = tuple[nn.Module, Sequence[Tensor]]
SHARES = (0.8, 0.6, 0.5)
BATCHES = {"ResNet-20": 128, "MobileNetV2": 8, "ViT-Tiny": 8, "ResNet-50": 8}
"""Images in a batch."""

_ROUNDS = 15


def _trained(name: str, model: str, images: int, data: Path | None) -> Case:
    task = load(name, data=data, images=images, evaluate=1)
    return task.model, torch.cat(list(task.calibration)).split(BATCHES[model])


def _resnet50(data: Path | None) -> Case:
    del data
    torch.manual_seed(0)
    return resnet50().eval(), torch.randn(32, 3, 224, 224).split(BATCHES["ResNet-50"])


CASES: Mapping[str, Callable[[Path | None], Case]] = {
    "ResNet-20": partial(_trained, "resnet20", "ResNet-20", 512),
    "MobileNetV2": partial(_trained, "mobilenetv2", "MobileNetV2", 64),
    "ViT-Tiny": partial(_trained, "vit_tiny", "ViT-Tiny", 64),
    "ResNet-50": _resnet50,
}
"""Makes each model and its calibration batches, the first of which is timed; ResNet-50 has random weights."""


@dataclass(frozen=True)
class Row:
    """One compressed model.

    Attributes:
        asked: the share of the original's time that was asked for.
        by_operations: that of the chosen sizes, by the times of their operations.
        predicted: the same, corrected by the models that the compiler measured before.
        measured: that of the whole model, as the compiler measured it.
        again: the same, measured here afterwards.
        flops_kept: the share of the FLOPs.
        reached: whether the smallest model takes no longer.
        effort: of the compression.
    """

    model: str
    threads: int
    runner: str
    asked: float
    by_operations: float
    predicted: float
    measured: float
    again: float
    flops_kept: float
    reached: bool
    effort: Effort


def run(name: str, case: Case, asked: float, effort: Effort) -> Row:
    """Compress a model to a share of its time, and time both once more."""
    model, batches = case
    options = {"latency": asked, "effort": effort, "progress": False}
    try:
        small, reached = balf_fx.compile(model, batches, **options), True
    except BudgetError:
        small, reached = balf_fx.compile(model, batches, strict=False, **options), False
    timing = balf_fx.report(small).timing
    again = measured(dense(model, batches[0]), small, batches[0], timing)
    kept = balf_fx.report(small).flops_kept
    shares = (timing.asked, timing.by_operations, timing.predicted, timing.measured, again, kept)
    return Row(name, timing.threads, timing.runner, *(round(share, 4) for share in shares), reached, effort)


def dense(model: nn.Module, batch: Tensor) -> fx.GraphModule:
    """The original as a graph, with its BatchNorms folded and its operations in place."""
    graph_module = balf_fx.prepare(model, batch)
    for simplify in (RemoveObservers(), Overwrite()):
        graph_module = simplify(graph_module).graph_module
    return graph_module


def measured(first: nn.Module, second: nn.Module, batch: Tensor, timing: Timing) -> float:
    """The time of the second model as a share of that of the first, in turn."""
    torch.compiler.reset()
    models = [torch.compile(each) if timing.runner == "inductor" else each for each in (first, second)]
    tasks = [partial(each, batch) for each in models]
    with torch.no_grad():
        return race(*tasks, batch.device, _ROUNDS).ratio


@click.command()
@click.option("--model", "names", multiple=True, type=click.Choice(list(CASES)), default=list(CASES))
@click.option("--share", "shares", multiple=True, type=float, default=SHARES, show_default=True)
@click.option("--effort", type=click.Choice(get_args(Effort)), default="fast", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="Folder with the data and the weights.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here, row by row.")
@click.option("--resume", is_flag=True, help="Keep the rows that the results file holds.")
def main(
    names: Sequence[str],
    shares: Sequence[float],
    effort: Effort,
    threads: int,
    data: Path | None,
    output: Path | None,
    resume: bool,
) -> None:
    """Compress models to shares of their time; other programs disturb it."""
    torch.set_num_threads(threads)
    earlier = json.loads(output.read_text()) if resume and output is not None and output.exists() else None
    rows = [] if earlier is None else list(earlier["results"])
    for name in (bar := tqdm(names, unit="model", leave=False)):
        case = CASES[name](data)
        for share in shares:
            bar.set_postfix_str(f"{name}, {share:g}")
            rows.append(asdict(run(name, case, share, effort)))
            if output is not None:
                write_json(output, {"results": rows}, earlier)
    click.echo(tabulate(rows, headers="keys", floatfmt=".3f"))


if __name__ == "__main__":
    main()
