"""What a refit costs where the calibration data do not represent those that the model meets later.

python benchmarks/representative.py --json benchmarks/results/representative.json

ResNet-20 is calibrated on as many images of all ten classes, of the first five only, or of noise, and judged on test
images of the first five classes and of the others. The classes of calibration images are those that the dense model
answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cifar
import click
import torch
from common import write_json
from evaluation import answers
from tabulate import tabulate
from task import Source, Task
from torch import Tensor, nn
from tqdm import tqdm

import balf_fx

EFFORTS = ("fast", "balanced", "best")
_SEEN = 5  # classes
_DRAWN = 4  # times as many images are looked at


@dataclass(frozen=True)
class Row:
    """One compressed model.

    Attributes:
        calibration: what it was calibrated on.
        seen, others: top-1 in percent on test images of the first five classes, and of the other five.
    """

    calibration: str
    effort: str
    flops_kept: float
    seen: float
    others: float


def calibrations(task: Task, images: int) -> Mapping[str, Sequence[Tensor]]:
    """Batches of as many images of each kind.

    Raises:
        click.ClickException: the task has not enough images of the first classes.
    """
    pixels = torch.cat(list(task.calibration))
    classes = torch.cat(answers(task.model, task.calibration)).argmax(-1)
    first = pixels[classes < _SEEN]
    if len(first) < images:
        raise click.ClickException(f"--images {images} is more than the {len(first)} of the first classes")
    noise = torch.randn(images, *pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    found = {"all classes": pixels[:images], "the first five classes": first[:images], "noise": noise}
    return {name: chosen.split(cifar.BATCH_SIZE) for name, chosen in found.items()}


def top1(model: nn.Module, task: Task) -> tuple[float, float]:
    """Top-1 in percent on images of the first classes, and of the others."""
    right = torch.cat([labels for _, labels in task.evaluation])
    given = torch.cat(answers(model, (images for images, _ in task.evaluation))).argmax(-1)
    hits = (given == right).double()
    return float(100 * hits[right < _SEEN].mean()), float(100 * hits[right >= _SEEN].mean())


@click.command()
@click.option("--images", type=click.IntRange(min=1), default=cifar.CALIBRATION_IMAGES, show_default=True)
@click.option("--flops", type=float, default=0.5, show_default=True, help="The share of the FLOPs to keep.")
@click.option("--effort", "efforts", multiple=True, default=EFFORTS, show_default=True, type=click.Choice(EFFORTS))
@click.option("--evaluate", type=click.IntRange(min=1), help="Only the first so many test images.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder with the data and the weights.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
def main(
    images: int, flops: float, efforts: Sequence[str], evaluate: int | None, data: Path | None, output: Path | None
) -> None:
    """Calibrate ResNet-20 on other images than it is judged on."""
    task = cifar.load(Source(data=data, images=_DRAWN * images, evaluate=evaluate))
    wanted = [(name, batches, effort) for name, batches in calibrations(task, images).items() for effort in efforts]
    rows = [Row("", "dense", 1.0, *top1(task.model, task))]
    for name, batches, effort in (bar := tqdm(wanted, unit="model", leave=False)):
        bar.set_postfix_str(f"{name}, {effort}")
        small = balf_fx.compile(task.model, batches, flops=flops, effort=effort, progress=False)
        rows.append(Row(name, effort, balf_fx.report(small).flops_kept, *top1(small, task)))
    click.echo(tabulate([asdict(row) for row in rows], headers="keys", floatfmt=".2f"))
    if output is not None:
        write_json(output, {"model": "resnet20", "flops": flops, "results": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
