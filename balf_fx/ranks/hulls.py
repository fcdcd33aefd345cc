"""Lower convex hulls of choices by cost and loss: the choices that some Lagrange multiplier selects."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def lower_hull(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Indices of the points on the hull, from the lowest cost to the lowest loss; slopes decrease along it."""
    hull: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
        if hull and losses[index] >= losses[hull[-1]]:
            continue
        while len(hull) > 1 and (losses[hull[-2]] - losses[hull[-1]]) * (costs[index] - costs[hull[-1]]) <= (
            losses[hull[-1]] - losses[index]
        ) * (costs[hull[-1]] - costs[hull[-2]]):
            hull.pop()
        hull.append(index)
    return hull


def slope(costs: Sequence[float], losses: Sequence[float], left: int, right: int) -> float:
    """The decrease in loss per unit of cost between two points, whose costs differ."""
    return (losses[left] - losses[right]) / (costs[right] - costs[left])


def segments(costs: Sequence[float], losses: Sequence[float], hull: Sequence[int]) -> list[tuple[float, int]]:
    """The slope of each segment of a hull, descending, and the index of the point at its end."""
    return [(slope(costs, losses, left, right), right) for left, right in pairwise(hull)]


def steepest_first(rows: Sequence[Sequence[tuple[float, int]]]) -> list[tuple[float, int, int]]:
    """The segments of several hulls as (slope, row, index of the point at its end), steepest first."""
    found = [(gain, row, point) for row, own in enumerate(rows) for gain, point in own]
    return sorted(found, key=lambda segment: (-segment[0], segment[1]))
