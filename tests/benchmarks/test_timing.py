"""Ratios are taken side by side, and the committed timings say nothing of the machine's owner."""

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


class Machine:
    """A clock that runs on as tasks do their work, on a machine whose speed changes from round to round."""

    def __init__(self, slowdowns):
        self.now, self.calls = 0.0, []
        self._slowdowns = slowdowns

    def perf_counter(self):
        return self.now

    def task(self, name, work):
        def run():
            self.now += work * self._slowdowns[self.calls.count(name)]
            self.calls.append(name)

        return run


@pytest.fixture
def timing(load_benchmark):
    return load_benchmark("timing")


def test_a_ratio_is_exact_however_the_machine_slows_down(timing, monkeypatch):
    machine = Machine([100.0, 1.0, 50.0, 2.0])
    monkeypatch.setattr(timing.time, "perf_counter", machine.perf_counter)
    task = machine.task("task", 3.0)
    rivals = timing.Rivals({"slow": machine.task("slow", 6.0), "fast": machine.task("fast", 1.0)})
    times = []
    for _ in range(4):
        rivals.run()
        times.append(timing.seconds(task))
    assert machine.calls == ["slow", "fast", "task"] * 4
    ratios = rivals.ratios(times[1:])  # the first round is for warming up
    assert ratios == {"slow": timing.Ratio(0.5, 0.5, 0.5), "fast": timing.Ratio(3.0, 3.0, 3.0)}


def test_rounds_are_those_of_the_task(timing):
    rivals = timing.Rivals({})
    rivals.run()
    assert rivals.ratios([1.0]) == {}
    assert timing.ratio([2.0], [4.0]) == timing.Ratio(0.5, 0.5, 0.5)
    assert timing.ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == timing.Ratio(3.0, 2.0, 4.0)


def pytest_in_a_process(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_run_writes_ratios_and_no_names(tmp_path):
    pytest.importorskip("pytest_benchmark")
    output = tmp_path / "timings.json"
    printed = pytest_in_a_process("benchmarks/bench_import.py", "--rounds=1", f"--benchmark-json={output}")
    found = json.loads(output.read_text())
    (case,) = found["benchmarks"]
    assert set(case) == {"group", "name", "fullname", "extra_info", "stats"}
    assert case["stats"]["rounds"] == 1
    ratio = case["extra_info"]["ratios"]["import torch"]
    assert ratio["lower"] <= ratio["median"] <= ratio["upper"]
    assert f"{ratio['median']:.3f}" in printed
    assert found["machine_info"].keys() == {"torch", "cpu", "cores", "threads", "date"}
    assert found["commit_info"].keys() == {"id"}
    arguments = "-p no:cacheprovider benchmarks/bench_import.py --rounds=1 --benchmark-json=timings.json"
    assert found["command"] == f"python -m pytest {arguments}"
    text = output.read_text()
    assert not any(name in text for name in (str(ROOT), str(tmp_path), platform.node(), f"/{getpass.getuser()}/"))


def test_timings_are_collected_on_request_alone(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
    files = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert {name for name in files if name.startswith("test_")} == set()
    assert {name for name in files if name.startswith("bench_")} >= {"bench_latency.py", "bench_compression.py"}


def test_cases_that_take_hours_run_where_their_file_is_named(load_benchmark):
    ignore = load_benchmark("conftest").pytest_ignore_collect
    folder = ROOT / "benchmarks"
    for name, ignored in (("bench_realised.py", True), ("bench_generation.py", True), ("bench_latency.py", None)):
        assert (folder / name).is_file()
        assert ignore(folder / name, SimpleNamespace(args=["benchmarks"])) is ignored
        assert ignore(folder / name, SimpleNamespace(args=[f"benchmarks/{name}"])) is None
