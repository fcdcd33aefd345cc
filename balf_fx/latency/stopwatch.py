"""Wall-clock times. Tasks that are compared run in turn, since other programs disturb all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Task = Callable[[], object]

_SHORT = 2e-4  # seconds; a shorter task is repeated until a measurement takes this long
_ENOUGH = 1e-2  # seconds, for all measurements of a task


@dataclass(frozen=True)
class Race:
    """The times of two tasks that ran in turn.

    Attributes:
        first, second: the median seconds of each.
        ratio: the median over rounds of second / first.
    """

    first: float
    second: float
    ratio: float


def synchronise(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(task: Task, device: torch.device, repeats: int = 1) -> float:
    """The seconds of one call of a task, the mean of several."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        task()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def least_seconds(task: Task, device: torch.device) -> float:
    """The least seconds of a few calls after a first one: what else runs on the machine can only add to them."""
    first = seconds(task, device)
    repeats, measurements = _fitting(_SHORT, first, 100), max(2, _fitting(_ENOUGH, first, 8))
    return min(seconds(task, device, repeats) for _ in range(measurements))


def _fitting(available: float, each: float, most: int) -> int:
    """How many times a task fits into the seconds that are available, at least once."""
    return max(1, min(round(available / max(each, 1e-7)), most))


def race(first: Task, second: Task, device: torch.device, rounds: int, warmup: int = 2) -> Race:
    """Run two tasks in turn.

    Args:
        rounds: the number of measurements of each, after `warmup` others.
    """
    tasks = (first, second)
    for _ in range(warmup):
        repeats = [_fitting(_SHORT, seconds(task, device), 100) for task in tasks]
    pairs = [[seconds(task, device, count) for task, count in zip(tasks, repeats, strict=True)] for _ in range(rounds)]
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    return Race(medians[0], medians[1], statistics.median(other / one for one, other in pairs))
