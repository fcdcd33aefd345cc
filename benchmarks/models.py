"""The trained models that benchmarks compress, by name, and the command-line options that select one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import cifar
import click
import imagenet
import stories
from task import Measure, Source, Task

MODELS: Mapping[str, Callable[[Source], Task]] = {
    "resnet20": cifar.load,
    "vit_tiny": imagenet.load_vit_tiny,
    "mobilenetv2": imagenet.load_mobilenetv2,
    "stories": stories.load,
}

_Command = TypeVar("_Command", bound=Callable[..., Any])
_OPTIONS = (
    click.option("--model", "name", type=click.Choice(list(MODELS)), default="resnet20", show_default=True),
    click.option("--flops", multiple=True, type=float, help="A budget; repeatable. Default: as the model's results."),
    click.option("--params", multiple=True, type=float, help="As --flops, of the parameters."),
    click.option("--images", type=click.IntRange(min=1), help="Calibration images, or sequences of 512 tokens."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which ones, and probes."),
    click.option("--evaluate", type=click.IntRange(min=1), help="Only the first so many images or stories."),
    click.option("--data", type=click.Path(path_type=Path), help="Folder with the data and the weights."),
    click.option("--cifar-root", type=click.Path(path_type=Path), help="Root of torchvision's CIFAR10, for resnet20."),
    click.option("--weights", type=click.Path(path_type=Path), help="A state dict in place of the folder's."),
)


def model_options(command: _Command) -> _Command:
    """Options for `load`, and the budgets `flops` and `params`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def load(name: str, **source: Any) -> Task:
    """Load a model with its data; see `task.Source` for the arguments.

    Raises:
        click.ClickException: something is missing; says what to pass.
    """
    return MODELS[name](Source(**source))


def budgets(task: Task, flops: tuple[float, ...], params: tuple[float, ...]) -> list[tuple[Measure, float]]:
    """What the options ask for, or else the task's own."""
    asked: list[tuple[Measure, float]] = [("flops", share) for share in flops]
    asked += [("params", share) for share in params]
    return asked or [(task.measure, share) for share in task.budgets]
