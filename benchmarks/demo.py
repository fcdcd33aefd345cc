"""What `balf-fx demo` prints: a small net on handwritten digits, before and after compression.

python benchmarks/demo.py --json benchmarks/results/demo.json
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from common import write_json

from balf_fx.cli.demo import run_demo


@click.command()
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results here.")
def main(output: Path | None) -> None:
    """Train, compress and measure as the demo does by default."""
    result = run_demo(progress=True)
    click.echo(result)
    if output is not None:
        write_json(output, asdict(result))


if __name__ == "__main__":
    main()
