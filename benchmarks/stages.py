"""How long each stage of a compression takes, and the most memory that it has resident."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from balf_fx import api
from balf_fx.progress import Progress

_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def peak_gib() -> float:
    """The most memory that this process has had resident, in GiB."""
    found = _status_gib("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT / 2**30 if found is None else found


def resident_gib() -> float:
    """The memory that this process has resident now, in GiB; its peak where the system does not tell."""
    found = _status_gib("VmRSS")
    return peak_gib() if found is None else found


def _status_gib(name: str) -> float | None:
    """An entry of this process's status, in GiB; None where the system has none.

    Other sources are less exact: of some kernels, `ru_maxrss` may be below what is resident.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(name)), None)


class StageClock:
    """Adds up the seconds of each stage by the names that the progress bar shows.

    "compressing" is what follows the last stage with a name of its own: pivots and new layers, where none are refitted.

    Attributes:
        seconds: {stage: seconds} of each compression.
        peaks: {stage: GiB}, the peak of the process at the end of each stage of the last compression.
    """

    def __init__(self) -> None:
        self.seconds: list[dict[str, float]] = []
        self.peaks: dict[str, float] = {}
        self._last = 0.0

    def passed(self, stage: str) -> None:
        """The time since the last call was that of a stage."""
        now = time.perf_counter()
        self.seconds[-1][stage] += now - self._last
        self._last, self.peaks[stage] = now, peak_gib()

    @contextmanager
    def bar(self, _: bool, name: str) -> Iterator[Progress]:
        """In place of the progress bar of a compression."""
        self.seconds.append(defaultdict(float))
        self._last = time.perf_counter()
        yield _Stage(self, name)
        self.passed("rewriting")

    def around(self, task: Callable[[], Any]) -> Callable[[], Any]:
        """A task whose compressions are timed by stage."""

        def timed() -> Any:
            shown, api.progress_bar = api.progress_bar, self.bar
            try:
                return task()
            finally:
                api.progress_bar = shown

        return timed


class _Stage(Progress):
    def __init__(self, clock: StageClock, name: str) -> None:
        self._clock, self._name = clock, name

    def spans(self, weights: Sequence[float], names: Sequence[str] = ()) -> list[Progress]:
        self._clock.passed(self._name)
        return [_Stage(self._clock, name) for name in names or [self._name] * len(weights)]

    def done(self) -> None:
        self._clock.passed(self._name)
