"""One set of statistics from the batches of several processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from balf_fx.calibration.observers import CovarianceObserver, InfluenceObserver, SensitivityObserver
from balf_fx.calibration.sample import Mergeable, Statistics
from balf_fx.distributed.group import Group
from balf_fx.errors import NotCalibratedError, ProcessError

Observer = CovarianceObserver | SensitivityObserver | InfluenceObserver


@contextmanager
def merging(program: nn.Module, group: Group) -> Iterator[None]:
    """Merge what observers gather in the context over all processes, and add it to what they have gathered before.

    What they have gathered before must be the same in all processes. After an error, they have that alone.

    Raises:
        ProcessError: the processes observe different layers.
    """
    if group.size == 1:
        yield
        return
    check_alike(program, group)
    observers = _observers(program)
    found = [each.statistics for each in observers]
    for each in observers:
        each.statistics = (None,) * len(each.statistics)
    try:
        yield
        merged = []
        for each, before in zip(observers, found, strict=True):  # an error leaves all of them as they were
            merge_statistics(each, group)
            own, each.statistics = each.statistics, (None,) * len(each.statistics)
            merged.append(_added(before, own))
        found = merged
    finally:
        for each, statistics in zip(observers, found, strict=True):
            each.statistics = statistics


def check_alike(program: nn.Module, group: Group) -> None:
    """Check that all processes observe the same layers, and have the same statistics so far.

    Raises:
        ProcessError: they do not.
    """
    names = tuple((type(each).__name__, each.site.name) for each in _observers(program))
    if len(set(group.gathered((names, _digest(program))))) > 1:
        raise ProcessError(
            "the processes observe different layers, or have gathered different statistics: pass the same model and "
            "options in each, and calibrate with balf_fx.calibrate, which merges statistics"
        )


def merge_statistics(observer: Observer, group: Group) -> None:
    """Give an observer the statistics of all processes."""
    own, observer.statistics = observer.statistics, (None,) * len(observer.statistics)
    observer.statistics = group.merged(own, _added)


def check_merged(program: nn.Module, group: Group) -> None:
    """Check that all processes have the same statistics.

    Raises:
        NotCalibratedError: they have not.
    """
    if group.size > 1 and len(set(group.gathered(_digest(program)))) > 1:
        raise NotCalibratedError(
            "the processes have different statistics: calibrate with balf_fx.calibrate, which merges them, or pass "
            "distributed=False to compress in each process for itself"
        )


def _observers(program: nn.Module) -> list[Observer]:
    return [each for each in program.modules() if isinstance(each, Observer)]


def _added(first: Statistics, second: Statistics) -> Statistics:
    return tuple(_both(*pair) for pair in zip(first, second, strict=True))


def _both(first: Mergeable | None, second: Mergeable | None) -> Mergeable | None:
    if first is None or second is None:
        return second if first is None else first
    merged: Mergeable = first.merge(second)
    return merged


def _digest(program: nn.Module) -> bytes:
    """A digest of the moments of all observers, bit for bit."""
    found = hashlib.blake2b(digest_size=16)
    for each in _observers(program):
        if isinstance(each, CovarianceObserver) and each.moments is not None:
            found.update(each.moments.mean.cpu().contiguous().numpy().tobytes())
    return found.digest()
