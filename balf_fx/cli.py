"""The command `balf-fx`."""

from __future__ import annotations

try:
    import click
except ImportError:
    raise SystemExit('the command balf-fx needs click: pip install "balf-fx[cli]"') from None

from balf_fx.demo import run_demo
from balf_fx.errors import BalfError


@click.group()
def main() -> None:
    """Make trained PyTorch models smaller and faster without fine-tuning."""


@main.command()
@click.option(
    "--flops",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.55,
    show_default=True,
    help="Fraction of FLOPs to keep.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of split and training.")
@click.option("--epochs", type=click.IntRange(min=1), default=5, show_default=True, help="Epochs of training.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def demo(flops: float, seed: int, epochs: int, as_json: bool) -> None:
    """Train a small net on handwritten digits, compress it, and show what that cost and saved."""
    try:
        result = run_demo(flops, seed=seed, epochs=epochs, progress=not as_json)
    except BalfError as error:
        raise click.ClickException(str(error)) from error
    click.echo(result.to_json() if as_json else str(result))
