"""Times of operations by their sizes: measured on a grid, interpolated between its lines, and kept in a file.

Between two lines, the time of an operation is a + b inputs + c outputs + d inputs outputs, as for a product that is
bound by arithmetic or by memory. A size counts as the next multiple of its *granule* (`latency.granules`).
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import logging
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from balf_fx.distributed.group import ALONE, Group
from balf_fx.latency.granules import granule, probes
from balf_fx.latency.operations import Family, Operation, Run
from balf_fx.latency.stopwatch import least_seconds
from balf_fx.progress import SILENT, Progress

_LOGGER = logging.getLogger(__name__)
_ROUNDS = 3
_LEAST = 4  # smaller sizes take as long as this one
_DEPTH = 64  # the smallest line is at this fraction of the largest size
_FEW = 64  # features

Points = dict[tuple[int, int], float]
"""Nanoseconds by inputs and outputs."""


@dataclass
class Table:
    """Times of operations on one machine.

    Attributes:
        known: the measured points of each operation by its key.
        limit: seconds after which nothing is measured a second time.
        path: the file where points are kept; None for no file.
        group: the processes that use the same times: process 0 measures them. What they know must be the same.
        grids: the lines of inputs and of outputs between which each operation is interpolated.
        granules: those of inputs and of outputs for each family of operations.
    """

    known: dict[str, Points] = field(default_factory=dict)
    limit: float = 60.0
    path: Path | None = None
    group: Group = ALONE
    grids: dict[Operation, tuple[list[int], list[int]]] = field(default_factory=dict, init=False)
    granules: dict[Family, tuple[int, int]] = field(default_factory=dict, init=False)

    def measure(self, runs: Iterable[Run], progress: Progress = SILENT) -> None:
        """Measure what is missing to price all runs up to the sizes of these.

        Args:
            runs: the largest runs of each operation; their sizes become lines of the grid.
        """
        listed = list(runs)
        gridding, probing = progress.spans([3.0, 1.0])
        sizes: dict[Operation, tuple[set[int], set[int]]] = {}
        for run in listed:
            inputs, outputs = sizes.setdefault(run.operation, (set(), set()))
            inputs.add(run.inputs)
            outputs.add(run.outputs)
        grids = {operation: (lines(inputs), lines(outputs)) for operation, (inputs, outputs) in sizes.items()}
        points = ((operation, *point) for operation, grid in grids.items() for point in itertools.product(*grid))
        self._add(itertools.starmap(Run, points), gridding)
        self.grids.update(grids)
        self.probe(listed, probing)

    def probe(self, runs: Iterable[Run], progress: Progress = SILENT) -> None:
        """Find the granules of each family of operations, on the largest of these runs."""
        largest: dict[Family, Run] = {}
        for run in runs:
            known = largest.setdefault(run.operation.family, run)
            if run.inputs * run.outputs > known.inputs * known.outputs:
                largest[run.operation.family] = run
        new = {family: run for family, run in largest.items() if family not in self.granules}
        self._add((probe for run in new.values() for axis in (0, 1) for probe in probes(run, axis)), progress)
        for family, run in new.items():
            inputs, outputs = (granule(run, axis, self.known.get(run.operation.key, {})) for axis in (0, 1))
            self.granules[family] = inputs, outputs

    def nanoseconds(self, run: Run) -> float:
        """The time of a run whose operation was measured up to its sizes."""
        grid, granules = self.grids[run.operation], self.granules[run.operation.family]
        sizes = (
            size if size in lines else min(-size // step * -step, lines[-1])
            for size, lines, step in zip((run.inputs, run.outputs), grid, granules, strict=True)
        )
        return interpolated(self.known[run.operation.key], grid, *sizes)

    def _add(self, runs: Iterable[Run], progress: Progress) -> None:
        """Measure runs that are not known."""
        missing = [
            run
            for run in dict.fromkeys(runs)
            if (run.inputs, run.outputs) not in self.known.setdefault(run.operation.key, {})
        ]
        if missing:
            times = self.group.once(lambda: self._measured(missing, progress))
            for run, nanoseconds in zip(missing, times, strict=True):
                self.known[run.operation.key][run.inputs, run.outputs] = nanoseconds
            if self.group.rank == 0:
                self._keep()
        progress.done()

    def _measured(self, runs: Sequence[Run], progress: Progress) -> list[float]:
        """Nanoseconds of each run: the least of a few rounds, in each of which all of them are measured in turn."""
        rows: list[list[float]] = []
        start = time.monotonic()
        with torch.no_grad():
            for span in progress.spans([1.0] * _ROUNDS):
                rows.append([1e9 * _seconds(run) for run in span.track(runs)])
                if time.monotonic() - start > self.limit * len(rows) / _ROUNDS:
                    break
        return list(map(min, zip(*rows, strict=True)))

    def _keep(self) -> None:
        """Add the points to the file, if there may be one; without it, they are measured again in the next run."""
        try:
            self._write()
        except OSError as error:
            _LOGGER.warning("the measured times are not kept for other runs: %s", error)
            self.path = None

    def _write(self) -> None:
        """Add the points to the file, which other processes may have changed."""
        if self.path is None:
            return
        merged = _read(self.path)
        for key, points in self.known.items():
            merged[key] = {**merged.get(key, {}), **points}
        data = {key: [[*point, value] for point, value in points.items()] for key, points in merged.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".times-", dir=self.path.parent) as folder:
            written = Path(folder) / self.path.name
            written.write_text(json.dumps(data))
            os.replace(written, self.path)


def open_table(device: torch.device, group: Group = ALONE) -> Table:
    """The table of this machine, device, version of torch and number of threads, in the user's cache folder.

    Of several processes, all have the table of the first.

    The folder is `balf_fx` in torch's cache folder, which follows TORCH_HOME and XDG_CACHE_HOME. Machines that share it
    have tables of their own, since the names of their processors differ.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    words = (
        f"{name} {_processor()} {torch.backends.cpu.get_cpu_capability()} {torch.__version__} {torch.get_num_threads()}"
    )
    stem = "".join(letter if letter.isalnum() else "-" for letter in words)
    path = Path(torch.hub.get_dir()).parent / "balf_fx" / f"times-{stem}.json"
    return Table(group.once(lambda: _read(path)), path=path, group=group)


def _processor(root: Path = Path("/")) -> str:
    """The name of the processor, or at least its kind.

    Args:
        root: the root of the file system.
    """
    found = None
    with contextlib.suppress(OSError):  # only Linux has the file
        found = re.search(r"^model name\s*:\s*(.+)$", (root / "proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def lines(sizes: Iterable[int]) -> list[int]:
    """The lines of a grid on one axis: these sizes, and powers of two below the largest of them.

    Up to a few features, blocks of a kernel are large steps, so there are lines in the middle, too.
    """
    found = set(sizes)
    size, largest = _LEAST, max(found)
    while size < largest:
        if size * _DEPTH >= largest:
            found |= {size, *([size + size // 2] if largest <= _FEW and 3 * size < 2 * largest else [])}
        size *= 2
    return sorted(size for size in found if size > 0)


def interpolated(points: Points, grid: tuple[Sequence[int], Sequence[int]], inputs: int, outputs: int) -> float:
    """The bilinear interpolation between the points around; outside of the grid, that at its edge."""
    around = itertools.product(_around(grid[0], inputs), _around(grid[1], outputs))
    return sum(above * right * points[row, column] for (row, above), (column, right) in around)


def _around(sizes: Sequence[int], size: int) -> list[tuple[int, float]]:
    """The one or two lines around a size, with their weights."""
    place = bisect.bisect_left(sizes, size)
    if place == 0 or place == len(sizes) or sizes[place] == size:
        return [(sizes[min(place, len(sizes) - 1)], 1.0)]
    low, high = sizes[place - 1], sizes[place]
    share = (size - low) / (high - low)
    return [(low, 1.0 - share), (high, share)]


def _seconds(run: Run) -> float:
    return least_seconds(run.operation.task(run.inputs, run.outputs), run.operation.device)


def _read(path: Path) -> dict[str, Points]:
    """The points in a file; none if there is no file, or one that cannot be read."""
    try:
        data = json.loads(path.read_text())
        return {key: {(one, other): value for one, other, value in points} for key, points in data.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
