"""The options of commands for the model and the data, and how both are loaded."""

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
from balf_fx.cli.processes import own_share, share_weights
from balf_fx.cli.settings import settings_from_command
from balf_fx.cli.text import Text, open_text
from balf_fx.errors import OptionError


def numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Parse numbers separated by commas as a tuple; a callback of click."""
    try:
        return None if value is None else tuple(float(number) for number in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers separated by commas", ctx, param) from None


class OutputFile(click.Path):
    """A file to write, or with the suffix "" a folder, checked before any work is done."""

    def __init__(self, *suffixes: str) -> None:
        super().__init__(dir_okay="" in suffixes, writable=True, path_type=Path)
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(str(super().convert(value, param, ctx)))
        if path.suffix.lower() not in self.suffixes:
            endings = " or ".join(filter(None, self.suffixes))
            self.fail(f"{str(path)!r} does not end in {endings}", param, ctx)
        if not os.access(path.parent, os.W_OK):
            self.fail(f"there is no folder {str(path.parent)!r} to write to", param, ctx)
        if path.exists() and path.is_dir() == bool(path.suffix):
            found, wanted = ("folder", "file") if path.suffix else ("file", "folder")
            self.fail(f"{str(path)!r} is a {found}, where a {wanted} is to be written: pass another name", param, ctx)
        return path


_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_EXISTING = click.Path(exists=True, path_type=Path)
_COUNT = click.IntRange(min=1)
_OPTIONS = (
    click.argument("model", metavar="MODEL"),
    click.option("--weights", type=_EXISTING_FILE, help="State dict, as .safetensors or by torch.save."),
    click.option("--pretrained", is_flag=True, help="Download the pretrained weights of torchvision or timm."),
    click.option("--data", type=_EXISTING, help="Calibration data: folder of images, or .npz file."),
    click.option(
        "--text", type=_EXISTING_FILE, help="In place of --data, a text for a language model of transformers."
    ),
    click.option("--length", type=_COUNT, default=256, show_default=True, help="Tokens of each sample of --text."),
    click.option("--array", metavar="NAME", help="Array in the .npz file; default: the only one."),
    click.option("--samples", type=_COUNT, default=512, show_default=True, help="Number of random samples to use."),
    click.option("--batch-size", type=_COUNT, default=32, show_default=True, help="Samples in a batch."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of the samples and the probes."),
    click.option("--image-size", type=_COUNT, help="Size of the images; default: the model's."),
    click.option("--mean", callback=numbers, help="Mean of channels, as 0.485,0.456,0.406; default: the model's."),
    click.option(
        "--std", callback=numbers, help="Their standard deviation, as 0.229,0.224,0.225; default: the model's."
    ),
    click.option("--quiet", "-q", is_flag=True, help="Show no progress bars."),
)


def input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the model and the data, which `Inputs` takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class Inputs:
    """The values of the options for the model and the data, with the same names."""

    model: str
    data: Path | None
    text: Path | None
    length: int
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
        """Split a command's arguments into those for the model and the data, and those for compression."""
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())  # a factory or a loss may lie in the current folder, as for python -m
        own = {field.name: given.pop(field.name) for field in dataclasses.fields(cls)}
        if (own["data"] is None) == (own["text"] is None):
            raise click.UsageError("calibration needs --data or, for a language model, --text: pass one of them")
        found = cls(**own)
        return found, {**settings_from_command(given), "seed": found.seed, "progress": not found.quiet}

    def load_model(self, rank: int = 0) -> nn.Module:
        """Load the model, of several processes the same; the first prints a note if its weights are random."""
        model = load_model(self.model, self.weights, self.pretrained)
        share_weights(model)
        if rank == 0 and needs_weights(self.model) and self.weights is None and not self.pretrained:
            click.echo(f"{self.model} has random weights: pass --weights or --pretrained", err=True)
        return model

    def calibration(self, model: nn.Module) -> list[Any]:
        """The batches for calibration, of several processes those of this one."""
        source = self._open(model, self.data or self.text, self.array)
        return self._batches(model, source, choose(len(source), self.samples, self.seed))

    def evaluation(
        self, model: nn.Module, data: Path | None, array: str | None, labels: str | None, count: int
    ) -> tuple[list[Any], Tensor | None]:
        """Batches that are not used for calibration, and their labels.

        Args:
            data, array: their path and the name of the array; None for the rest of the calibration data.
            labels: the name of the array of labels in the same file.
            count: the largest number of samples.

        Raises:
            OptionError: there are no samples left, or there are not as many labels as samples.
        """
        path = data or self.data or self.text
        source = self._open(model, path, array if array is not None or data is not None else self.array)
        taken = self.samples if data is None else 0
        indices = choose(len(source), taken + count, self.seed)[taken:]
        if not indices:
            raise OptionError(
                f"all {len(source)} samples are used for calibration: pass fewer --samples; for a sweep, others can be "
                "passed as --eval-data"
            )
        batches = self._batches(model, source, indices)
        if labels is None or path is None:
            return batches, None
        known = read_labels(path, labels)
        if len(known) != len(source):
            raise OptionError(f"there are {len(known)} labels for {len(source)} samples")
        return batches, known[indices]

    def _open(self, model: nn.Module, path: Path | None, array: str | None) -> Samples | Text:
        """The samples at a path, a text if the calibration data are one."""
        if path is None:
            raise OptionError("there are no data: pass --data or --text")
        if self.text is not None:
            return open_text(path, self.model, model, self.length)
        return open_samples(path, array)

    def _batches(self, model: nn.Module, source: Samples | Text, indices: list[int]) -> list[Any]:
        indices = own_share(indices, self.batch_size)
        if not indices:
            return []
        if isinstance(source, Text):
            return source.batches(indices, self.batch_size)
        preprocessing = self._preprocessing(model) if source.holds_images else Preprocessing()
        return list(torch.split(source.read(indices, preprocessing, not self.quiet), self.batch_size))

    def _preprocessing(self, model: nn.Module) -> Preprocessing:
        """The model's preprocessing, with the user's changes."""
        own = default_preprocessing(self.model, model)
        size, resize = own.size, own.resize
        if self.image_size is not None:
            resize = self.image_size if not size or not resize else round(self.image_size * resize / size)
            size = self.image_size
        return dataclasses.replace(own, size=size, resize=resize, mean=self.mean or own.mean, std=self.std or own.std)
