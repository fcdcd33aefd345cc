"""How much memory and time a compression with gradients and refit takes, for ResNet-50 at 224 x 224.

python benchmarks/memory.py --images 256 --batch-size 32 --batch-size 256 --json benchmarks/results/memory.json
python benchmarks/memory.py --subject Llama-25M --effort balanced --memory 64MiB --files

Weights and images are random: the cost depends on shapes alone. Each case runs in a process of its own, and what is
reported is the most memory that the process has had resident, imports, model and images included. Half an hour or so.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import click
import torch
from common import run_apart, write_json
from safetensors.torch import save_model
from stages import peak_gib, resident_gib
from subjects import SUBJECTS
from tabulate import tabulate
from torch import nn
from torchvision.models import resnet50

import balf_fx
from balf_fx.calibration.pages import Pages
from balf_fx.engine.settings import Effort
from balf_fx.passes.refit import RefitMode

FLOPS = 0.6


@dataclass(frozen=True)
class Cost:
    """Of one process: seconds of processor time, and resident memory before compression and at its peak."""

    images: int
    batch_size: int
    refit: RefitMode
    forward_seconds: float
    seconds: float
    before_gib: float
    peak_gib: float


def measure(images: int, batch_size: int, refit: RefitMode) -> Cost:
    """Compress in this process."""
    torch.manual_seed(0)
    model = resnet50().eval()
    batches = torch.randn(images, 3, 224, 224).split(batch_size)
    before = peak_gib()
    forward_seconds = _forward_seconds(model, batches[0][:8]) * images / min(8, batch_size)
    start = time.process_time()
    balf_fx.compile(model, batches, flops=FLOPS, factors="sensitivity", refit=refit, progress=False)
    return Cost(images, batch_size, refit, forward_seconds, time.process_time() - start, before, peak_gib())


def _forward_seconds(model: torch.nn.Module, batch: torch.Tensor) -> float:
    with torch.no_grad():
        model(batch)
        start = time.process_time()
        model(batch)
        return time.process_time() - start


@dataclass(frozen=True)
class Footprint:
    """Of one process, in GiB: a model's weights, and the most that its compression had resident above what was before.

    The forward passes are run before, so that what these take is not counted. Weights that are read from files are not
    resident before, and count where they are read.
    """

    model: str
    effort: str
    memory: str
    files: bool
    weights: float
    above: float
    seconds: float


def footprint(name: str, effort: Effort, memory: str, files: bool) -> Footprint:
    """Compress a model of `subjects` in this process, with its weights in memory or in files."""
    subject = SUBJECTS[name]()
    subject.run()
    weights = sum(parameter.nbytes for parameter in subject.model.parameters()) / 2**30
    with tempfile.TemporaryDirectory() as folder:
        if files:
            save_model(subject.model, f"{folder}/model.safetensors")
            _drop_weights(subject.model)
        before, start = resident_gib(), time.process_time()
        options = {"safetensors": folder} if files else {}
        balf_fx.compile(
            subject.model, subject.calibration, flops=FLOPS, effort=effort, memory=memory, progress=False, **options
        )
    return Footprint(name, effort, memory, files, weights, peak_gib() - before, time.process_time() - start)


def _drop_weights(model: nn.Module) -> None:
    """Move the parameters of a model to the meta device, and give their memory back."""
    meta = {id(parameter): nn.Parameter(parameter.to("meta")) for parameter in model.parameters()}
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, meta[id(parameter)])
    Pages().release()


def footprint_apart(name: str, effort: Effort, memory: str = "0.25", files: bool = False) -> Footprint:
    """Compress it in a process of its own."""
    words = ["--subject", name, "--effort", effort, "--memory", memory, *["--files"] * files]
    return Footprint(**run_apart(__file__, *words, "--here"))


def measure_apart(images: int, batch_size: int, refit: RefitMode) -> Cost:
    """Compress in a process of its own."""
    words = ["--images", images, "--batch-size", batch_size, "--refit", refit]
    return Cost(**run_apart(__file__, *words, "--here"))


@click.command()
@click.option("--images", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--batch-size", "sizes", type=click.IntRange(min=1), multiple=True, default=(32, 256), show_default=True)
@click.option("--refit", type=click.Choice(["full", "up"]), default="full", show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
@click.option("--subject", type=click.Choice(list(SUBJECTS)), help="A model of the timings in place of ResNet-50.")
@click.option(
    "--effort", "efforts", type=click.Choice(get_args(Effort)), multiple=True, default=("fast",), help="With --subject."
)
@click.option("--memory", "bounds", multiple=True, default=("0.25",), help="The option memory, with --subject.")
@click.option("--files", is_flag=True, help="With the last bound, read the weights from files, too.")
@click.option("--here", is_flag=True, hidden=True, help="Measure in this process and print the result as JSON.")
def main(
    images: int,
    sizes: tuple[int, ...],
    refit: RefitMode,
    output: Path | None,
    subject: str | None,
    efforts: tuple[Effort, ...],
    bounds: tuple[str, ...],
    files: bool,
    here: bool,
) -> None:
    """Measure the memory of a compression for each size of batches; of a subject, for each bound of its memory."""
    if subject is not None and here:
        click.echo(json.dumps(asdict(footprint(subject, efforts[0], bounds[0], files))))
        return
    if subject is not None:
        cases = [*((bound, False) for bound in bounds), *[(bounds[-1], True)] * files]
        found = [asdict(footprint_apart(subject, effort, *case)) for effort in efforts for case in cases]
        click.echo(tabulate(found, headers="keys", floatfmt=".3f"))
        if output is not None:
            write_json(output, {"flops": FLOPS, "results": found})
        return
    if here:
        click.echo(json.dumps(asdict(measure(images, sizes[0], refit))))
        return
    costs = [measure_apart(images, size, refit) for size in sizes]
    click.echo(tabulate([asdict(cost) for cost in costs], headers="keys", floatfmt=".2f"))
    if output is not None:
        write_json(output, {"model": "ResNet-50", "flops": FLOPS, "results": [asdict(cost) for cost in costs]})


if __name__ == "__main__":
    main()
