"""Every option is at every door, and says what it means and what is wrong with a value."""

import dataclasses
import inspect
import pydoc
import sys

import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.backend import balf
from balf_fx.dynamo.options import _ELSEWHERE, parse_options
from balf_fx.engine.options import options_of, settings_from
from balf_fx.engine.settings import Settings
from balf_fx.errors import BalfError, OptionError

LIMITS = ("disagreement", "divergence", "validation", "confidence", "minimise")
FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
DEFAULTS = {name: field.default for name, field in FIELDS.items()}


def loss(output, batch):
    return output.square().mean()


def weights(batch):
    return torch.ones(len(batch))


OTHERS = {
    "params": 0.5,
    "runner": "eager",
    "effort": "balanced",
    "factors": "svd",
    "widths": False,
    "pivot": False,
    "separable": True,
    "multiple_of": 8,
    "confidence": 0.9,
    "minimise": "params",
    "allocation": "uniform",
    "centred": False,
    "split": False,
    "fold_batchnorm": False,
    "include": ["0", "2"],
    "exclude": ["1"],
    "dense": ["2"],
    "strict": False,
    "capture": "export",
    "result": "module",
    "refit": "up",
    "temperature": True,
    "loss": loss,
    "weights": weights,
    "memory": "2G",
    "distributed": False,
    "seed": 3,
    "checkpoint": "folder",
    "safetensors": "weights",
    "progress": False,
}
"""Another value than the default of every option but for those that exclude each other."""


@pytest.fixture
def prepared():
    graph_module = balf_fx.prepare(nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(4, 8))
    graph_module(torch.randn(32, 8))
    return graph_module


def of_options(function, *own):
    parameters = inspect.signature(function).parameters
    return {name: each.default for name, each in parameters.items() if name not in own}


def test_every_option_is_tried_here():
    assert set(OTHERS) == set(FIELDS) - {"flops", "latency", "energy", "disagreement", "divergence", "validation"}
    assert all(value != DEFAULTS[name] for name, value in OTHERS.items())
    assert dataclasses.asdict(settings_from(OTHERS)) == {**dataclasses.asdict(Settings()), **OTHERS}


def test_compile_takes_every_option():
    assert of_options(balf_fx.compile, "model", "calib_batches", "forward") == DEFAULTS
    for name, value in OTHERS.items():  # with one budget too many, of which it is told first
        with pytest.raises(OptionError, match="exactly one budget, flops"):
            balf_fx.compile(nn.Identity(), [], **{"flops": 0.5, "params": 0.5, name: value})


def test_prepare_calibrate_and_convert_take_every_option_between_them(prepared):
    doors = {
        "prepare": of_options(balf_fx.prepare, "model", "example", "forward", "sensitivity"),
        "calibrate": of_options(balf_fx.calibrate, "prepared", "batches", "forward"),
        "convert": of_options(balf_fx.convert, "prepared", "batches", "forward", "model"),
    }
    assert {name for names in doors.values() for name in names} == set(FIELDS)
    for stage, found in doors.items():
        assert list(found) == list(options_of(stage)) or sorted(found) == sorted(options_of(stage))
        changed = {"factors": "activations"} if stage == "prepare" else {}  # None where `convert` decides
        assert found == {name: changed.get(name, DEFAULTS[name]) for name in found}
    balf_fx.prepare(nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(4, 8), **doors["prepare"])
    balf_fx.calibrate(prepared, [torch.randn(4, 8)], **{**doors["calibrate"], "progress": False})
    balf_fx.convert(prepared, **{**doors["convert"], "flops": 1.0, "progress": False})


def test_the_backend_takes_every_option_that_needs_no_whole_model():
    for name, value in OTHERS.items():
        if name not in _ELSEWHERE:
            options = {name: value} if name == "params" else {"flops": 0.5, name: value}
            assert getattr(parse_options(options).settings, name) == value
    with pytest.raises(OptionError, match="'capture' is not an option here: Dynamo captures the graphs"):
        parse_options({"flops": 0.5, "capture": "export"})
    with pytest.raises(OptionError, match="'disagreement' is not an option here: it is measured on outputs of"):
        parse_options({"disagreement": 0.02})


def test_commands_take_every_option(monkeypatch, tmp_path):
    pytest.importorskip("click")
    np = pytest.importorskip("numpy")
    from click.testing import CliRunner

    from balf_fx.cli import main

    listed = {command: CliRunner().invoke(main.main, [command, "--help"]).output for command in ("compress", "sweep")}
    words = {name: f"--{name.replace('_', '-')}" for name in FIELDS} | {
        "progress": "--quiet",
        "weights": "--position-weights",
        "validation": "--validation-samples",
    }
    budget = {"flops", "params", "latency", "energy", "allocation", *LIMITS}
    assert [name for name, word in words.items() if f"{word} " not in listed["compress"].replace("/", " ")] == []
    assert {name for name, word in words.items() if f"{word} " not in listed["sweep"].replace("/", " ")} == budget

    given = {}

    def functions():
        module = sys.modules.pop("balf_fx_settings")
        return {"loss": module.loss, "weights": module.weights}

    def stop(model, data, *args, **options):
        given.update(options)
        raise BalfError("stop")

    monkeypatch.setattr(main, "compile", stop)
    monkeypatch.setattr(main, "run_sweep", stop)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    np.savez("data.npz", x=np.zeros((600, 8), dtype="float32"))
    (tmp_path / "balf_fx_settings.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(8, 8))\ndef loss(output, batch): return 0\n"
        "def weights(batch): return 1\n"
    )
    common = [
        "--effort",
        "balanced",
        "--factors",
        "svd",
        "--no-widths",
        "--no-pivot",
        "--separable",
        "--no-centred",
        "--no-split",
        "--no-strict",
        "--no-distributed",
    ]
    common += ["--no-fold-batchnorm", "--include", "0", "--include", "2", "--exclude", "1", "--dense", "2", "-q"]
    common += ["--capture", "export", "--refit", "up", "--loss", "balf_fx_settings:loss", "--memory", "2G"]
    common += ["--checkpoint", "folder", "--safetensors", "weights", "--temperature"]
    common += [
        "--runner",
        "eager",
        "--result",
        "module",
        "--multiple-of",
        "8",
        "--position-weights",
        "balf_fx_settings:weights",
    ]
    start = ["balf_fx_settings:net", "--data", "data.npz", "--seed", "3", *common]
    own = ["--params", "0.5", "--allocation", "uniform", "-o", "small.safetensors"]
    own += ["--confidence", "0.9", "--minimise", "params"]
    assert "stop" in CliRunner().invoke(main.main, ["compress", *start, *own]).output
    wanted = {**OTHERS, "include": ("0", "2"), "exclude": ("1",), "dense": ("2",)}
    wanted |= functions()
    assert given == wanted
    given.clear()
    assert "stop" in CliRunner().invoke(main.main, ["sweep", *start]).output
    wanted |= functions()
    assert given == {name: value for name, value in wanted.items() if name not in budget}


@pytest.mark.parametrize("name", ["flop", "rank", "Effort"])
def test_an_unknown_option_lists_those_there_are(name, prepared):
    model, x = nn.Linear(8, 8).eval(), torch.randn(4, 8)
    doors = {
        (): lambda **options: balf_fx.compile(model, x, **options),
        ("prepare",): lambda **options: balf_fx.prepare(model, x, **options),
        ("convert",): lambda **options: balf_fx.convert(prepared, **options),
    }
    for stages, door in doors.items():
        with pytest.raises(OptionError, match=f"there is no option '{name}' here") as caught:
            door(**{name: 0.5})
        assert str(caught.value).endswith(f"the options are: {', '.join(options_of(*stages))}")
    compiled = torch.compile(model, backend=balf, options={"flops": 0.5, name: 0.5})
    with torch.no_grad(), pytest.raises(OptionError, match=f"there is no option '{name}'") as caught:
        compiled(x)
    own = ["calibration_steps", "inner", "mode", "inner_options", "plan"]
    assert f" are: {', '.join([*(field for field in FIELDS if field not in _ELSEWHERE), *own])}\n" in str(caught.value)


def test_a_misplaced_option_lists_those_there_are(prepared):
    with pytest.raises(OptionError, match=r"option 'flops' here \(pass it to balf_fx.convert\);.*factors.*capture"):
        balf_fx.prepare(nn.Linear(8, 8).eval(), torch.randn(4, 8), flops=0.5)
    with pytest.raises(OptionError, match=r"option 'capture' here \(pass it to balf_fx.prepare\);.*flops.*memory"):
        balf_fx.convert(prepared, flops=0.5, capture="export")


@pytest.mark.parametrize(
    ("door", "stages"), [(balf_fx.compile, ()), (balf_fx.prepare, ("prepare",)), (balf_fx.convert, ("convert",))]
)
def test_help_shows_signature_and_text_of_every_option(door, stages):
    shown = pydoc.render_doc(door, renderer=pydoc.plaintext)
    heading = shown.split("\n\n")[1].partition("->")[0]
    own = {"factors"} if door is balf_fx.prepare else set()
    for name, field in options_of(*stages).items():
        assert f" {name}: " in heading
        assert name in own or f" {name}: {field.metadata['text']}. " in " ".join(shown.split())
    assert "{options}" not in shown
    assert "**options" not in heading


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"widths": "no"}, "widths must be one of True, False, not 'no'"),
        ({"widths": 1}, "widths must be one of True, False, not 1"),
        ({"seed": "a"}, "seed must be a whole number, not 'a'"),
        ({"seed": True}, "seed must be a whole number, not True"),
        ({"seed": 2**70}, "seed must be a whole number of at most 62 bits, not 1180591620717411303424"),
        ({"memory": -1}, "memory must be a number of bytes, .* or a share of .*, such as 0.25, not -1"),
        (
            {"memory": "lots"},
            "memory must be a number of bytes, .* or a share of .*, such as 0.25, not 'lots'",
        ),
        (
            {"memory": True},
            "memory must be a number of bytes, .* or a share of .*, such as 0.25, not True",
        ),
        ({"memory": 1.5}, "memory must be a number of bytes, .*, not 1.5"),
        ({"memory": float("nan")}, "memory must be a number of bytes, .*, not nan"),
        ({"checkpoint": 3}, "checkpoint must be the path of a folder, not 3"),
        ({"checkpoint": "a\0b"}, r"checkpoint must be the path of a folder, not 'a\\x00b'"),
        ({"safetensors": 3}, "safetensors must be the path of a folder, not 3"),
        ({"exclude": "head"}, r"exclude must be a list of patterns, such as \['head', 'blocks.\*'\], not 'head'"),
        ({"dense": "head"}, r"dense must be a list of patterns, such as \['head', 'blocks.\*'\], not 'head'"),
        ({"include": [1]}, r"include must be a list of patterns, such as \['head', 'blocks.\*'\], not \[1\]"),
        ({"loss": 3}, "loss must be a function of the output and the batch, not 3"),
        ({"weights": torch.ones(4)}, "weights must be a function of the batch, not tensor"),
        ({"effort": "slow"}, "effort must be one of 'fast', 'balanced', 'best', not 'slow'"),
        ({"refit": "yes"}, "refit must be one of None, True, False, 'full', 'up', not 'yes'"),
        ({"factors": "cp"}, "factors must be one of None, 'sensitivity', 'activations', 'air', 'svd', not 'cp'"),
        ({"capture": "dynamo"}, "capture must be one of 'auto', 'symbolic_trace', 'export', not 'dynamo'"),
        ({"progress": "loud"}, "progress must be one of True, False, not 'loud'"),
    ],
    ids=str,
)
def test_a_wrong_value_is_told_before_any_work(wrong, message):
    class Untouched(nn.Module):
        def forward(self, x):
            raise AssertionError("the model was run")

    with pytest.raises(OptionError, match=message):
        balf_fx.compile(Untouched().eval(), torch.randn(4, 8), flops=0.5, **wrong)
    if wrong.keys().isdisjoint({"capture", "safetensors"}):
        with pytest.raises(OptionError, match=message):
            parse_options({"flops": 0.5, **wrong})
