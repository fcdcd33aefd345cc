"""Compression and quantization, alone and one after the other: what is on disk, and what is right.

python benchmarks/quantization.py --json benchmarks/results/quantization.json

Each model, and the model compressed to its budget, is left as it is and quantized in the ways that suit it: by
torchao's `quantize_` where its weights are linear layers', by PT2E and in FX graph mode where they are convolutions'.
Nothing that quantization needs is tuned. `int4 weights` are rounded to 4 bits with one scale for each output, but lie
in whole bytes: torchao packs them on other devices only. Sizes are those of saved state dicts.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click
import torch
from common import write_json
from evaluation import Judge
from models import MODELS
from tabulate import tabulate
from task import Measure, Metric, Source, Task
from torch import Tensor, nn
from tqdm import tqdm

import balf_fx
from balf_fx.engine.settings import Effort

Recipe = Callable[[nn.Module, Sequence[Tensor]], nn.Module]
"""Quantizes a copy of a model; may look at calibration batches."""


@dataclass(frozen=True)
class Case:
    """What a model is compressed to, how, on how many samples (None: its default), and judged by (None: all)."""

    measure: Measure
    budget: float
    effort: Effort
    images: int | None
    evaluate: int | None
    recipes: Mapping[str, Recipe]


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        variant: "dense" or "compressed".
        quantization: the recipe, "none" for float32.
        bytes: of the saved state dict.
        kl: divergence from the dense model in float32.
    """

    variant: str
    quantization: str
    bytes: int
    top1: float
    perplexity: float
    kl: float


def torchao_recipe(config: str, **options: Any) -> Recipe:
    """torchao's `quantize_` with a configuration of that name, on linear layers that share no weight."""

    def quantize(model: nn.Module, _: Sequence[Tensor]) -> nn.Module:
        from torchao import quantization

        quantized = copy.deepcopy(model)
        owners = Counter(id(p) for module in quantized.modules() for p in module.parameters(recurse=False))
        quantization.quantize_(
            quantized,
            getattr(quantization, config)(**options),
            filter_fn=lambda layer, _: isinstance(layer, nn.Linear) and owners[id(layer.weight)] == 1,
        )
        return quantized

    return quantize


def pt2e(model: nn.Module, calibration: Sequence[Tensor], *, linear: bool = True) -> nn.Module:
    """PT2E quantization for inductor on x86: int8 weights and activations, `linear` layers included or not."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    with torch.no_grad():
        shapes = ({0: torch.export.Dim.AUTO},)
        exported = torch.export.export(model, (calibration[0],), dynamic_shapes=shapes).module()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        if not linear:
            quantizer.set_function_type_qconfig(nn.functional.linear, None)
        prepared = prepare_pt2e(exported, quantizer)
        for batch in calibration:
            prepared(batch)
        return without_unread(convert_pt2e(prepared))


def without_unread(converted: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Drop the float weights that `convert_pt2e` leaves beside the quantized ones that the graph reads."""
    read = {str(node.target) for node in converted.graph.find_nodes(op="get_attr")}
    for path in [path for path, _ in converted.named_parameters() if path not in read]:
        owner, _, name = path.rpartition(".")
        delattr(converted.get_submodule(owner), name)
    return converted


def fx_graph_mode(model: nn.Module, calibration: Sequence[Tensor]) -> nn.Module:
    """FX graph mode quantization: int8 weights and activations in torch's own quantized modules."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    mapping = get_default_qconfig_mapping("x86")
    prepared = prepare_fx(copy.deepcopy(model), mapping, (calibration[0],))
    with torch.no_grad():
        for batch in calibration:
            prepared(batch)
    return convert_fx(prepared)


LINEAR: Mapping[str, Recipe] = {
    "int8 weights": torchao_recipe("Int8WeightOnlyConfig"),
    "int8 weights, int8 activations": torchao_recipe("Int8DynamicActivationInt8WeightConfig"),
    "int4 weights": torchao_recipe("IntxWeightOnlyConfig", weight_dtype=torch.int4),
}
CONVOLUTIONS: Mapping[str, Recipe] = {"PT2E, int8": pt2e, "FX graph mode, int8": fx_graph_mode}
CASES: Mapping[str, Case] = {
    "resnet20": Case("flops", 0.6, "best", 256, 2000, CONVOLUTIONS),
    "vit_tiny": Case("flops", 0.9, "balanced", 256, 400, LINEAR),
    "stories": Case("params", 0.8, "best", None, None, LINEAR),
}


def stored_bytes(model: nn.Module) -> int:
    """Size of the saved state dict."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def rows(task: Task, judge: Judge, compressed: nn.Module, recipes: Mapping[str, Recipe]) -> Iterator[Row]:
    """Both models, as they are and quantized."""
    for variant, model in (("dense", task.model), ("compressed", compressed)):
        yield _row(judge, variant, "none", model)
        for name, recipe in recipes.items():
            yield _row(judge, variant, name, recipe(model, task.calibration))


def _row(judge: Judge, variant: str, quantization: str, model: nn.Module) -> Row:
    figures = judge.figures(model)
    return Row(variant, quantization, stored_bytes(model), figures.top1, figures.perplexity, figures.kl)


def table(found: Sequence[Row], metric: Metric) -> str:
    """Variants x quantization: size, as a share of the dense model in float32, and what it answers."""
    whole = found[0].bytes
    lines = [
        (row.variant, row.quantization, f"{row.bytes:,}", f"{row.bytes / whole:.3f}", _figure(row, metric))
        for row in found
    ]
    figure = "top-1 %" if metric == "top1" else "perplexity"
    return tabulate(lines, ["", "quantization", "bytes", "x", figure], disable_numparse=True)


def _figure(row: Row, metric: Metric) -> str:
    return f"{row.top1:.2f}" if metric == "top1" else f"{row.perplexity:.3f}"


@click.command()
@click.option("--model", "names", type=click.Choice(list(CASES)), multiple=True, default=list(CASES), show_default=True)
@click.option("--effort", type=click.Choice(get_args(Effort)), help="Default: what suits the model's size.")
@click.option("--images", type=click.IntRange(min=1), help="Calibration images, or sequences of 512 tokens.")
@click.option("--evaluate", type=click.IntRange(min=1), help="Only the first so many images or stories.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which samples, and probes.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder with the data and the weights.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
def main(
    names: tuple[str, ...],
    effort: Effort | None,
    images: int | None,
    evaluate: int | None,
    seed: int,
    data: Path | None,
    output: Path | None,
) -> None:
    """Compress, quantize, and both."""
    results = []
    for name in names:
        case = CASES[name]
        source = Source(data, images=images or case.images, seed=seed, evaluate=evaluate or case.evaluate)
        task = MODELS[name](source)
        judge = Judge(task)
        budget: dict[str, Any] = {case.measure: case.budget}
        options: dict[str, Any] = {"effort": effort or case.effort, "seed": seed, "pivot": False}  # pivots round worse
        compressed = balf_fx.compile(task.model, task.calibration, **options, **budget)
        total = 2 * (1 + len(case.recipes))
        found = list(tqdm(rows(task, judge, compressed, case.recipes), total=total, unit="model", leave=False))
        click.echo(f"{task.title}, compressed to {case.budget:g} of its {case.measure} on {task.samples:,} samples\n")
        click.echo(f"{table(found, task.metric)}\n")
        results.append(
            {
                "model": name,
                "title": task.title,
                "images": task.samples,
                "seed": seed,
                "effort": effort or case.effort,
                **budget,
                "answers": judge.answers,
                "results": [dataclasses.asdict(row) for row in found],
            }
        )
        if output is not None:
            write_json(output, {"models": results})


if __name__ == "__main__":
    main()
