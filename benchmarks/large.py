"""What a compression of a large language model costs: the time of its stages, and its memory.

python benchmarks/large.py --shape 100M --effort fast --json benchmarks/results/large.json
python benchmarks/large.py --shape 7B --effort fast --device cuda
python benchmarks/large.py --paper --json benchmarks/results/large.json

Shapes are those of Llama, in bfloat16; weights and tokens are random, since the cost depends on shapes alone. Each case
runs in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from common import run_apart, write_json
from shapes import SHAPES, Shape, on_paper
from stages import StageClock, peak_gib, resident_gib
from tabulate import tabulate
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import balf_fx
from balf_fx.latency.stopwatch import seconds as seconds_of

PARAMS = 0.8


@dataclass(frozen=True)
class Cost:
    """Of one process: seconds, and GiB above what the model itself takes.

    Attributes:
        layers: of the model that was compressed.
        weights, peak, device_peak: of the model, of the process, and of the accelerator's memory.
        forward: seconds of one pass over the calibration batches.
        stages: seconds of each stage.
        kept: the share of the parameters.
    """

    shape: str
    layers: int
    effort: str
    device: str
    weights: float
    peak: float
    device_peak: float
    forward: float
    seconds: float
    stages: Mapping[str, float]
    kept: float


def build(shape: Shape, layers: int | None, device: torch.device) -> nn.Module:
    """The model with random weights in bfloat16, and made where it is."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.words,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        use_cache=False,
    )
    with device:
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def measure(shape: str, layers: int | None, effort: str, device: torch.device, sequences: int, length: int) -> Cost:
    """Compress in this process."""
    sizes = SHAPES[shape]
    model = build(sizes, layers, device)
    tokens = torch.randint(sizes.words, (sequences, length), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": each.to(device)} for each in tokens.split(4)]

    def run() -> None:
        for batch in batches:
            model(**batch)

    with torch.no_grad():
        model(**batches[0])
        forward = seconds_of(run, device)
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 2**30
    before, clock = resident_gib(), StageClock()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    kept: list[float] = []

    @clock.around
    def compress() -> None:
        small = balf_fx.compile(model, batches, params=PARAMS, effort=effort, strict=False)
        kept.append(balf_fx.report(small).params_kept)

    seconds = seconds_of(compress, device)
    above = torch.cuda.max_memory_allocated(device) / 2**30 - weights if device.type == "cuda" else 0.0
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    stages = dict(clock.seconds[-1])
    count = layers or sizes.layers
    return Cost(shape, count, effort, where, weights, peak_gib() - before, above, forward, seconds, stages, kept[0])


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="100M", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="Fewer of the same layers; by default, all.")
@click.option("--effort", type=click.Choice(["fast", "balanced", "best"]), default="fast", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--sequences", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--length", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of each.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Add the result to this file.")
@click.option("--paper", is_flag=True, help="Print what all shapes would cost, from the complete cases in the file.")
@click.option("--here", is_flag=True, hidden=True, help="Measure in this process and print the result as JSON.")
def main(output: Path | None, paper: bool, here: bool, **case: Any) -> None:
    """Compress a model of a shape, and print what it took."""
    if paper:
        if output is None or not output.exists():
            raise click.UsageError("--paper needs the file of measured cases: pass it with --json")
        for cost in json.loads(output.read_text())["results"]:
            if cost["layers"] == SHAPES[cost["shape"]].layers:
                click.echo(
                    f"{cost['effort']}, {cost['device']}, from {cost['shape']}: {cost['seconds'] / 3600:.3f} hours"
                )
                click.echo(tabulate(on_paper(cost), "keys", floatfmt=".3f"))
        return
    if here:
        click.echo(json.dumps(asdict(measure(**{**case, "device": torch.device(case["device"])}))))
        return
    words = [f"--{name}={value}" for name, value in case.items() if value is not None]
    cost = run_apart(__file__, *words, "--here")
    stages = cost["stages"]
    click.echo(tabulate([{name: value for name, value in cost.items() if name != "stages"}], "keys", floatfmt=".3f"))
    click.echo(tabulate(list(stages.items()), ["stage", "seconds"], floatfmt=".1f"))
    if output is not None:
        earlier = json.loads(output.read_text()) if output.exists() else {}
        same = ("shape", "layers", "effort", "device")
        kept = [row for row in earlier.get("results", []) if any(row[name] != cost[name] for name in same)]
        write_json(output, {"params": PARAMS, "results": [*kept, cost]}, earlier or None)


if __name__ == "__main__":
    main()
