"""Folders use what is below them, files and signatures stay short, and passes are listed as they run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import ConvNet, randomise_batchnorm

import balf_fx
from balf_fx import passes
from balf_fx.engine import rewriting, tempering

ROOT = Path(__file__).parents[1]
FILES = sorted({*(ROOT / "balf_fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")})
PUBLIC = ROOT / "balf_fx" / "api.py"


def test_folders_use_only_what_is_below_them():
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.skip('import-linter is not there: pip install -e ".[test]"')
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_signatures_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    if path != PUBLIC:
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.Lambda)]
        long = {getattr(node, "name", "lambda"): count for node in functions if (count := parameters(node)) > 7}
        assert long == {}


def parameters(function):
    """How many parameters a function has, `self` and `cls` left aside."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return len([each for each in named if each.arg not in ("self", "cls")]) + len(starred)


@pytest.fixture
def ran(monkeypatch):
    """The names of the passes as they run; the engine solves, follows and removes observers without a call."""
    found = []
    call = passes.Pass.__call__

    def recorded(name, function):
        return lambda *args, **kwargs: (found.append(name), function(*args, **kwargs))[1]

    def named(self, graph_module):
        found.append(type(self).__name__)
        return call(self, graph_module)

    monkeypatch.setattr(passes.Pass, "__call__", named)
    for each in (passes.Allocate, passes.Follow):
        monkeypatch.setattr(each, "solve", recorded(each.__name__, each.solve))
    monkeypatch.setattr(rewriting, "remove_observers", recorded("RemoveObservers", rewriting.remove_observers))
    return found


def test_passes_are_listed_in_the_order_in_which_they_run(ran, images, monkeypatch):
    model = randomise_batchnorm(ConvNet()).eval()
    monkeypatch.setattr(tempering, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(tempering, "closest_to_one", lambda *_: 0.5)
    small = balf_fx.compile(model, images, flops=0.6, temperature=True, progress=False)
    best = list(ran)
    ran.clear()
    balf_fx.compile(model, images, allocation=balf_fx.plan(small), progress=False)
    followed = list(ran)
    ran.clear()
    balf_fx.compile(model, images, flops=0.6, progress=False, **balf_fx.AIR)
    sized = list(ran)
    ran.clear()
    balf_fx.compile(model, images, latency=0.9, runner="eager", effort="fast", strict=False, progress=False)
    order = passes.__all__[1:]
    assert passes.__all__[0] == "Pass"
    for run in (best, followed, sized, ran):
        first = dict.fromkeys(run)
        del first["Overwrite"]  # the original is timed in this form, too
        for name in ("Pivot", "SplitBias"):
            first.pop(name, None)  # allocations are tried without them
        assert list(first) == [name for name in order if name in first]
        last = run[-1 - run[::-1].index("Follow" if run is followed else "Allocate") :]
        tried = last.index("Overwrite") if last.count("Overwrite") > 1 else 0  # the last allocation may be a new one
        last = [last[0], *last[tried + 1 :]]
        assert last == [name for name in order if name in last]
    assert {*best, *followed, *sized, *ran} == set(order)


def test_every_pass_is_listed():
    defined = {name for name in vars(passes) if isinstance(getattr(passes, name), type)}
    assert defined == set(passes.__all__)
