"""Top-1 of compressed ResNet-20 on CIFAR-10, without fine-tuning: methods x budgets.

python benchmarks/accuracy.py --data FOLDER --json benchmarks/results/accuracy_resnet20.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from cifar import Cifar, load
from common import count_flops, top1, write_json
from tabulate import tabulate
from torch import fx
from tqdm import tqdm

import balf_fx

METHODS: Mapping[str, Mapping[str, Any]] = {
    "svd": {"fold_batchnorm": False, "factors": "svd"},
    "uniform": {**balf_fx.BALF, "allocation": "uniform"},
    "energy": {**balf_fx.BALF, "allocation": "energy"},
    "balf": balf_fx.BALF,
    "ours": {},
}
"""Keyword arguments of `balf_fx.compile`."""

REFERENCE = {0.9: 91.46, 0.8: 89.57, 0.7: 85.85, 0.6: 79.11, 0.5: 66.56, 0.4: 40.66, 0.3: 20.15}
"""Top-1 of BALF's reference implementation at each budget: same weights, calibration and test images."""


@dataclass(frozen=True)
class Row:
    """One compressed model; `flops_kept` is counted on it, not computed."""

    method: str
    flops: float
    top1: float
    flops_kept: float


class Bench:
    """Prepares and calibrates once for each setting of BatchNorm folding, then converts for each budget."""

    def __init__(self, cifar: Cifar) -> None:
        self.cifar = cifar
        self.calibration = [images for images, _ in cifar.calibration.batches()]
        self.dense_flops = count_flops(cifar.model, self.calibration[0])
        self._prepared: dict[bool, fx.GraphModule] = {}

    def dense(self) -> float:
        """Top-1 of the model as it is."""
        return top1(self.cifar.model, self.cifar.test.batches())

    def compressed(self, method: str, flops: float) -> Row:
        """Compress and evaluate."""
        options = dict(METHODS[method])
        prepared = self._calibrated(fold=options.pop("fold_batchnorm", True))
        model = balf_fx.convert(prepared, flops=flops, progress=False, **options)
        kept = count_flops(model, self.calibration[0]) / self.dense_flops
        return Row(method, flops, top1(model, self.cifar.test.batches()), kept)

    def _calibrated(self, fold: bool) -> fx.GraphModule:
        if fold not in self._prepared:
            prepared = balf_fx.prepare(self.cifar.model, self.calibration[0], fold_batchnorm=fold)
            balf_fx.calibrate(prepared, self.calibration, progress=False)
            self._prepared[fold] = prepared
        return self._prepared[fold]


def table(rows: Sequence[Row]) -> str:
    """Methods x budgets: top-1 and, in brackets, the share of FLOPs counted."""
    budgets = list(dict.fromkeys(row.flops for row in rows))
    cells = {(row.method, row.flops): f"{row.top1:.2f} ({row.flops_kept:.4f})" for row in rows}
    methods = dict.fromkeys(row.method for row in rows)
    lines = [[method, *(cells[method, budget] for budget in budgets)] for method in methods]
    lines.append(["BALF reference", *(f"{REFERENCE[budget]:.2f}" if budget in REFERENCE else "" for budget in budgets)])
    return tabulate(lines, ["top-1 % (FLOPs kept)", *(f"{budget:g}" for budget in budgets)], disable_numparse=True)


@click.command()
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Repeatable; default: all.")
@click.option("--flops", "budgets", multiple=True, type=float, default=tuple(REFERENCE), help="Repeatable.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder with cifar10.npz and resnet20.pth.")
@click.option("--cifar-root", type=click.Path(path_type=Path), help="Root of torchvision's CIFAR10.")
@click.option("--weights", type=click.Path(path_type=Path), help="State dict of ResNet-20.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
def main(
    methods: Sequence[str],
    budgets: Sequence[float],
    data: Path | None,
    cifar_root: Path | None,
    weights: Path | None,
    output: Path | None,
) -> None:
    """Compress ResNet-20 with each method under each budget and print top-1 on CIFAR-10's test images."""
    bench = Bench(load(data, cifar_root, weights))
    dense = bench.dense()
    pairs = [(method, budget) for method in methods or METHODS for budget in budgets]
    rows = [bench.compressed(method, budget) for method, budget in tqdm(pairs, unit="model", leave=False)]
    click.echo(f"dense: {dense:.2f} % on {len(bench.cifar.test):,} images, {bench.dense_flops:,} FLOPs a batch\n")
    click.echo(table(rows))
    if output is not None:
        reference = {f"{budget:g}": figure for budget, figure in REFERENCE.items()}
        results = {
            "model": "ResNet-20, CIFAR-10",
            "calibration_images": len(bench.cifar.calibration),
            "test_images": len(bench.cifar.test),
            "dense_top1": round(dense, 4),
            "balf_reference_top1": reference,
            "results": [asdict(row) for row in rows],
        }
        write_json(output, results)


if __name__ == "__main__":
    main()
