"""How work and samples are shared out over processes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest


def assigned(costs: Sequence[float], processes: int) -> list[int]:
    """The process of each item: the largest items first, each to the process with the least work so far.

    The largest total is at most 4/3 of the least possible one (longest processing time: Graham 1969).

    Args:
        costs: of each item, in any unit.
    """
    loads = [0.0] * processes
    found = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda index: -costs[index]):
        found[item] = min(range(processes), key=loads.__getitem__)
        loads[found[item]] += costs[item]
    return found


def starts_in_turn(counts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The number of samples before each batch, where processes take turns: first the first batch of each, and so on.

    Args:
        counts: the number of samples of each batch of each process.
    """
    found: list[list[int]] = [[] for _ in counts]
    total = 0
    for turn in zip_longest(*counts):
        for starts, count in zip(found, turn, strict=True):
            if count is not None:
                starts.append(total)
                total += count
    return found
