"""Timings with pytest-benchmark: `python -m pytest benchmarks`.

Every case that is compared with others reports, beside its own times, the ratios to them (`timing`).
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from common import ROOT, environment
from stages import StageClock
from subjects import SUBJECTS, Subject
from tabulate import tabulate
from timing import Measure, Ratio, Rivals, Task, finished

_RATIOS = pytest.StashKey[list[tuple[str, ...]]]()
_STATISTICS = ("min", "max", "mean", "stddev", "median", "iqr", "q1", "q3", "rounds", "iterations")
_LONG = ("bench_generation.py", "bench_pivots.py", "bench_realised.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether to pass over a file: cases that take hours run only where their file is named."""
    named = any(collection_path.name in argument for argument in config.args)
    return True if collection_path.name in _LONG and not named else None


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long to measure."""
    parser.addoption("--large", action="store_true", help="Also compress large models, each once, for hours in all.")
    parser.addoption("--rounds", type=int, help="Rounds of every case, in place of its own number: 2 for a quick look.")
    parser.addoption("--device", type=torch.device, default="cpu", help="Of the realised speed-ups, such as cuda.")
    parser.addoption("--dtype", default="float32", choices=["float32", "bfloat16"], help="Of the realised speed-ups.")
    parser.addoption("--images", type=int, action="append", help="Of the realised speed-ups; repeatable.")


@pytest.fixture(scope="session")
def subject() -> Callable[[str], Subject]:
    """Makes a subject of a name once; skips the case where its data are missing."""

    @functools.cache
    def make(name: str) -> Subject:
        try:
            return SUBJECTS[name]()
        except click.ClickException as error:
            pytest.skip(error.message)

    return make


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Measure:
    """Times a task, and in turn with it the tasks that it is compared with.

    Called as `measure(group, task, rounds, rivals={"eager": other})`, with `warmup` rounds that are not counted. With a
    `clock` around the task, its stages are compared, too.
    """

    def run(
        group: str,
        task: Task,
        rounds: int,
        rivals: dict[str, Task] | None = None,
        warmup: int = 1,
        clock: StageClock | None = None,
    ) -> None:
        opponents = Rivals(rivals or {})
        benchmark.group = group
        rounds = request.config.getoption("--rounds") or rounds
        with torch.no_grad():
            benchmark.pedantic(finished(task), setup=opponents.run, rounds=rounds, warmup_rounds=warmup)
        if benchmark.disabled:  # --benchmark-disable: one call, no times
            return
        ratios = opponents.ratios(benchmark.stats.stats.data)
        benchmark.extra_info["ratios"] = {name: asdict(found) for name, found in ratios.items()}
        stages = {} if clock is None else _stages(clock, opponents, rounds)
        if stages:
            benchmark.extra_info["stages"] = {
                name: {rival: asdict(each) for rival, each in own.items()} for name, own in stages.items()
            }
        rows = request.config.stash.setdefault(_RATIOS, [])
        for name, found in ratios.items():
            rows.append((group, request.node.name, name, *map("{:.3f}".format, asdict(found).values())))
        for stage, own in stages.items():
            for name, found in own.items():
                rows.append((group, f"  {stage}", name, *map("{:.3f}".format, asdict(found).values())))

    return run


def _stages(clock: StageClock, rivals: Rivals, rounds: int) -> dict[str, dict[str, Ratio]]:
    """The ratios of the times of each stage in the rounds that count."""
    counted = clock.seconds[-rounds:]
    names = dict.fromkeys(name for times in counted for name in times)
    return {name: rivals.ratios([times.get(name, 0.0) for times in counted]) for name in names}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the ratios, which are what to compare on a machine that does other things as well."""
    rows = config.stash.get(_RATIOS, [])
    if rows:
        headers = ("group", "case", "time relative to", "median", "quartile", "quartile")
        terminalreporter.section("ratios")
        terminalreporter.write_line(tabulate(rows, headers, disable_numparse=True))


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """The processor and the versions; the plugin's own header also names the machine."""
    return {key: value for key, value in environment().items() if key != "commit"}


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    """The commit; the plugin's own header also names the folder and the branch."""
    return {"id": environment()["commit"]}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add the command, without paths outside of the repository; of each case keep what describes its times."""
    output_json["command"] = command(config.invocation_params.args)
    for case in output_json["benchmarks"]:
        case["stats"] = {name: case["stats"][name] for name in _STATISTICS}
        for name in ("options", "params", "param"):  # the plugin's settings, and parameters that names show
            case.pop(name, None)


def command(arguments: tuple[str, ...]) -> str:
    """The command with these arguments of pytest; paths as seen from the repository, others by their last part."""
    words = ["python", "-m", "pytest"]
    for argument in arguments:
        option, separator, value = argument.rpartition("=")
        path = Path(value)
        if path.is_absolute():
            value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        words.append(option + separator + value)
    return shlex.join(words)
