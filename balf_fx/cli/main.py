"""The command `balf-fx`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from balf_fx.api import compile, save
from balf_fx.api import report as report_of
from balf_fx.calibration.batches import cache_arguments, forward_for
from balf_fx.cli.demo import run_demo
from balf_fx.cli.processes import joined
from balf_fx.cli.sweep import SweepData, run_sweep
from balf_fx.cli.text import open_tokenizer
from balf_fx.engine.options import settings_from
from balf_fx.errors import BalfError, OptionError
from balf_fx.graph.curves import Measure
from balf_fx.reporting.curve import Sweep
from balf_fx.reporting.report import Report
from balf_fx.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

try:
    import click

    from balf_fx.cli.options import Inputs, OutputFile, input_options, numbers
    from balf_fx.cli.settings import SHARE, setting_options
except ImportError:
    raise SystemExit('the command balf-fx needs click, numpy and pillow: pip install "balf-fx[cli]"') from None


_EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)
_EXISTING_RESULT = click.Path(exists=True, path_type=Path)
_PICTURE = OutputFile(".png", ".svg", ".pdf")
_NOT_IN_SWEEP = (
    "flops",
    "params",
    "latency",
    "energy",
    "allocation",
    "disagreement",
    "divergence",
    "confidence",
    "minimise",
)
_DEFAULT_BUDGETS = "0.9,0.8,0.7,0.6,0.5,0.4,0.3"


def _shares(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    found = numbers(ctx, param, value) or ()
    if not all(0 < share <= 1 for share in found):
        raise click.BadParameter(f"{value!r} must be fractions in (0, 1]", ctx, param)
    return found


class _Commands(click.Group):
    """Commands that report errors by a message and an exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of the output has ended, which click handles
            raise
        except (BalfError, OSError) as error:  # such as a full disk, or no network
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="balf-fx")
def main() -> None:
    """Make trained PyTorch models smaller and faster without fine-tuning.

    Exit codes: 0 for success, 1 for an error, whose message says what to do, 2 for wrong usage.
    """


@main.command()
@input_options
@setting_options()
@click.option(
    *("--validation-samples", "validation"),
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="At most this many samples of the rest of --data or --text, to test --disagreement or --divergence on.",
)
@click.option(
    *("--output", "-o"),
    type=OutputFile(".safetensors", ""),
    required=True,
    help="File of the result; or, for a model of transformers, a folder that its from_pretrained reads.",
)
@click.option("--html", type=OutputFile(".html"), help="Also write the report as an HTML page.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def compress(output: Path, html: Path | None, as_json: bool, validation: int, **inputs: Any) -> None:
    """Compress a model, save it, and print what was done.

    MODEL is torchvision:NAME, timm:NAME, hf:FOLDER_OR_NAME, or MODULE:FACTORY, your own function without arguments.

    \b
    balf-fx compress torchvision:resnet18 --pretrained --data images/ --flops 0.6 -o small.safetensors
    balf-fx compress mine:make_net --weights net.pt --data arrays.npz --array x --params 0.5 -o small.safetensors
    balf-fx compress timm:resnet18 --weights net.pt --data images/ --disagreement 0.02 -o small.safetensors
    balf-fx compress hf:folder --text data.txt --params 0.8 -o small
    torchrun --nproc-per-node 2 -m balf_fx.cli compress hf:folder --text data.txt --params 0.8 -o small
    """
    if html is not None:
        importlib.import_module("balf_fx.reporting.page")  # fails before any work if a dependency is missing
    given, options = Inputs.split(inputs)
    if not output.suffix and options.setdefault("result", "module") != "module":
        raise click.UsageError("a folder holds a model: pass --result module, or an --output ending in .safetensors")
    limited = {"disagreement", "divergence"} & set(options)
    try:
        settings_from({**options, "validation": []} if limited else options).with_free().allocate()  # before any work
    except OptionError as error:
        raise click.UsageError(str(error)) from error
    with joined(options.get("distributed", True)) as rank:
        model = given.load_model(rank)
        if not output.suffix and not hasattr(model, "save_pretrained"):
            raise click.UsageError("only models of transformers have folders: pass an --output ending in .safetensors")
        if given.text is not None:
            options["forward"] = forward_for(model, **cache_arguments(model))
        if limited:
            options["validation"], _ = given.evaluation(model, None, None, None, validation)
        small = compile(model, given.calibration(model), **options)
    if rank > 0:
        return
    _save(small, output, given)
    found = report_of(small)
    if html is not None:
        _write_page(html, found)
    click.echo(found.to_json() if as_json else str(found))
    click.echo(f"saved as {output}", err=True)


@main.command()
@click.argument("file", type=_EXISTING_RESULT)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--html", type=OutputFile(".html"), help="Write an HTML page with the plot and the tables.")
@click.option("--sweep", "curve", type=_EXISTING, help="Output of `sweep --json`, to add its plot to the HTML page.")
@click.option("--plot", type=_PICTURE, help="Write only the plot, as .png, .svg or .pdf.")
def report(file: Path, as_json: bool, html: Path | None, curve: Path | None, plot: Path | None) -> None:
    """Print what was done to the model in FILE, a file or a folder written by `compress`, or a plan as .json."""
    if curve is not None and html is None:
        raise click.UsageError("--sweep adds a plot to the HTML page: pass --html, too")
    found = report_of(file)
    if html is not None:
        _write_page(html, found, None if curve is None else Sweep.from_json(curve.read_bytes()))
    if plot is not None:
        from balf_fx.reporting.plots import plot_report

        _write(plot_report(found), plot)
    click.echo(found.to_json() if as_json else str(found))


@main.command()
@input_options
@setting_options(skip=_NOT_IN_SWEEP)
@click.option("--budgets", callback=_shares, default=_DEFAULT_BUDGETS, show_default=True, help="Fractions to keep.")
@click.option(
    *("--measure", "measure"),
    type=click.Choice(get_args(Measure)),
    default="flops",
    show_default=True,
    help="What the budgets are fractions of.",
)
@click.option(
    "--eval-data", type=click.Path(exists=True, path_type=Path), help="Evaluation data; default: the rest of --data."
)
@click.option("--eval-array", metavar="NAME", help="Array in the .npz file of --eval-data; default: the only one.")
@click.option(
    "--eval-samples", type=click.IntRange(min=1), default=1000, show_default=True, help="At most this many samples."
)
@click.option("--labels", metavar="NAME", help="Array of classes in the .npz file of the evaluation data.")
@click.option("--plot", type=_PICTURE, help="Plot the curve, as .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def sweep(budgets: tuple[float, ...], measure: Any, plot: Path | None, as_json: bool, **inputs: Any) -> None:
    """Compare the dense model's predictions with those at several budgets, on data not used for calibration.

    MODEL is as in `compress`.

    \b
    balf-fx sweep timm:resnet18 --weights net.pt --data images.npz --array x --labels y --plot curve.png
    balf-fx sweep hf:folder --text data.txt --measure params
    """
    if plot is not None:
        importlib.import_module("balf_fx.reporting.plots")
    where = {name: inputs.pop(name) for name in ("eval_data", "eval_array", "labels", "eval_samples")}
    given, options = Inputs.split(inputs)
    model = given.load_model()
    evaluation, known = given.evaluation(model, *where.values())
    data = SweepData(given.calibration(model), evaluation, known, is_text=given.text is not None)
    found = run_sweep(model, data, budgets, measure, **options)
    if plot is not None:
        from balf_fx.reporting.plots import plot_sweep

        _write(plot_sweep(found), plot)
    click.echo(found.to_json() if as_json else str(found))


@main.command()
@click.option("--flops", type=SHARE, default=0.55, show_default=True, help="Fraction of FLOPs to keep.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the split and the training.")
@click.option("--epochs", type=click.IntRange(min=1), default=5, show_default=True, help="Number of training epochs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def demo(flops: float, seed: int, epochs: int, as_json: bool) -> None:
    """Train a small net on handwritten digits, compress it, and show its accuracy and cost before and after."""
    result = run_demo(flops, seed=seed, epochs=epochs, progress=not as_json)
    click.echo(result.to_json() if as_json else str(result))


def _save(small: Any, output: Path, given: Inputs) -> None:
    """Write a file or, with the tokenizer that read the text, a folder."""
    if output.suffix:
        save(small, output)
        return
    small.save_pretrained(output)
    if given.text is not None:
        open_tokenizer(given.model).save_pretrained(output)


def _write_page(path: Path, found: Report, curve: Sweep | None = None) -> None:
    from balf_fx.reporting.page import render

    path.write_text(render(found, curve), encoding="utf-8")


def _write(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
