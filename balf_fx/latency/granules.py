"""The multiples that kernels prefer.

Kernels work on blocks of values and pad what is left over: between two multiples of a *granule*, times lie above the
line that joins the times of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from balf_fx.latency.operations import Run

_BETWEEN = {8: (13, 21, 29), 16: (8, 24), 32: (16,)}  # by granule: sizes between its multiples, after one of 32
_WASTE = 0.03  # the share of the time by which they must lie above the line


def probes(run: Run, axis: int) -> Iterator[Run]:
    """The runs to measure.

    Args:
        run: an operation at its largest size.
        axis: 0 for inputs, 1 for outputs; the other size stays.
    """
    for size in _sizes(run, axis):
        yield run._replace(inputs=size) if axis == 0 else run._replace(outputs=size)


def granule(run: Run, axis: int, nanoseconds: Mapping[tuple[int, int], float]) -> int:
    """The largest granule whose multiples are faster than the sizes between them; 1 if there is none.

    Args:
        run, axis: as in `probes`, whose times are known.
    """
    times = {}
    for size in _sizes(run, axis):
        times[size] = nanoseconds[(size, run.outputs) if axis == 0 else (run.inputs, size)]
    base = _base(run, axis)
    found = 1
    for step, between in _BETWEEN.items():
        wasted = [above for size in between if (above := _above_line(times, base + size, step)) is not None]
        if wasted and sum(wasted) / len(wasted) > _WASTE:
            found = step
    return found


def _above_line(times: Mapping[int, float], size: int, step: int) -> float | None:
    """By which share a time is above the line between the multiples around it; None if one is not known."""
    low, high = size // step * step, -(-size // step) * step
    if size not in times or low not in times or high not in times:
        return None
    line = times[low] + (size - low) / (high - low) * (times[high] - times[low])
    return times[size] / line - 1.0


def _base(run: Run, axis: int) -> int:
    """The multiple of 32 from which the sizes begin: small, so that what is wasted is a larger share of the time."""
    return 32 if (run.inputs, run.outputs)[axis] >= 64 else 0


def _sizes(run: Run, axis: int) -> list[int]:
    if run.operation.groups > 1 or run.operation.kind in ("cat", "gather", "add"):
        return []
    base = _base(run, axis)
    multiples = range(base, base + 33, 8)
    between = [base + size for sizes in _BETWEEN.values() for size in sizes]
    return [size for size in sorted({*multiples, *between}) if 0 < size <= (run.inputs, run.outputs)[axis]]
