"""The multiple-choice knapsack: choose one candidate from each class, with the least total value within a budget.

Candidate j of class i has value v_ij and cost c_ij, and the budget B limits the total cost. There are three steps, each
with a certificate.

1. The Lagrangian dual, max over s >= 0 of sum_i min_j (v_ij + s c_ij) - s B, is solved exactly: its breakpoints are
   the slopes of each class's lower convex hull, so sorting them replaces bisection (Sinha & Zoltners 1979). No
   choice within the budget has a smaller value than this bound.
2. The greedy choice on the hulls, with the rest of the budget spent on single upgrades, is a first feasible solution.
3. A candidate whose reduced cost exceeds the gap between the two cannot be in an optimum. Over the remaining
   candidates, dynamic programming on the Pareto front of (cost, value) finds the optimum (Nemhauser & Ullmann 1969).
   If the front grows beyond a limit, only its most promising states are kept: the solution is still feasible, and the
   bound limits its distance from the optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from balf_fx.ranks.hulls import lower_hull, segments, steepest_first

_FRONT_LIMIT = 1 << 12
_PIECE = 1 << 20  # states
_BINS = 1 << 14


_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Solution:
    """One candidate index per class, their total cost and value, and the dual bound on the value.

    Attributes:
        multiplier: s >= 0 that maximises the dual.
    """

    choice: tuple[int, ...]
    cost: int
    value: float
    bound: float
    multiplier: float


def minimum_cost(costs: Sequence[Sequence[int]]) -> int:
    """The lowest cost of any choice."""
    return sum(min(row) for row in costs)


def solve(costs: Sequence[Sequence[int]], values: Sequence[Sequence[float]], budget: int) -> Solution:
    """Choose one candidate per class, minimising total value subject to total cost <= budget.

    Of candidates with the same value, the more expensive one is chosen if the budget allows, since it is closer to the
    original layer.

    Raises:
        ValueError: the cheapest choice exceeds the budget.
    """
    if minimum_cost(costs) > budget:
        raise ValueError(f"the cheapest choice costs {minimum_cost(costs)}, the budget is {budget}")
    hulls = [lower_hull(row_costs, row_values) for row_costs, row_values in zip(costs, values, strict=True)]
    slope, start = _dual(hulls, costs, values, budget)
    penalised = _penalised(costs, values, slope)
    bound = dual(costs, values, budget, slope)
    greedy = spend(costs, values, start, budget)
    best = spend(costs, values, _pareto(costs, values, penalised, bound, slope, greedy, budget), budget)
    return Solution(tuple(best), _total(costs, best), _total(values, best), min(bound, _total(values, best)), slope)


def dual(costs: Sequence[Sequence[int]], values: Sequence[Sequence[float]], budget: int, multiplier: float) -> float:
    """sum_i min_j (v_ij + s c_ij) - s B, for any s >= 0 a lower bound on the value of all choices within the budget."""
    return sum(min(row) for row in _penalised(costs, values, multiplier)) - multiplier * budget


def _penalised(
    costs: Sequence[Sequence[int]], values: Sequence[Sequence[float]], multiplier: float
) -> list[list[float]]:
    return [
        [value + multiplier * cost for cost, value in zip(row_costs, row_values, strict=True)]
        for row_costs, row_values in zip(costs, values, strict=True)
    ]


def spend(
    costs: Sequence[Sequence[int]], values: Sequence[Sequence[float]], choice: Sequence[int], budget: int
) -> list[int]:
    """Take single upgrades that fit and do not raise the value, best gain per cost first, until there are none."""
    lengths = torch.tensor([len(row) for row in costs], dtype=torch.int64, device="cpu")
    rows = torch.repeat_interleave(lengths)
    cost = torch.tensor([each for row in costs for each in row], dtype=torch.int64, device="cpu")
    value = torch.tensor([each for row in values for each in row], dtype=torch.float64, device="cpu")
    starts = lengths.cumsum(0) - lengths
    current = torch.tensor(choice, dtype=torch.int64, device="cpu")
    left = budget - _total(costs, choice)
    while True:
        chosen = (starts + current)[rows]
        extra, gain = cost - cost[chosen], value[chosen] - value
        found = torch.nonzero((extra > 0) & (extra <= left) & (gain >= 0)).flatten()
        if not len(found):
            return list(map(int, current))
        rate = gain[found] / extra[found]
        found = found[rate == rate.max()]
        best = found[extra[found].argmax()]
        current[rows[best]] = best - starts[rows[best]]
        left -= int(extra[best])


def _total(table: Sequence[Sequence[_Number]], choice: Sequence[int]) -> _Number:
    return sum(row[index] for row, index in zip(table, choice, strict=True))


def _dual(
    hulls: Sequence[Sequence[int]], costs: Sequence[Sequence[int]], values: Sequence[Sequence[float]], budget: int
) -> tuple[float, list[int]]:
    """The optimal multiplier and the hull choice just before the budget breaks."""
    rows = [segments(*row) for row in zip(costs, values, hulls, strict=True)]
    choice = [hull[0] for hull in hulls]
    cost = _total(costs, choice)
    for slope, row, right in steepest_first(rows):
        extra = costs[row][right] - costs[row][choice[row]]
        if cost + extra > budget:
            return slope, choice
        choice[row], cost = right, cost + extra
    return 0.0, choice


def _pareto(
    costs: Sequence[Sequence[int]],
    values: Sequence[Sequence[float]],
    penalised: Sequence[Sequence[float]],
    bound: float,
    slope: float,
    incumbent: list[int],
    budget: int,
) -> list[int]:
    """The best choice among candidates whose reduced cost fits into the gap, or the incumbent."""
    upper = _total(values, incumbent)
    gap = upper - bound
    if gap <= 1e-12 * max(abs(upper), abs(bound)):
        return incumbent
    floors = [min(row) for row in penalised]
    # Slightly above the gap, so that rounding never drops the incumbent itself.
    kept = [
        [j for j, penalty in enumerate(row) if penalty - floor <= gap * (1 + 1e-9)]
        for row, floor in zip(penalised, floors, strict=True)
    ]
    rest_cost = sum(min(costs[row][j] for j in indices) for row, indices in enumerate(kept))
    front_cost = torch.zeros(1, dtype=torch.int64, device="cpu")
    front_value = torch.zeros(1, dtype=torch.float64, device="cpu")
    trail: list[tuple[Tensor, Tensor]] = []
    rest_floor = sum(floors)
    for row, indices in enumerate(kept):
        row_cost = torch.tensor([costs[row][j] for j in indices], dtype=torch.int64, device="cpu")
        row_value = torch.tensor([values[row][j] for j in indices], dtype=torch.float64, device="cpu")
        rest_cost -= int(row_cost.min())
        rest_floor -= floors[row]

        def reachable(cost: Tensor, value: Tensor, floor: float = rest_floor) -> Tensor:
            return value + slope * cost + floor - slope * budget

        def fits(cost: Tensor, value: Tensor, least: int = rest_cost) -> Tensor:
            return (cost + least <= budget) & (reachable(cost, value) <= upper + gap * 1e-9)

        state, cost, value = _extended((front_cost, front_value), (row_cost, row_value), fits)
        own = _efficient(cost, value)
        if len(own) > _FRONT_LIMIT:
            order = torch.argsort(reachable(cost[own], value[own]), stable=True)
            own = own[order[:_FRONT_LIMIT].sort().values]
        if len(own) == 0:
            return incumbent
        front_cost, front_value, state = cost[own], value[own], state[own]
        trail.append((state // len(indices), state % len(indices)))
    best = int(front_value.argmin())
    if float(front_value[best]) >= upper:
        return incumbent
    choice: list[int] = []
    for indices, (parent, candidate) in zip(reversed(kept), reversed(trail), strict=True):
        choice.append(indices[int(candidate[best])])
        best = int(parent[best])
    return choice[::-1]


def _extended(
    front: tuple[Tensor, Tensor], row: tuple[Tensor, Tensor], fits: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The states that a row's candidates make of those of a front, in their order, but for many that are dominated.

    They are made and dropped in pieces, since there may be millions.

    Args:
        front, row: cost and value of each state, and of each candidate.
        fits: which of some states to keep, given cost and value.

    Returns:
        The number of each state, which is that of the old one times the number of candidates plus that of the
        candidate; its cost and its value.
    """
    states, candidates = len(front[0]), len(row[0])
    found: list[tuple[Tensor, ...]] = []
    for piece in torch.split(torch.arange(candidates, device="cpu"), max(_PIECE // states, 1)):
        cost, value = ((old[:, None] + new[piece]).flatten() for old, new in zip(front, row, strict=True))
        kept = torch.nonzero(fits(cost, value)).flatten()
        kept = kept[_hopeful(cost[kept], value[kept])]
        found.append((kept // len(piece) * candidates + piece[kept % len(piece)], cost[kept], value[kept]))
    state, cost, value = map(torch.cat, zip(*found, strict=True))
    order = torch.argsort(state)
    return state[order], cost[order], value[order]


def _hopeful(cost: Tensor, value: Tensor) -> Tensor:
    """The indices of states, without those whose value some state in a bin of cheaper ones reaches: no need to sort."""
    if len(cost) == 0:
        return cost
    low, high = int(cost.min()), int(cost.max())
    bins = ((cost - low).double() * ((_BINS - 1) / max(high - low, 1))).long()
    least = value.new_full((_BINS,), torch.inf).scatter_reduce(0, bins, value, "amin")
    before = torch.cat([least.new_full((1,), torch.inf), least.cummin(0).values[:-1]])
    return torch.nonzero(value < before[bins]).flatten()


def _efficient(cost: Tensor, value: Tensor) -> Tensor:
    """The indices of the states whose value no cheaper state reaches, in order of cost."""
    by_value = torch.argsort(value, stable=True)
    order = by_value[torch.argsort(cost[by_value], stable=True)]
    if len(order) < 2:
        return order
    ordered = value[order]
    best_before = torch.cat([ordered.new_full((1,), torch.inf), ordered.cummin(0).values[:-1]])
    return order[ordered < best_before]
