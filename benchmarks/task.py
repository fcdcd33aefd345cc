"""What the loaders return and take: a trained model with its data, and where these come from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import torch
from torch import Tensor, nn

Metric = Literal["top1", "perplexity"]
Measure = Literal["flops", "params"]


@dataclass(frozen=True)
class Task:
    """A trained model, what it is calibrated on and what it is judged on.

    Attributes:
        title: for people.
        model: in evaluation mode; returns logits, [samples, classes] or [samples, length, classes].
        calibration: batches of inputs, all held in memory.
        samples: how many there are in these.
        evaluation: batches of inputs with the right classes, [samples] or [samples, length]; can be read repeatedly.
        metric: the figure that tables show.
        measure, budgets: what to spend, and how much of it to keep, unless the user says something else.
    """

    title: str
    model: nn.Module
    calibration: Sequence[Tensor]
    samples: int
    evaluation: Iterable[tuple[Tensor, Tensor]]
    metric: Metric
    measure: Measure
    budgets: Sequence[float]


@dataclass(frozen=True)
class Source:
    """Where a model and its data come from, and how much of the data is used.

    Attributes:
        data: the folder that holds them; None for `default_data()`.
        weights: a state dict in place of the one in the folder.
        cifar_root: root of torchvision's CIFAR10 in place of cifar10.npz.
        images: calibration samples; None for as many as the task's default.
        seed: which ones.
        evaluate: only the first so many evaluation samples; None for all.
    """

    data: Path | None = None
    weights: Path | None = None
    cifar_root: Path | None = None
    images: int | None = None
    seed: int = 0
    evaluate: int | None = None

    def file(self, name: str) -> Path:
        """A file of the data folder.

        Raises:
            click.ClickException: it is not there; says what to pass.
        """
        path = (self.data or default_data()) / name
        if not path.is_file():
            raise click.ClickException(f"{path} does not exist: pass the folder that holds {name} as --data")
        return path

    def load_weights(self, model: nn.Module, name: str) -> nn.Module:
        """Give a model its trained weights, in evaluation mode.

        Raises:
            click.ClickException: there are none, or they belong to another model.
        """
        path = self.weights or self.file(name)
        if not path.is_file():
            raise click.ClickException(f"{path} does not exist: pass a state dict as --weights")
        try:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except RuntimeError as error:
            raise click.ClickException(f"{path} holds no weights of {type(model).__name__}: {error}") from error
        return model.eval()


@dataclass(frozen=True)
class Images:
    """Images with their labels, read as batches of normalised images.

    Attributes:
        pixels: uint8 [N, 3, H, W].
        labels: [N], whole numbers.
        mean, std: of each channel, for pixels in [0, 1].
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batch_size: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        for pixels, labels in zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield (pixels / 255 - mean) / std, labels

    def inputs(self) -> list[Tensor]:
        """The batches without labels."""
        return [images for images, _ in self]


def default_data() -> Path:
    """The environment variable BALF_FX_DATA, else the folder shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("BALF_FX_DATA", beside))


def random_sample(count: int, available: int, seed: int) -> Tensor:
    """[count], the first of a random permutation, the same for the same seed.

    Raises:
        click.ClickException: there are not so many.
    """
    if count > available:
        raise click.ClickException(f"--images {count} is more than the {available} there are")
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
