"""Ratios of times on a machine that does other things as well: measured side by side, in turn, as medians.

One call's time may double while another program runs, and so may the median of many. A task and what it is compared
with are therefore called in turn, and their times are divided round by round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Task = Callable[[], Any]

Measure = Callable[..., None]
"""The fixture `measure`."""


@dataclass(frozen=True)
class Ratio:
    """The median ratio of a task's time to that of another, and the rounds' quartiles."""

    median: float
    lower: float
    upper: float


def finished(task: Task) -> Task:
    """The task and the wait for an accelerator that works on it, where there is one."""

    def run() -> Any:
        found = task()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return found

    return run


def seconds(task: Task) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    finished(task)()
    return time.perf_counter() - start


def ratio(times: Sequence[float], others: Sequence[float]) -> Ratio:
    """Of times of the same rounds, one for each round in both."""
    found = [one / other for one, other in zip(times, others, strict=True)]
    if len(found) == 1:
        return Ratio(found[0], found[0], found[0])
    lower, median, upper = statistics.quantiles(found, n=4, method="inclusive")
    return Ratio(median, lower, upper)


class Rivals:
    """Tasks that are timed right before each call of the one that they are compared with."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self._tasks = tasks
        self._times: dict[str, list[float]] = {name: [] for name in tasks}

    def run(self) -> None:
        """One call of each."""
        for name, task in self._tasks.items():
            self._times[name].append(seconds(task))

    def ratios(self, times: Sequence[float]) -> dict[str, Ratio]:
        """Of the task's times to those of each rival in the same rounds; earlier rounds of the rivals are warm-up."""
        return {name: ratio(times, others[len(others) - len(times) :]) for name, others in self._times.items()}
