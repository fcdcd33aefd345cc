"""What `import balf_fx` costs on top of `import torch`.

    python benchmarks/import_time.py --json benchmarks/results/import_time.json

Processes take turns, so that the machine's moods hit both alike; the figure is the median of their ratios.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
from common import write_json

TORCH, BOTH = "import torch", "import torch, balf_fx"
_ROOT = Path(__file__).parents[1]


def seconds(code: str) -> float:
    """Wall-clock time of a process that runs this code."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True)
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, float]:
    """Medians over the rounds, after one that warms the file cache and does not count."""
    pairs = [(seconds(TORCH), seconds(BOTH)) for _ in range(rounds + 1)][1:]
    return {
        "rounds": rounds,
        "torch_seconds": statistics.median(alone for alone, _ in pairs),
        "torch_and_balf_fx_seconds": statistics.median(both for _, both in pairs),
        "added_seconds": statistics.median(both - alone for alone, both in pairs),
        "ratio": statistics.median(both / alone for alone, both in pairs),
    }


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=21, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
def main(rounds: int, output: Path | None) -> None:
    """Measure the time of both imports."""
    results = measure(rounds)
    for name, value in results.items():
        click.echo(f"{name:26} {value:.3f}" if isinstance(value, float) else f"{name:26} {value}")
    if output is not None:
        write_json(output, results)


if __name__ == "__main__":
    main()
