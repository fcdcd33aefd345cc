"""How calibration and linear algebra scale with the number of processes, of one thread each.

python benchmarks/scaling.py --json benchmarks/results/scaling.json

A Llama shape with random weights is calibrated with gradients and scored, in turn by the first process alone and by all
together, so that both see the same machine. The efficiency is t(1) / (n t(n)). What 8 and 64 processes would take is
computed from these times: the largest share of the work, and the time of the exchange, which grows with log2(n). A few
minutes.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from common import ROOT, write_json
from tabulate import tabulate
from torch import nn

import balf_fx
from balf_fx.calibration.batches import Calibration, forward_for
from balf_fx.distributed.group import ALONE, Group, group_of
from balf_fx.distributed.shares import assigned
from balf_fx.engine.compress import score
from balf_fx.engine.program import Part, Program
from balf_fx.engine.settings import Settings
from balf_fx.graph.annotation import sites

SIMULATED = (8, 64)


@dataclass(frozen=True)
class Stage:
    """The seconds that a stage takes in one process and in several."""

    name: str
    processes: int
    alone: float
    together: float
    efficiency: float


@dataclass(frozen=True)
class Simulated:
    """What a stage would take in more processes."""

    name: str
    processes: int
    seconds: float
    efficiency: float


def largest_share(costs: Sequence[float], processes: int) -> float:
    """The share of all work that the process with the most of it does."""
    loads = [0.0] * processes
    for cost, owner in zip(costs, assigned(costs, processes), strict=True):
        loads[owner] += cost
    return max(loads) / sum(costs)


def simulate(stage: Stage, costs: Sequence[float], processes: int) -> Simulated:
    """The time in more processes, from that in one and in a few.

    Args:
        costs: of the items that are shared out; what is left of the measured time is taken for the exchange.
    """
    exchange = max(stage.together - stage.alone * largest_share(costs, stage.processes), 0.0)
    steps = math.log2(processes) / math.log2(stage.processes)
    seconds = stage.alone * largest_share(costs, processes) + exchange * steps
    return Simulated(stage.name, processes, seconds, stage.alone / (processes * seconds))


def llama(layers: int, width: int) -> nn.Module:
    """A language model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_attention_heads": width // 32}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=layers, use_cache=False, **shape)).eval()


def measure(layers: int, width: int, samples: int, rounds: int) -> dict[str, Any]:
    """Measure both stages in the processes of torch.distributed; the costs are those of the sites."""
    group = group_of(torch.device("cpu"))
    tokens = torch.randint(512, (samples, 128), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in tokens.split(2)]
    own = batches[group.rank :: group.size]
    prepared = balf_fx.prepare(llama(layers, width), batches[0], factors="sensitivity")
    program, settings = Program((Part(prepared),), lambda _, batch: batch), Settings(flops=0.5)

    def calibrate(part: list[Any], distributed: bool) -> None:
        balf_fx.calibrate(prepared, part, progress=False, distributed=distributed)

    def scored(group: Group) -> None:
        score(program, settings, Calibration((), forward_for(prepared), group=group))

    tasks: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "calibration": (lambda: calibrate(batches, False), lambda: calibrate(own, True)),
        "linear algebra": (lambda: scored(ALONE), lambda: scored(group)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for _ in range(rounds + 1):
        for name, (alone, together) in tasks.items():
            _reset(prepared)
            calibrate(own, True)  # new statistics, which are scored again
            first = _seconds(alone) if group.rank == 0 else 0.0
            dist.barrier()
            _reset(prepared)
            calibrate(own, True)
            dist.barrier()
            second = max(group.gathered(_seconds(together)))
            times[name].append((first, second))
    stages = [_stage(name, group.size, pairs[1:]) for name, pairs in times.items()]  # the first round warms up
    costs = [float(site.full_rank) ** 3 * site.groups for site in sites(prepared)]
    return {"stages": [asdict(stage) for stage in stages], "costs": costs, "batches": len(batches)}


def _stage(name: str, processes: int, pairs: Sequence[tuple[float, float]]) -> Stage:
    ratio = statistics.median(first / second for first, second in pairs)
    alone, together = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Stage(name, processes, alone, together, ratio / processes)


def _reset(prepared: nn.Module) -> None:
    for module in prepared.modules():
        if hasattr(module, "statistics"):
            module.statistics = (None,) * len(module.statistics)


def _seconds(task: Callable[[], None]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def run(processes: int, options: Sequence[str]) -> dict[str, Any]:
    """Start the processes, and return what the first one has measured."""
    with tempfile.TemporaryDirectory() as folder:
        here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, *options, "--folder", folder, "--processes", str(processes)]
        started = [subprocess.Popen([*command, "--rank", str(rank)], env=here) for rank in range(processes)]
        try:
            codes = [process.wait() for process in started]
        finally:
            for process in started:
                process.kill()
        if any(codes):
            raise click.ClickException("a process has failed")
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
        return found


@click.command()
@click.option("--layers", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--width", type=click.IntRange(min=32), default=256, show_default=True)
@click.option("--samples", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--processes", type=click.IntRange(min=2), default=2, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
@click.option("--folder", type=click.Path(path_type=Path), hidden=True, help="Where the processes meet.")
@click.option("--rank", type=int, hidden=True, help="Measure as this process.")
def main(
    layers: int,
    width: int,
    samples: int,
    rounds: int,
    processes: int,
    output: Path | None,
    folder: Path | None,
    rank: int | None,
) -> None:
    """Measure how calibration and linear algebra scale."""
    if folder is not None and rank is not None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
        found = measure(layers, width, samples, rounds)
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        dist.destroy_process_group()
        return
    sizes = {"layers": layers, "width": width, "samples": samples, "rounds": rounds}
    found = run(processes, [word for name, value in sizes.items() for word in (f"--{name}", str(value))])
    stages = [Stage(**stage) for stage in found["stages"]]
    costs = {"calibration": [1.0] * math.lcm(processes, *SIMULATED), "linear algebra": found["costs"]}
    more = [simulate(stage, costs[stage.name], count) for stage in stages for count in SIMULATED]
    click.echo(tabulate([asdict(stage) for stage in stages], headers="keys", floatfmt=".3f"))
    click.echo(tabulate([asdict(each) for each in more], headers="keys", floatfmt=".3f"))
    if output is not None:
        rows = {"measured": [asdict(stage) for stage in stages], "simulated": [asdict(each) for each in more]}
        write_json(output, {"model": "Llama", "batches": found["batches"], **rows})


if __name__ == "__main__":
    main()
