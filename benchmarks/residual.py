"""Does a low-rank correction of the quantization error pay for its bytes?

python benchmarks/residual.py --model stories --params 0.8 --json benchmarks/results/residual_stories.json

Weights of linear layers are rounded to the nearest of 2^bits - 1 levels, symmetric around zero, with one scale (two
bytes) for each run of `group` inputs of an output; weights that other modules share stay as they are. What rounding
loses, E = W - Q(W), is corrected by the pair of factors of rank r that leaves the least error in the layer's output
over the calibration data (LQER, arXiv 2402.02446; EoRA, arXiv 2410.21271), rounded to 8 bits an output; the mean of
what is left moves into the bias. Everything is simulated in float32, and bytes are counted, not measured. Four kinds:

* the dense model, rounded; and with a correction of rank r,
* a model compressed to each budget, its factors rounded; and the same with a correction. All factors are pairs, since
  combinations of pivots multiply their rounding errors.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click
import torch
from common import write_json
from evaluation import Judge
from models import budgets, load, model_options
from tabulate import tabulate
from task import Task
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import balf_fx
from balf_fx.calibration.moments import Moments
from balf_fx.calibration.observers import CovarianceObserver
from balf_fx.engine.settings import Effort
from balf_fx.graph.site import Site
from balf_fx.ranks.spectra import factors, spectrum_from_input

_FACTOR_BITS = 8
_SCALE_BYTES = 2
_DENSE = "dense"


@dataclass(frozen=True)
class Format:
    """How weights are stored: rounded to `bits`, in groups of `group` inputs (0: one for all), corrected at `rank`."""

    bits: int
    group: int
    rank: int

    def size(self, outputs: int, inputs: int) -> float:
        """Bytes of a layer's weight."""
        groups = 1 if self.group == 0 else -(-inputs // self.group)
        weight = outputs * (inputs * self.bits / 8 + groups * _SCALE_BYTES)
        rank = min(self.rank, outputs, inputs)
        return weight + rank * (outputs + inputs) * _FACTOR_BITS / 8 + (rank + outputs) * _SCALE_BYTES * (rank > 0)


@dataclass(frozen=True)
class Row:
    """One model; `bytes` are of all parameters, in float32 where they are not rounded."""

    model: str
    bits: int
    group: int
    rank: int
    bytes: int
    kl: float
    top1: float
    perplexity: float


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """Each run of `group` inputs of an output [O, D] rounded to the nearest level; the last run may be shorter."""
    outputs, inputs = weight.shape
    group = group or inputs
    runs = F.pad(weight, (0, -inputs % group)).reshape(outputs, -1, group)
    levels = 2 ** (bits - 1) - 1
    scale = runs.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float16).tiny) / levels
    scale = scale.to(torch.float16).to(weight.dtype)
    return ((runs / scale).round().clamp(-levels, levels) * scale).reshape(outputs, -1)[:, :inputs]


def corrected(weight: Tensor, moments: Moments, form: Format) -> tuple[Tensor, Tensor]:
    """What a layer computes with when it is stored so: a weight [O, D], and what its bias gains, [O]; both float64.

    Args:
        weight: [O, D] float64.
        moments: of the layer's input.
    """
    stored = rounded(weight, form.bits, form.group)
    if form.rank:
        left, right = correction(weight - stored, moments, min(form.rank, *weight.shape))
        stored = stored + rounded(left, _FACTOR_BITS, 0) @ rounded(right, _FACTOR_BITS, 0)
    return stored, (weight - stored) @ moments.mean[0]


def correction(error: Tensor, moments: Moments, rank: int) -> tuple[Tensor, Tensor]:
    """A [O, r] and B [r, D] with the least E|(E - A B)(x - E[x])|^2, for E [O, D] float64.

    The leading eigenvectors U of E Cov(x) E^T give them: A = U, B = U^T E.
    """
    stacked = error.unsqueeze(0)
    left, right = factors(stacked, spectrum_from_input(stacked, moments.covariance(), None), rank)
    return left[0], right[0]


class Quantizer:
    """A model with the moments of what its linear layers read."""

    def __init__(self, model: nn.Module, calibration: Sequence[Tensor]) -> None:
        self.model = model
        owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        self._layers = {
            name: _observer(name, layer)
            for name, layer in model.named_modules()
            if type(layer) is nn.Linear and owners[id(layer.weight)] == 1
        }
        handles = [
            model.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=observer: seen(args[0]))
            for name, observer in self._layers.items()
        ]
        with torch.no_grad():
            for batch in calibration:
                model(batch)
        for handle in handles:
            handle.remove()

    def quantized(self, form: Format) -> tuple[nn.Module, int]:
        """The model with its linear layers stored so, and its bytes."""
        model = copy.deepcopy(self.model)
        size = 4.0 * sum(parameter.numel() for parameter in model.parameters())
        for name, observer in self._layers.items():
            layer: Any = model.get_submodule(name)
            if observer.moments is None:
                raise click.ClickException(f"{name} was not called in calibration")
            weight, bias = corrected(layer.weight.detach().double(), observer.moments, form)
            size += form.size(*layer.weight.shape) - 4 * layer.weight.numel()
            size += 0 if layer.bias is not None else 4 * layer.out_features
            layer.weight = nn.Parameter(weight.float())
            layer.bias = nn.Parameter((bias if layer.bias is None else layer.bias.detach() + bias).float())
        return model, round(size)


def _observer(name: str, layer: nn.Linear) -> CovarianceObserver:
    site = Site(name, "linear", f"{name}.weight", None, 1, layer.out_features, layer.in_features)
    return CovarianceObserver(site, side="input")


def rows(task: Task, judge: Judge, models: dict[str, nn.Module], forms: Sequence[Format]) -> Iterator[Row]:
    """Judge every model in every format."""
    for name, model in models.items():
        quantizer = Quantizer(model, task.calibration)
        for form in forms:
            quantized, size = quantizer.quantized(form)
            figures = judge.figures(quantized)
            yield Row(name, form.bits, form.group, form.rank, size, figures.kl, figures.top1, figures.perplexity)


def best(found: Sequence[Row]) -> list[Row]:
    """Rows than which no row of at most their size has a smaller divergence, in order of size."""
    kept: list[Row] = []
    for row in sorted(found, key=lambda row: (row.bytes, row.kl)):
        if not kept or row.kl < kept[-1].kl:
            kept.append(row)
    return kept


def table(found: Sequence[Row]) -> str:
    """All rows in order of size; a star marks those than which nothing smaller is better."""
    kept = best(found)
    lines = [
        (
            *(row.model, row.bits, row.group or "row", row.rank, f"{row.bytes:,}"),
            *(f"{row.kl:.4f}", f"{row.top1:.2f}", f"{row.perplexity:.3f}", "*" if row in kept else ""),
        )
        for row in sorted(found, key=lambda row: row.bytes)
    ]
    headers = ["model", "bits", "group", "rank", "bytes", "KL", "top-1 %", "perplexity", "best"]
    return tabulate(lines, headers, disable_numparse=True)


@click.command()
@model_options
@click.option("--effort", type=click.Choice(get_args(Effort)), default="best", show_default=True)
@click.option("--bits", multiple=True, type=click.IntRange(2, 8), default=(3, 4, 5, 6, 8), show_default=True)
@click.option("--group", "groups", multiple=True, type=click.IntRange(min=0), default=(0, 32), show_default=True)
@click.option("--rank", "ranks", multiple=True, type=click.IntRange(min=0), default=(0, 4, 16), show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
def main(
    name: str,
    flops: tuple[float, ...],
    params: tuple[float, ...],
    effort: Effort,
    bits: tuple[int, ...],
    groups: tuple[int, ...],
    ranks: tuple[int, ...],
    output: Path | None,
    **source: Any,
) -> None:
    """Round the dense model and the compressed ones in every way, with and without a correction."""
    task = load(name, **source)
    judge = Judge(task)
    forms = [Format(*settings) for settings in itertools.product(bits, groups, ranks)]
    models = {_DENSE: task.model}
    for measure, share in budgets(task, flops, params):
        options: dict[str, Any] = {measure: share, "effort": effort, "seed": source["seed"], "pivot": False}
        models[f"{measure} {share:g}"] = balf_fx.compile(task.model, task.calibration, **options)
    total = len(models) * len(forms)
    found = list(tqdm(rows(task, judge, models, forms), total=total, desc="judging", unit="model", leave=False))
    click.echo(f"{task.title}, calibrated on {task.samples:,} samples; dense: {judge.dense}\n")
    click.echo(table(found))
    if output is not None:
        results = {
            "model": name,
            "title": task.title,
            "images": task.samples,
            "seed": source["seed"],
            "effort": effort,
            "answers": judge.answers,
            "dense": dataclasses.asdict(judge.dense),
            "results": [dataclasses.asdict(row) for row in found],
        }
        write_json(output, results)


if __name__ == "__main__":
    main()
