"""The command line: output, and errors without tracebacks."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("PIL")

import numpy as np
from click.testing import CliRunner
from PIL import Image

import balf_fx
from balf_fx.cli import demo
from balf_fx.cli.data import choose
from balf_fx.cli.main import main

FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 5))

def image_net():
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers)
"""


@pytest.fixture(autouse=True)
def thin_net(monkeypatch):
    monkeypatch.setattr(demo, "_WIDTHS", ((1, 16, 2), (16, 32, 2)))


def net(name="net"):
    """As the factory makes it, which only commands import."""
    namespace = {}
    exec(FACTORY, namespace)
    return namespace[name]().eval()


def report_in(path):
    return balf_fx.report(path)


def invoke(*arguments):
    return CliRunner().invoke(main, arguments)


def assert_clean_failure(result, exit_code, message):
    assert result.exit_code == exit_code
    assert isinstance(result.exception, SystemExit)
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a module, arrays and images, in which commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "balf_fx_mine.py").write_text(FACTORY)
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(200, 24)) @ generator.normal(size=(24, 24)) / 5
    np.savez("data.npz", x=inputs, y=generator.integers(0, 5, 200))
    np.savez("short.npz", x=inputs[:60], y=np.zeros(59, dtype=int))
    (tmp_path / "images").mkdir()
    for index in range(12):
        pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    yield tmp_path
    sys.modules.pop("balf_fx_mine", None)


NET = ("balf_fx_mine:net", "--data", "data.npz", "--array", "x", "--effort", "fast", "-q")
COMPRESS = ("compress", *NET, "-o", "small.safetensors")


def test_help_names_the_commands():
    listed = invoke("--help").output
    for command in ("compress", "report", "sweep", "demo"):
        assert command in listed
        assert f"main {command}" in invoke(command, "--help").output
    for option in ("--flops", "--seed", "--epochs", "--json"):
        assert option in invoke("demo", "--help").output


def test_demo_prints_a_table():
    result = invoke("demo", "--epochs", "1")
    assert result.exit_code == 0
    assert "top-1" in result.stdout
    assert "compressed" in result.stdout


def test_demo_prints_nothing_but_json():
    result = invoke("demo", "--epochs", "1", "--flops", "0.4", "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["budget"] == 0.4
    assert data["flops_kept"] <= 0.4
    assert result.stderr == ""


@pytest.mark.parametrize("flops", ["0", "-0.5", "1.5", "half"])
def test_budget_out_of_range_is_a_usage_error(flops):
    assert_clean_failure(invoke("demo", "--flops", flops), 2, "Invalid value for '--flops'")


def test_unreachable_budget_is_a_clean_error():
    assert_clean_failure(invoke("demo", "--epochs", "1", "--flops", "0.0001"), 1, "out of reach")


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert_clean_failure(invoke("demo"), 1, 'pip install "balf-fx[cli]"')


def test_missing_click_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "click", None)
    monkeypatch.delitem(sys.modules, "balf_fx.cli.main")
    with pytest.raises(SystemExit, match=r'pip install "balf-fx\[cli\]"'):
        importlib.import_module("balf_fx.cli.main")


def test_compress_does_what_compile_does(work):
    result = invoke(*COMPRESS, "--flops", "0.6", "--samples", "100", "--batch-size", "40", "--seed", "1")
    assert result.exit_code == 0, result.output
    small, model = balf_fx.load("small.safetensors", net()), net()
    inputs = torch.from_numpy(np.load("data.npz")["x"]).float()[choose(200, 100, 1)]
    wanted = balf_fx.compile(model, inputs.split(40), flops=0.6, effort="fast", seed=1, progress=False)
    assert small.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in small.state_dict().items())
    assert result.stdout == f"{balf_fx.report(wanted)}\n"
    assert result.stderr == "saved as small.safetensors\n"


def test_progress_goes_to_stderr(work):
    result = invoke(*(word for word in COMPRESS if word != "-q"), "--params", "0.5", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["measure"] == "params"
    assert data["params_kept"] <= 0.5
    assert "calibrating" in result.stderr


def test_layers_can_be_left_out_and_a_page_be_written(work):
    pytest.importorskip("jinja2")
    result = invoke(*COMPRESS, "--flops", "0.8", "--exclude", "4", "--exclude", "nothing*", "--html", "page.html")
    assert_clean_failure(result, 1, "nothing*")
    result = invoke(*COMPRESS, "--flops", "0.8", "--exclude", "4", "--html", "page.html")
    assert result.exit_code == 0, result.output
    assert "excluded by the user" in (work / "page.html").read_text()


def test_a_limit_of_mistakes_is_tested_on_what_calibration_leaves(work):
    pytest.importorskip("jinja2")
    limit = ("--disagreement", "0.4", "--samples", "120", "--html", "page.html")
    result = invoke(*COMPRESS, *limit)
    assert result.exit_code == 0, result.output
    indices = choose(200, 200, 0)
    inputs = torch.from_numpy(np.load("data.npz")["x"]).float()
    wanted = balf_fx.compile(
        net(), inputs[indices[:120]].split(32), disagreement=0.4, validation=inputs[indices[120:]], effort="fast"
    )
    assert result.stdout == f"{balf_fx.report(wanted)}\n"
    assert "on 80 samples, at most" in result.stdout
    assert "Certified mistakes" in (work / "page.html").read_text()
    assert_clean_failure(invoke(*COMPRESS, *limit, "--validation-samples", "3"), 1, "validation has 3 samples")
    assert_clean_failure(invoke(*COMPRESS, *limit, "--flops", "0.5"), 2, "drop flops")
    assert_clean_failure(invoke(*COMPRESS, "--disagreement", "0.4"), 1, "pass fewer --samples")


def test_a_budget_may_be_a_time(work):
    wanted = ("--runner", "eager", "--no-strict", "--multiple-of", "auto")
    result = invoke(*COMPRESS, "--latency", "0.9", *wanted)
    assert result.exit_code == 0, result.output
    assert "90.00% asked for" in result.stdout
    assert report_in("small.safetensors").timing.asked == 0.9
    assert invoke(*COMPRESS, "--latency", "10s", *wanted).exit_code == 0
    assert report_in("small.safetensors").flops_kept == 1.0
    assert_clean_failure(invoke(*COMPRESS, "--latency", "12", *wanted), 2, "a fraction in")
    assert_clean_failure(invoke(*COMPRESS, "--flops", "0.9", "--multiple-of", "some"), 2, "or 'auto'")


def test_image_folders_are_read_at_the_size_that_is_asked_for(work):
    command = ("compress", "balf_fx_mine:image_net", "--data", "images", "-q", "--effort", "fast", "--flops", "0.9")
    assert invoke(*command, "-o", "a.safetensors").exit_code == 0
    assert invoke(*command, "-o", "b.safetensors", "--image-size", "12", "--mean", "0,0,0").exit_code == 0
    large, small = map(report_in, ("a.safetensors", "b.safetensors"))
    per_pixel = 12 * 2 * 16 * 3 * 9
    assert (large.sites[0].flops_before, small.sites[0].flops_before) == (per_pixel * 20 * 24, per_pixel * 12 * 12)
    assert_clean_failure(invoke(*command, "-o", "c.safetensors", "--std", "1,2"), 1, "three numbers each")
    assert_clean_failure(invoke(*command, "-o", "c.safetensors", "--std", "1;2"), 2, "not a list of numbers")


def test_weights_are_loaded_and_random_ones_told(work):
    model = net()
    torch.nn.init.zeros_(model[4].weight)
    torch.save(model.state_dict(), "weights.pt")
    assert invoke(*COMPRESS, "--flops", "0.9", "--weights", "weights.pt", "--exclude", "4").exit_code == 0
    assert not balf_fx.load("small.safetensors", net()).get_parameter("4.weight").any()
    command = ("compress", "torchvision:squeezenet1_1", "--data", "images", "-q", "--effort", "fast", "--flops", "0.9")
    result = invoke(*command, "-o", "b.safetensors", "--samples", "2", "--image-size", "64")
    assert result.exit_code == 0, result.output
    assert "random weights" in result.stderr


def test_report_prints_what_was_saved(work):
    assert invoke(*COMPRESS, "--flops", "0.6").exit_code == 0
    found = report_in("small.safetensors")
    assert invoke("report", "small.safetensors").stdout == f"{found}\n"
    assert json.loads(invoke("report", "small.safetensors", "--json").stdout) == json.loads(found.to_json())


def test_report_draws(work):
    pytest.importorskip("jinja2")
    assert invoke(*COMPRESS, "--flops", "0.6").exit_code == 0
    from balf_fx.reporting.page import render

    result = invoke("report", "small.safetensors", "--html", "page.html", "--plot", "picture.png")
    assert result.exit_code == 0, result.output
    assert (work / "page.html").read_text() == render(report_in("small.safetensors"))
    with Image.open("picture.png") as picture:
        assert picture.width > 10 * 150


def test_the_page_takes_a_sweep(work):
    pytest.importorskip("jinja2")
    assert invoke(*COMPRESS, "--flops", "0.6").exit_code == 0
    (work / "curve.json").write_text(invoke("sweep", *NET, "--budgets", "0.8", "--samples", "150", "--json").stdout)
    report = ("report", "small.safetensors", "--sweep", "curve.json")
    assert_clean_failure(invoke(*report), 2, "pass --html")
    assert invoke(*report, "--html", "page.html").exit_code == 0
    assert "on 50 samples" in (work / "page.html").read_text()
    (work / "curve.json").write_text("{}")
    assert_clean_failure(invoke(*report, "--html", "page.html"), 1, "not a sweep")


def test_report_on_something_else_is_a_clean_error(work):
    (work / "other.safetensors").write_text("nothing of the kind")
    assert_clean_failure(invoke("report", "other.safetensors"), 1, "not a safetensors file")
    assert_clean_failure(invoke("report", "missing.safetensors"), 2, "does not exist")


def test_sweep_compares_on_what_calibration_leaves(work):
    command = ("sweep", *NET, "--budgets", "0.8,0.5,0.01", "--samples", "150", "--labels", "y")
    result = invoke(*command, "--json", "--plot", "curve.png")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [point["budget"] for point in data["points"]] == [0.8, 0.5]
    assert data["out_of_reach"] == [0.01]
    assert data["samples"] == 50
    indices = choose(200, 200, 0)[150:]
    with np.load("data.npz") as arrays, torch.no_grad():
        model = net()
        given = model(torch.from_numpy(arrays["x"][indices]).float()).argmax(1).numpy()
        assert data["accuracy"] == pytest.approx((given == arrays["y"][indices]).mean())
    with Image.open("curve.png") as picture:
        assert picture.width == 8 * 150
    assert "same top-1" in invoke(*command).stdout


def test_sweep_takes_other_data_to_compare_on(work):
    command = ("sweep", *NET, "--budgets", "0.8", "--measure", "params", "--eval-data", "short.npz", "--json")
    result = invoke(*command, "--eval-array", "x", "--eval-samples", "30")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["measure"], data["samples"], data["accuracy"]) == ("params", 30, None)
    assert_clean_failure(invoke(*command), 1, "choose one with --array")
    assert_clean_failure(invoke(*command, "--eval-array", "x", "--labels", "y"), 1, "59 labels for 60 samples")


def test_sweep_needs_something_to_compare_on(work):
    assert_clean_failure(invoke("sweep", *NET, "--budgets", "0.8"), 1, "pass fewer --samples")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--flops", "0.5", "--params", "0.5"), "give exactly one budget"),
        (("--refit", "up"), "give a budget"),
        (("--flops", "2"), "Invalid value for '--flops'"),
        (("--flops", "0.5", "--output", "small.pt"), "does not end in .safetensors"),
        (("--flops", "0.5", "--output", "no/folder/small.safetensors"), "there is no folder"),
        (("--flops", "0.5", "--data", "missing.npz"), "does not exist"),
        (("--flops", "0.5", "--effort", "much"), "Invalid value for '--effort'"),
    ],
)
def test_wrong_usage_is_told_before_any_work(work, arguments, message):
    assert_clean_failure(invoke(*COMPRESS, *arguments), 2, message)
    assert not (work / "small.safetensors").exists()


def test_what_cannot_be_replaced_by_the_result_is_told_before_any_work(work):
    Path("there").write_text("mine")
    Path("there.safetensors").mkdir()
    assert_clean_failure(invoke(*COMPRESS, "--flops", "0.5", "--output", "there"), 2, "'there' is a file")
    assert_clean_failure(
        invoke(*COMPRESS, "--flops", "0.5", "--output", "there.safetensors"), 2, "'there.safetensors' is a folder"
    )
    assert Path("there").read_text() == "mine"


@pytest.mark.parametrize("budgets", ["0.5,2", "0", "half", ""])
def test_wrong_budgets_are_wrong_usage(work, budgets):
    assert_clean_failure(invoke("sweep", *NET, "--budgets", budgets), 2, "Invalid value for '--budgets'")


def test_errors_name_what_to_do(work):
    assert_clean_failure(invoke(*COMPRESS, "--flops", "0.0001"), 1, "Ask for flops=")
    wrong = [word if word != "x" else "y" for word in COMPRESS]
    assert_clean_failure(invoke(*wrong, "--flops", "0.5"), 1, "array of numbers")
    wrong = [word if word != "balf_fx_mine:net" else "balf_fx_mine:other" for word in COMPRESS]
    assert_clean_failure(invoke(*wrong, "--flops", "0.5"), 1, "cannot import balf_fx_mine:other")


def test_files_that_are_missing_or_cannot_be_written_are_errors_in_one_line(work, monkeypatch):
    assert_clean_failure(invoke(*COMPRESS, "--allocation", "missing.json"), 1, "missing.json")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("balf_fx.cli.main.save", full)
    assert_clean_failure(invoke(*COMPRESS, "--flops", "0.5"), 1, "Error: [Errno 28] No space left on device")


def test_missing_libraries_are_told_before_any_work(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "balf_fx.reporting.page", raising=False)
    monkeypatch.delattr(balf_fx.reporting, "page", raising=False)
    assert_clean_failure(invoke(*COMPRESS, "--flops", "0.5", "--html", "a.html"), 1, 'pip install "balf-fx[plot]"')
    assert not (work / "small.safetensors").exists()


def test_missing_pillow_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    for module in ("main", "options", "models", "data"):
        monkeypatch.delitem(sys.modules, f"balf_fx.cli.{module}")
    with pytest.raises(SystemExit, match=r'pip install "balf-fx\[cli\]"'):
        importlib.import_module("balf_fx.cli.main")


def test_the_commands_of_the_readme_run(work, monkeypatch):
    """As they are written, but for the model of torchvision, which would have to be downloaded."""
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("jinja2")
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: net("image_net"))
    (work / "mine.py").write_text(FACTORY.replace("def net", "def make_net"))
    torch.save(net().state_dict(), "net.pt")
    with np.load("data.npz") as arrays:
        np.savez("data.npz", x=np.tile(arrays["x"], (3, 1)), y=np.tile(arrays["y"], 3))
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for command in commands.splitlines():
        words, _, output = command.partition(" > ")
        program, *arguments = shlex.split(words)
        assert program == "balf-fx"
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        if output:
            (work / output).write_text(result.stdout)
    sys.modules.pop("mine")
    assert all((work / name).stat().st_size for name in ("small.safetensors", "curve.png", "report.html"))


@pytest.mark.parametrize("command", ["compress", "sweep"])
def test_help_shows_what_can_be_written_and_the_defaults(command):
    shown = " ".join(invoke(command, "--help").stdout.split())
    assert "--refit [none|full|up]" in shown
    assert "--runner [eager|inductor]" in shown or command == "sweep"
    assert "--factors [sensitivity|activations|air|svd]" in shown
    assert "{site: rank}" not in shown
    for default in ("best", "0.5", "graph", "auto"):
        assert re.search(rf"\[default: \(?{default}\)?\]", shown), default
