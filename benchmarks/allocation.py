"""Which weighting of the sites makes the best allocation? Factors and widths by sensitivity, with and without refit.

python benchmarks/allocation.py --flops 0.5 --flops 0.3 --json benchmarks/results/allocation_resnet20.json

The allocator minimises a sum over sites: a site's distortion as a share of its energy, times a power of the loss that
its gradients predict (`balf_fx.graph.curves.RankCurve.loss`). With power 0 all sites count alike, with power 1 the sum
is an estimate of the divergence itself. A width's loss counts `Allocate.caution` times as much. Two measurements:

* the model compressed under each weighting, and under the one that a measurement on calibration samples chooses
  (`balf_fx.engine.trials`): its divergence on calibration and on evaluation data, and its top-1,
* one site at a time at half its break-even rank, everything else dense: how the divergence measured on the first
  calibration batch and the site's term in the sum rank the sites (Spearman's correlation).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click
from common import count_flops, write_json
from evaluation import Judge, answers, divergence
from models import budgets, load, model_options
from scipy.stats import spearmanr
from tabulate import tabulate
from task import Measure, Task
from torch import Tensor, fx
from tqdm import tqdm

import balf_fx
from balf_fx.calibration.batches import forward_for
from balf_fx.calibration.calls import placeholder_values
from balf_fx.engine.rewriting import rewrite
from balf_fx.engine.settings import Settings
from balf_fx.graph.annotation import annotation, sites
from balf_fx.graph.curves import RankCurve
from balf_fx.passes import Allocate, Refit, Score, ScoreWidths

POWERS: Mapping[str, float] = {
    "normalised energy": 0.0,
    "times loss^0.15": 0.15,
    "times loss^0.3": 0.3,
    "times loss^0.6": 0.6,
    "times loss": 1.0,
}
"""`Allocate.importance`."""

WEIGHTINGS: Mapping[str, Mapping[str, float]] = {
    **{name: {"importance": power} for name, power in POWERS.items()},
    "times loss^0.3, widths x 2": {"importance": 0.3, "caution": 2.0},
    "times loss^0.3, widths x 4": {"importance": 0.3, "caution": 4.0},
}
"""Options of `Allocate`."""

CHOSEN = "as measured"


@dataclass(frozen=True)
class Row:
    """One compressed model; `flops_kept` is counted on it.

    Attributes:
        refit: whether every layer was solved again.
        kl_calibration, kl, top1, perplexity: divergence on the calibration data; `evaluation.Figures`.
    """

    weighting: str
    measure: Measure
    budget: float
    refit: bool
    kl_calibration: float
    kl: float
    top1: float
    perplexity: float
    flops_kept: float


@dataclass(frozen=True)
class SiteRow:
    """One site at half its break-even rank, everything else dense.

    Attributes:
        kl: divergence on the first calibration batch.
        predicted: for each weighting, the site's term in the allocator's sum.
    """

    name: str
    rank: int
    kl: float
    predicted: Mapping[str, float]


class Bench:
    """A model, calibrated and scored once."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task = task
        self.judge = Judge(task)
        self._forward = forward_for(task.model)
        self._flops = count_flops(task.model, task.calibration[0])
        self._wanted = answers(task.model, task.calibration)
        self._calibrated = balf_fx.prepare(task.model, task.calibration[0], sensitivity=True, separable=False)
        balf_fx.calibrate(self._calibrated, task.calibration, seed=seed, progress=False)
        self._scored = {measure: self._score(measure) for measure in get_args(Measure)}

    def _score(self, measure: Measure) -> fx.GraphModule:
        """A copy with the loss of each rank and size, and the costs that they have under this measure."""
        model = copy.deepcopy(self._calibrated)
        for run in (Settings(**{measure: 1.0}).find_pivots(), Score("sensitivity"), ScoreWidths()):
            run(model)
        return model

    def row(self, weighting: str, measure: Measure, budget: float, refit: bool) -> Row:
        """Compress under a weighting, and judge."""
        batches = self.task.calibration
        if weighting == CHOSEN:
            asked = {measure: budget, "strict": False, "refit": refit, "progress": False}
            model = balf_fx.convert(self._calibrated, batches=batches, separable=False, **asked)
        else:
            allocate = Allocate(**{measure: budget}, strict=False, **WEIGHTINGS[weighting])
            allocated = self._allocated(measure, allocate)
            if refit:
                Refit([placeholder_values(allocated, batch, self._forward) for batch in batches])(allocated)
            model = rewrite(allocated, written="apart")
        kept = count_flops(model, self.task.calibration[0]) / self._flops
        figures = self.judge.figures(model)
        kl_calibration = self._divergence(model, self.task.calibration)
        return Row(
            weighting, measure, budget, refit, kl_calibration, figures.kl, figures.top1, figures.perplexity, kept
        )

    def site_rows(self) -> Iterable[SiteRow]:
        """Compress one site after the other."""
        for site, nodes in sites(self._scored["flops"]).items():
            curve, rank = annotation(nodes[0]).curve, max(site.break_even // 2, 1)
            if curve is not None:
                model = rewrite(self._allocated("flops", Allocate(ranks={site.name: rank})), written="apart")
                yield SiteRow(site.name, rank, self._divergence(model, self.task.calibration[:1]), _terms(curve, rank))

    def _allocated(self, measure: Measure, allocate: Allocate) -> fx.GraphModule:
        model = copy.deepcopy(self._scored[measure])
        allocate(model)
        return model

    def _divergence(self, model: fx.GraphModule, batches: Sequence[Tensor]) -> float:
        return divergence(self._wanted[: len(batches)], answers(model, batches))


def _terms(curve: RankCurve, rank: int) -> dict[str, float]:
    """A rank's term in the allocator's sum under each weighting, up to a factor that all sites share."""
    lost = curve.normalised(curve.candidates[rank - 1].distortion)
    return {name: lost * (curve.loss or 0.0) ** power for name, power in POWERS.items()}


def correlations(rows: Sequence[SiteRow]) -> dict[str, float]:
    """Spearman's rank correlation of the measured divergence with each weighting's terms."""
    measured = [row.kl for row in rows]
    return {name: float(spearmanr([row.predicted[name] for row in rows], measured)[0]) for name in POWERS}


def table(rows: Sequence[Row], correlation: Mapping[str, float]) -> str:
    """Weightings x budgets: divergence on calibration data, on evaluation data, and top-1."""
    columns = list(dict.fromkeys((row.measure, row.budget, row.refit) for row in rows))
    cells = {
        (row.weighting, (row.measure, row.budget, row.refit)): f"{row.kl_calibration:.4f} {row.kl:.4f} {row.top1:.2f}"
        for row in rows
    }
    lines = [
        [name, f"{correlation[name]:.3f}" if name in correlation else "", *(cells[name, column] for column in columns)]
        for name in dict.fromkeys(row.weighting for row in rows)
    ]
    headers = ["KL calibration, KL, top-1 %", "Spearman"]
    headers += [f"{measure} {budget:g}{', refit' if refit else ''}" for measure, budget, refit in columns]
    return tabulate(lines, headers, disable_numparse=True)


@click.command()
@model_options
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
def main(name: str, flops: tuple[float, ...], params: tuple[float, ...], output: Path | None, **source: Any) -> None:
    """Compress a model under each weighting and each budget, and one site at a time."""
    task = load(name, **source)
    bench = Bench(task, source["seed"])
    settings = itertools.product((*WEIGHTINGS, CHOSEN), budgets(task, flops, params), (False, True))
    site_rows = list(tqdm(bench.site_rows(), desc="sites", unit="site", leave=False))
    progress = tqdm(list(settings), desc="budgets", unit="model", leave=False)
    rows = [bench.row(weighting, *budget, refit) for weighting, budget, refit in progress]
    correlation = correlations(site_rows)
    click.echo(f"{task.title}, calibrated on {task.samples:,} samples, {len(site_rows)} sites\n")
    click.echo(table(rows, correlation))
    if output is not None:
        results = {
            "model": name,
            "title": task.title,
            "images": task.samples,
            "seed": source["seed"],
            "answers": bench.judge.answers,
            "spearman": correlation,
            "results": [dataclasses.asdict(row) for row in rows],
            "sites": [dataclasses.asdict(row) for row in site_rows],
        }
        write_json(output, results)


if __name__ == "__main__":
    main()
