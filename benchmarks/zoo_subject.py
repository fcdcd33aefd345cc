"""A model to examine with random weights, and its batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from common import Batch, call
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Source = Literal["torchvision", "timm", "transformers"]

LARGEST = 150_000_000
"""Parameters above which a model is left out, or cut to two blocks where timm can."""


@dataclass(frozen=True)
class Case:
    """A model to examine; `options` are keyword arguments of its constructor."""

    source: Source
    name: str
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Skip:
    """A model that is left out, and why."""

    source: Source
    name: str
    reason: str


@dataclass(frozen=True)
class Subject:
    """A model and what makes a batch of a given number of samples for it.

    Attributes:
        others: make batches of other lengths, or padded in another way.
        other_sizes: other numbers of samples than 2 that the model is called with.
    """

    model: nn.Module
    batch: Callable[[int], Batch]
    others: tuple[Callable[[int], Batch], ...] = ()
    other_sizes: tuple[int, ...] = (3,)

    def batches(self) -> list[Batch]:
        """Other numbers of samples, and then all that the model reads otherwise."""
        return [self.batch(2), *map(self.batch, self.other_sizes), *(other(2) for other in self.others)]


def randomise(subject: Subject) -> None:
    """Gains, biases and statistics somewhat as training leaves them, unlike the ones and zeros that they start as.

    Without it many of these models have the same output for every input, and any graph would match them.
    """
    with torch.no_grad():
        for name, parameter in subject.model.named_parameters():
            if parameter.dim() <= 1 and "bias" not in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() <= 1 or not parameter.any():
                parameter.normal_(std=0.02)
    settle_batchnorm(subject.model, subject.batch(8))


def settle_batchnorm(model: nn.Module, batch: Batch) -> None:
    """Take BatchNorm's statistics from one batch."""
    found = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [(module, module.momentum) for module in found if module.track_running_stats]
    for norm, _ in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        run(model, batch)
    for norm, momentum in norms:
        norm.eval()
        norm.momentum = momentum


def run(model: nn.Module, batch: Batch) -> list[Tensor]:
    """All tensors that a call returns."""
    with torch.no_grad():
        output = call(model, batch)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def count_parameters(build: Callable[[], nn.Module]) -> int:
    """Of the model that `build` makes, on the meta device where that is possible."""
    try:
        with torch.device("meta"):
            model = build()
    except NotImplementedError:  # it computes its widths with tensors
        model = build()
    return sum(parameter.numel() for parameter in model.parameters())


def too_large(count: int) -> str:
    """Why a model of so many parameters is left out."""
    return f"too large: {count / 1e6:.0f} M parameters"
