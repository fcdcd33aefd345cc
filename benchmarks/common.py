"""What the benchmarks share: counting, and the header of a results file."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from balf_fx.graph.flops import flop_counter


def count_flops(model: nn.Module, batch: Tensor) -> int:
    """FLOPs of one call, as torch counts them."""
    with torch.no_grad(), flop_counter() as counter:
        model(batch)
    return counter.get_total_flops()


def machine() -> dict[str, Any]:
    """Where a result comes from."""
    return {
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def cpu_name() -> str:
    """The processor's name, as far as the platform tells it, and the instruction set torch uses."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write results under the machine's header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**machine(), **results}, indent=2) + "\n")
