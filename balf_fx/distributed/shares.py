"""How work and samples are shared out over processes."""

from __future__ import annotations

from collections.abc import Sequence


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


def starts_in_turn(counts: Sequence[Sequence[int]], turns: Sequence[Sequence[int]]) -> list[list[int]]:
    """The number of samples before each batch, where processes take turns: first the first batch of each, and so on.

    Args:
        counts: the number of samples of each batch of each process.
        turns: the turn of each, which the pieces of a batch have in common.
    """
    found: list[list[int]] = [[] for _ in counts]
    total = 0
    for process, index in _in_turn(turns):
        found[process].append(total)
        total += counts[process][index]
    return found


def others_in_turn(counts: Sequence[Sequence[int]], turns: Sequence[Sequence[int]], rank: int) -> list[list[int]]:
    """For each batch of a process, the samples of each batch of the others that comes after the one before.

    Arguments as in `starts_in_turn`.
    """
    found: list[list[int]] = []
    waiting: list[int] = []
    for process, index in _in_turn(turns):
        if process == rank:
            found.append(waiting)
            waiting = []
        else:
            waiting.append(counts[process][index])
    return found


def _in_turn(turns: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The process and the index of each batch, in their order."""
    places = [(turn, process, index) for process, own in enumerate(turns) for index, turn in enumerate(own)]
    return [(process, index) for _, process, index in sorted(places)]
