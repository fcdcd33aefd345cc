"""The options by which commands are told of a model and of data, and what they mean."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from balf_fx.cli.data import Preprocessing, Samples, choose, open_samples, read_labels
from balf_fx.cli.models import default_preprocessing, load_model, needs_weights
from balf_fx.cli.settings import settings_from_command
from balf_fx.errors import OptionError


def numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Numbers between commas, as a tuple; a callback of click."""
    try:
        return None if value is None else tuple(float(number) for number in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers separated by commas", ctx, param) from None


class OutputFile(click.Path):
    """A file that can be written, so that nothing is computed in vain."""

    def __init__(self, *suffixes: str) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(str(super().convert(value, param, ctx)))
        if path.suffix.lower() not in self.suffixes:
            self.fail(f"{str(path)!r} does not end in {' or '.join(self.suffixes)}", param, ctx)
        if not os.access(path.parent, os.W_OK):
            self.fail(f"there is no folder {str(path.parent)!r} to write to", param, ctx)
        return path


_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


_EXISTING = click.Path(exists=True, path_type=Path)


_COUNT = click.IntRange(min=1)


_OPTIONS = (
    click.argument("model", metavar="MODEL"),
    click.option("--weights", type=_EXISTING_FILE, help="State dict, .safetensors or what torch.save wrote."),
    click.option("--pretrained", is_flag=True, help="Let torchvision or timm download their weights."),
    click.option("--data", type=_EXISTING, required=True, help="Folder of images, or .npz file, to calibrate on."),
    click.option("--array", metavar="NAME", help="Array in the .npz file; default: the only one."),
    click.option("--samples", type=_COUNT, default=512, show_default=True, help="So many of the data, at random."),
    click.option("--batch-size", type=_COUNT, default=32, show_default=True),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of samples and the probes."),
    click.option("--image-size", type=_COUNT, help="Default: the model's own."),
    click.option("--mean", callback=numbers, help="Of the channels, 0.485,0.456,0.406; default: the model's own."),
    click.option("--std", callback=numbers, help="Of the channels, 0.229,0.224,0.225; default: the model's own."),
    click.option("--quiet", "-q", is_flag=True, help="No progress bars."),
)


def input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the model, the data and what is common to all compression; `Inputs` takes them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class Inputs:
    """What a user said; names as in the options."""

    model: str
    data: Path
    weights: Path | None
    pretrained: bool
    array: str | None
    samples: int
    batch_size: int
    seed: int
    image_size: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    quiet: bool

    @classmethod
    def split(cls, given: dict[str, Any]) -> tuple[Inputs, dict[str, Any]]:
        """The model and the data that a user named, and what else was said of compression."""
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())  # a factory or a loss may lie in the current folder, as for python -m
        own = {field.name: given.pop(field.name) for field in dataclasses.fields(cls)}
        found = cls(**own)
        return found, {**settings_from_command(given), "seed": found.seed, "progress": not found.quiet}

    def load_model(self) -> nn.Module:
        """The model; says so where its weights are random."""
        model = load_model(self.model, self.weights, self.pretrained)
        if needs_weights(self.model) and self.weights is None and not self.pretrained:
            click.echo(f"{self.model} has random weights: pass --weights or --pretrained", err=True)
        return model

    def calibration(self, model: nn.Module) -> list[Tensor]:
        """Batches to calibrate on."""
        source = open_samples(self.data, self.array)
        return self._batches(model, source, choose(len(source), self.samples, self.seed))

    def evaluation(
        self, model: nn.Module, data: Path | None, array: str | None, labels: str | None, count: int
    ) -> tuple[list[Tensor], Tensor | None]:
        """Batches that calibration does not see, and their labels.

        Args:
            data, array: where they are; None for what calibration leaves of its own.
            labels: the name of their array in the same file.
            count: so many at most.

        Raises:
            OptionError: nothing is left, or the labels are not as many as the samples.
        """
        path = self.data if data is None else data
        source = open_samples(path, array if array is not None or data is not None else self.array)
        taken = self.samples if data is None else 0
        indices = choose(len(source), taken + count, self.seed)[taken:]
        if not indices:
            raise OptionError(
                f"all {len(source)} samples are to calibrate on: pass fewer --samples, or others as --eval-data"
            )
        batches = self._batches(model, source, indices)
        if labels is None:
            return batches, None
        known = read_labels(path, labels)
        if len(known) != len(source):
            raise OptionError(f"there are {len(known)} labels for {len(source)} samples")
        return batches, known[indices]

    def _batches(self, model: nn.Module, source: Samples, indices: list[int]) -> list[Tensor]:
        preprocessing = self._preprocessing(model) if source.holds_images else Preprocessing()
        return list(torch.split(source.read(indices, preprocessing, not self.quiet), self.batch_size))

    def _preprocessing(self, model: nn.Module) -> Preprocessing:
        """The model's own, with what the user wants otherwise."""
        own = default_preprocessing(self.model, model)
        size, resize = own.size, own.resize
        if self.image_size is not None:
            resize = self.image_size if not size or not resize else round(self.image_size * resize / size)
            size = self.image_size
        return dataclasses.replace(own, size=size, resize=resize, mean=self.mean or own.mean, std=self.std or own.std)
