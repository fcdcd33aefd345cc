"""The accuracy of compressed models without fine-tuning: methods x budgets on a trained model.

python benchmarks/accuracy.py --model resnet20 --json benchmarks/results/accuracy_resnet20.json

Every method compresses the same model with the same calibration data, from scratch for every budget. What is kept is
counted on the result. A method's cost is the processor time it takes over that of plain forward passes over the
calibration data, right before it: unlike wall-clock time, it does not depend on what else the machine does.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from common import count_flops, write_json
from evaluation import Judge
from models import budgets, load, model_options
from tabulate import tabulate
from task import Measure, Metric, Task
from torch import nn
from tqdm import tqdm

import balf_fx

METHODS: Mapping[str, Mapping[str, Any]] = {
    "svd": {"factors": "svd", "fold_batchnorm": False, "pivot": False},
    "svd-llm": {**balf_fx.BALF, "allocation": "uniform"},
    "air": balf_fx.AIR,
    "balf": balf_fx.BALF,
    "uniform": {"effort": "fast", "allocation": "uniform"},
    "energy": {"effort": "fast", "allocation": "energy"},
    "fast": {"effort": "fast"},
    "ranks": {"effort": "balanced", "widths": False},
    "balanced": {"effort": "balanced"},
    "ranks+refit": {"widths": False},
    "fast+separable": {"effort": "fast", "separable": True},
    "separable": {"separable": True},
    "ours": {},
}
"""Keyword arguments of `balf_fx.compile`.

"svd-llm" is SVD-LLM(W): the truncation that whitening finds, with the same share of each layer kept. "uniform" and
"energy" differ from "fast" in the allocation alone, "ranks" from "balanced" and "ranks+refit" from "ours" in that no
width shrinks, and "separable" from "ours", and "fast+separable" from "fast", in that convolutions may become k x 1 and
1 x k.
"""

REFERENCE: Mapping[str, Mapping[float, float]] = {
    "resnet20": {0.9: 91.46, 0.8: 89.57, 0.7: 85.85, 0.6: 79.11, 0.5: 66.56, 0.4: 40.66, 0.3: 20.15},
    "vit_tiny": {0.914: 59.8, 0.828: 18.5, 0.743: 4.3},
    "mobilenetv2": {0.883: 14.1, 0.799: 0.8},
}
"""Top-1 of BALF's reference implementation at shares of FLOPs kept.

Its published code was run on the CPU, with the calls of `.cuda()` removed, on the same weights and the same images for
calibration and evaluation. It leaves products of activations out of its budget: what it keeps was counted on its
results, with the counter of these benchmarks.
"""


@dataclass(frozen=True)
class Row:
    """One compressed model.

    Attributes:
        images: calibration samples.
        top1, perplexity, kl: `evaluation.Figures`.
        flops_kept, params_kept: counted on the model, not computed.
        seconds: of processor time, of `balf_fx.compile`.
        forward_seconds: of plain forward passes over the calibration data.
    """

    method: str
    measure: Measure
    budget: float
    images: int
    seed: int
    top1: float
    perplexity: float
    kl: float
    flops_kept: float
    params_kept: float
    seconds: float
    forward_seconds: float

    @property
    def key(self) -> tuple[str, str, float, int, int]:
        """What distinguishes rows of one model."""
        return self.method, self.measure, self.budget, self.images, self.seed

    @property
    def kept(self) -> float:
        """The share of what the budget is about."""
        return self.flops_kept if self.measure == "flops" else self.params_kept

    @property
    def passes(self) -> float:
        """The cost in forward passes over the calibration data."""
        return self.seconds / self.forward_seconds


class Bench:
    """Compresses and judges one model."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task = task
        self.seed = seed
        self.judge = Judge(task)
        self.dense_flops, self.dense_params = self._count(task.model)

    def row(self, method: str, measure: Measure, budget: float) -> Row:
        """Compress and judge; a budget that is out of reach gives the closest that is not."""
        options = {measure: budget, "seed": self.seed, "strict": False, "progress": False, **METHODS[method]}
        forward_seconds = self._forward_seconds()
        start = time.process_time()
        model = balf_fx.compile(self.task.model, self.task.calibration, **options)
        seconds = time.process_time() - start
        flops, params = self._count(model)
        return Row(
            method,
            measure,
            budget,
            self.task.samples,
            self.seed,
            **asdict(self.judge.figures(model)),
            flops_kept=flops / self.dense_flops,
            params_kept=params / self.dense_params,
            seconds=seconds,
            forward_seconds=forward_seconds,
        )

    def _count(self, model: nn.Module) -> tuple[int, int]:
        """FLOPs of the first calibration batch, and parameters."""
        flops = count_flops(model, self.task.calibration[0])
        return flops, sum(parameter.numel() for parameter in model.parameters())

    def _forward_seconds(self) -> float:
        start = time.process_time()
        with torch.no_grad():
            for batch in self.task.calibration:
                self.task.model(batch)
        return time.process_time() - start


class Results:
    """Rows, written to a JSON file, if there is one, whenever another comes in."""

    def __init__(self, path: Path | None, name: str, bench: Bench, resume: bool) -> None:
        self.path = path
        self.header = {
            "model": name,
            "title": bench.task.title,
            "metric": bench.task.metric,
            "answers": bench.judge.answers,
            "dense": {**asdict(bench.judge.dense), "flops": bench.dense_flops, "params": bench.dense_params},
            "reference": {f"{share:g}": top1 for share, top1 in REFERENCE.get(name, {}).items()},
        }
        self._earlier = self._read(path) if resume and path is not None and path.exists() else None
        self.rows = [Row(**row) for row in self._earlier["results"]] if self._earlier is not None else []

    def __contains__(self, key: object) -> bool:
        return any(row.key == key for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is not None:
            rows = [{name: _rounded(value) for name, value in asdict(row).items()} for row in self.rows]
            write_json(self.path, {**self.header, "results": rows}, self._earlier)

    def _read(self, path: Path) -> dict[str, Any]:
        """Results of an earlier run.

        Raises:
            click.ClickException: they are about another model or other answers.
        """
        found = json.loads(path.read_text())
        for field in ("model", "answers"):
            if found.get(field) != self.header[field]:
                raise click.ClickException(
                    f"{path} is about {field} {found.get(field)}, this run about {self.header[field]}: write elsewhere"
                )
        return found


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def table(rows: Sequence[Row], metric: Metric, reference: Mapping[float, float]) -> str:
    """Methods x budgets: the metric, and in brackets what is kept; then the median cost in forward passes."""
    columns = list(dict.fromkeys((row.measure, row.budget) for row in rows))
    settings = dict.fromkeys((row.images, row.seed) for row in rows)
    lines = []
    for method, (images, seed) in dict.fromkeys((row.method, (row.images, row.seed)) for row in rows):
        own = [row for row in rows if (row.method, row.images, row.seed) == (method, images, seed)]
        cells = {(row.measure, row.budget): f"{getattr(row, metric):.2f} ({row.kept:.4f})" for row in own}
        label = method if len(settings) == 1 else f"{method}, {images} samples, seed {seed}"
        cost = statistics.median(row.passes for row in own)
        lines.append([label, *(cells.get(column, "") for column in columns), f"{cost:.1f}"])
    known = {("flops", share): f"{top1:.2f}" for share, top1 in reference.items()}
    if known.keys() & set(columns):
        lines.append(["BALF reference", *(known.get(column, "") for column in columns), ""])
    headers = [f"{metric} (kept)", *(f"{measure} {budget:g}" for measure, budget in columns), "cost in passes"]
    return tabulate(lines, headers, disable_numparse=True)


@click.command()
@model_options
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Repeatable; default: all.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here, row by row.")
@click.option("--resume", is_flag=True, help="Keep the rows that the results file holds, and add what is missing.")
def main(
    name: str,
    flops: tuple[float, ...],
    params: tuple[float, ...],
    methods: tuple[str, ...],
    output: Path | None,
    resume: bool,
    **source: Any,
) -> None:
    """Compress a model with each method under each budget, and print how well it answers."""
    task = load(name, **source)
    bench = Bench(task, source["seed"])
    results = Results(output, name, bench, resume)
    wanted = [(method, *budget) for budget in budgets(task, flops, params) for method in methods or METHODS]
    missing = [one for one in wanted if (*one, task.samples, bench.seed) not in results]
    for method, measure, budget in (bar := tqdm(missing, unit="model", leave=False)):
        bar.set_postfix_str(f"{method}, {measure} {budget:g}")
        results.add(bench.row(method, measure, budget))
    dense = bench.judge.dense
    click.echo(
        f"{task.title}, calibrated on {task.samples:,} samples\n"
        f"dense: {bench.dense_flops:,} FLOPs a batch, {bench.dense_params:,} parameters; top-1 {dense.top1:.2f} %, "
        f"perplexity {dense.perplexity:.4f} over {bench.judge.answers:,} answers\n"
    )
    click.echo(table(results.rows, task.metric, REFERENCE.get(name, {})))


if __name__ == "__main__":
    main()
