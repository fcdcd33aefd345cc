"""The command line: output, and errors without tracebacks."""

import importlib
import json
import sys

import pytest

pytest.importorskip("click")
from click.testing import CliRunner

from balf_fx import demo
from balf_fx.cli import main


@pytest.fixture(autouse=True)
def thin_net(monkeypatch):
    monkeypatch.setattr(demo, "_WIDTHS", ((1, 16, 2), (16, 32, 2)))


def invoke(*arguments):
    return CliRunner().invoke(main, arguments)


def assert_clean_failure(result, exit_code, message):
    assert result.exit_code == exit_code
    assert isinstance(result.exception, SystemExit)
    assert message in result.output
    assert "Traceback" not in result.output


def test_help_names_the_command():
    assert "demo" in invoke("--help").output
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
    monkeypatch.delitem(sys.modules, "balf_fx.cli")
    with pytest.raises(SystemExit, match=r'pip install "balf-fx\[cli\]"'):
        importlib.import_module("balf_fx.cli")
