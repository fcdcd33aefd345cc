"""What a few epochs of training recover after a hard compression: of all parameters, or of adapters on the factors.

python benchmarks/finetune.py --json benchmarks/results/finetune.json

A small convolutional net on scikit-learn's handwritten digits, judged on those that training has not seen. Adapters are
LoRA of rank 4 (`peft`), on the layers that compression replaced or made narrower.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from common import write_json
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import balf_fx
from balf_fx.cli.demo import Digits, accuracy, load_digits

WIDTH = 32
RANK = 4
_BATCH = 64
_RATE, _ADAPTERS_RATE = 3e-3, 1e-2


def labelled_loss(output: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """The loss of training, for batches with labels."""
    return F.cross_entropy(output, batch[1])


CASES: Mapping[str, Mapping[str, Any]] = {
    '`effort="fast"`': {"flops": 0.3, "effort": "fast"},
    "`balf_fx.AIR`, with labels": {"flops": 0.3, "loss": labelled_loss, **balf_fx.AIR},
    "the default effort": {"flops": 0.1},
}
"""Keyword arguments of `balf_fx.compile`, so hard that it shows."""


@dataclass(frozen=True)
class Row:
    """One compressed model: top-1 in percent as it is, with all parameters trained, and with adapters alone."""

    case: str
    flops_kept: float
    compressed: float
    trained: float
    adapted: float


def net() -> nn.Sequential:
    """An untrained net."""
    blocks = (
        nn.Sequential(nn.Conv2d(inputs, WIDTH, 3, stride, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        for inputs, stride in ((1, 1), (WIDTH, 2), (WIDTH, 1))
    )
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def fit(model: nn.Module, digits: Digits, rate: float, epochs: int) -> nn.Module:
    """Train what requires gradients, and leave the model in evaluation mode."""
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], rate)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(digits.train), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train[index]), digits.train_labels[index]).backward()
            optimizer.step()
    return model.eval()


def with_adapters(small: nn.Module) -> nn.Module:
    """A copy in which adapters alone are trained, one for each layer that compression changed."""
    import peft  # takes long

    report = balf_fx.report(small)
    layers = [*report.factor_layers, *(row.name for row in report.sites if row.is_only_narrower)]
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=layers)
    return peft.get_peft_model(copy.deepcopy(small), config)


@click.command()
@click.option("--epochs", type=click.IntRange(min=1), default=8, show_default=True, help="Of the dense net.")
@click.option("--tune", type=click.IntRange(min=1), default=6, show_default=True, help="Epochs after compression.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
def main(epochs: int, tune: int, output: Path | None) -> None:
    """Train a net, compress it, and train it again in both ways."""
    digits = load_digits()
    batches = [(digits.calibration, digits.train_labels[: len(digits.calibration)])]

    def top1(model: nn.Module) -> float:
        return 100 * accuracy(model, digits.test, digits.test_labels)

    torch.manual_seed(0)
    dense = fit(net(), digits, _RATE, epochs)
    rows = []
    for case, options in (bar := tqdm(CASES.items(), unit="model", leave=False)):
        bar.set_postfix_str(case)
        small = balf_fx.compile(dense, batches, progress=False, **options)
        trained = fit(copy.deepcopy(small), digits, _RATE, tune)
        adapted = fit(with_adapters(small), digits, _ADAPTERS_RATE, tune)
        rows.append(Row(case, balf_fx.report(small).flops_kept, *map(top1, (small, trained, adapted))))
    found = {"images": len(digits.test), "dense": top1(dense), "results": [asdict(row) for row in rows]}
    click.echo(f"dense: {found['dense']:.2f} % of {found['images']} digits\n")
    click.echo(tabulate(found["results"], headers="keys", floatfmt=".3f"))
    if output is not None:
        write_json(output, found)


if __name__ == "__main__":
    main()
