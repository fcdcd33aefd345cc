"""What calibration on padded text costs, with a mask that is read and without one.

python benchmarks/padding.py --params 0.8 --json benchmarks/results/padding_80.json

The same sequences of stories260K are calibrated on as they are, and padded on either side to four times their length.
The model attends to no padding in any of the cases: they differ in the positions that count. What is lost is the rise
of the negative log-likelihood, in nats a token, on stories that calibration has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import stories
import torch
from common import write_json
from evaluation import Judge
from tabulate import tabulate
from task import Source
from torch import Tensor
from torch.nn import functional as F

import balf_fx

_BATCH = 8
_PADDING = 2  # the token that ends a text

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One compressed model: the side of the padding, whether it counts, and what is lost."""

    side: str
    counts: bool
    params_kept: float
    nats_lost: float
    kl: float


def padded(tokens: Tensor, length: int, side: str) -> Batch:
    """Sequences [N, L] padded to a length, with their mask."""
    room = length - tokens.shape[1]
    sides = {"none": (0, 0), "right": (0, room), "left": (room, 0)}[side]
    return {
        "tokens": F.pad(tokens, sides, value=_PADDING),
        "attention_mask": F.pad(torch.ones_like(tokens), sides),
    }


def everything(batch: Batch) -> Tensor:
    """Weights as if there were no mask."""
    return torch.ones(batch["tokens"].shape)


def cases() -> Iterator[tuple[str, bool, Mapping[str, Callable[[Batch], Tensor]]]]:
    """The side of the padding, whether it counts, and the options of `balf_fx.compile` for it."""
    yield "none", False, {}
    for side in ("right", "left"):
        yield side, False, {}
        yield side, True, {"weights": everything}


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="The folder that holds the model and the stories.")
@click.option("--sequences", type=click.IntRange(min=4), default=48, show_default=True)
@click.option("--length", type=click.IntRange(2, stories.LENGTH // 4), default=64, show_default=True)
@click.option("--params", type=float, default=0.4, show_default=True, help="The share of the parameters to keep.")
@click.option("--effort", type=click.Choice(["fast", "balanced", "best"]), default="best", show_default=True)
@click.option("--evaluate", type=click.IntRange(min=1), help="Only so many stories to judge by.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
def main(
    data: Path | None,
    sequences: int,
    length: int,
    params: float,
    effort: str,
    evaluate: int | None,
    output: Path | None,
) -> None:
    """Compress a small Llama on padded sequences, and on the same without padding."""
    task = stories.load(Source(data=data, evaluate=evaluate))
    judge = Judge(task)
    text = torch.cat(list(task.calibration)).flatten()[: sequences * length].view(sequences, length)
    rows = []
    for side, counts, options in cases():
        batches = [padded(tokens, 4 * length, side) for tokens in text.split(_BATCH)]
        small = balf_fx.compile(task.model, batches, params=params, effort=effort, progress=False, **options)
        figures = judge.figures(_Unmasked(small))
        lost = math.log(figures.perplexity) - math.log(judge.dense.perplexity)
        rows.append(Row(side, counts, balf_fx.report(small).params_kept, lost, figures.kl))
    click.echo(tabulate([asdict(row) for row in rows], headers="keys", floatfmt=".4f"))
    if output is not None:
        write_json(output, {"results": [asdict(row) for row in rows]})


class _Unmasked(torch.nn.Module):
    """A model that is called without a mask."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, torch.ones_like(tokens))


if __name__ == "__main__":
    main()
