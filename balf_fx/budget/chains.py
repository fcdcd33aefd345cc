"""Choices for a chain of variables, whose loss and cost are sums of tables over few of them.

The widths of a plain chain of layers are such variables: each layer's cost depends on the width that it reads and on
the width that it outputs. Their combinations are too many to list, but min-sum variable elimination finds the best one
for any price of the cost (Bertele and Brioschi, Nonserial Dynamic Programming, 1972), and a search over prices finds
the lower convex hull of cost and loss (Aneja and Nair, Management Science 1979).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_LONGEST = 96  # points of a hull
_ROUNDING = 1e-12


class Table(NamedTuple):
    """Values for all combinations of some variables.

    Attributes:
        variables: their numbers.
        values: float64, an axis for each of them.
    """

    variables: tuple[int, ...]
    values: Tensor


class Factor(NamedTuple):
    """What some variables cost and lose, with a choice among n candidates at each of their combinations.

    Attributes:
        variables: their numbers.
        costs, losses: float64, an axis for each of them, and then [n].
    """

    variables: tuple[int, ...]
    costs: Tensor
    losses: Tensor

    @classmethod
    def of(
        cls,
        variables: tuple[int, ...],
        sizes: Sequence[int],
        costs: Iterable[Sequence[float] | Tensor],
        losses: Iterable[Sequence[float] | Tensor],
    ) -> Factor:
        """A factor of the candidates at each combination, which are at least one, in the order of `itertools.product`.

        Args:
            sizes: the number of values of each variable.
        """
        rows = [[torch.as_tensor(row, dtype=torch.float64, device="cpu") for row in own] for own in (costs, losses)]
        filled = (pad_sequence(own, True, fill) for own, fill in zip(rows, (0.0, math.inf), strict=True))
        return cls(variables, *(each.reshape(*sizes, -1) for each in filled))

    def at(self, price: float) -> Table:
        """The least loss + price * cost of each combination."""
        return Table(self.variables, (self.losses + price * self.costs).amin(-1))

    def pick(self, places: Sequence[int], price: float) -> tuple[int, float, float]:
        """The candidate with the least loss + price * cost at a combination, its cost and its loss."""
        at = tuple(places[variable] for variable in self.variables)
        picked = int((self.losses[at] + price * self.costs[at]).argmin())
        return picked, float(self.costs[at][picked]), float(self.losses[at][picked])


class Point(NamedTuple):
    """A combination.

    Attributes:
        places: the value of each variable.
        picked: the candidate of each factor.
    """

    cost: float
    loss: float
    places: tuple[int, ...]
    picked: tuple[int, ...]


def hull(factors: Sequence[Factor]) -> list[Point]:
    """Points on the lower convex hull of cost and loss, ascending in cost; the widest steps of cost are filled first.

    Args:
        factors: name every variable 0 .. n - 1; costs are whole numbers, losses are not negative.
    """
    dearest = 1.0 + sum(
        float(factor.losses[factor.losses.isfinite()].max()) for factor in factors
    )  # at which no loss is worth a unit of cost
    cheapest, best = _solve(factors, dearest), _solve(factors, 0.0)
    found = {cheapest, best}
    steps = [(cheapest.cost - best.cost, cheapest, best)]
    while steps and len(found) < _LONGEST:
        _, left, right = heapq.heappop(steps)
        if left.loss <= right.loss or left.cost >= right.cost:
            continue
        price = (left.loss - right.loss) / (right.cost - left.cost)
        middle, line = _solve(factors, price), left.loss + price * left.cost
        if middle in found or middle.loss + price * middle.cost >= line - _ROUNDING * line:
            continue
        found.add(middle)
        for pair in ((left, middle), (middle, right)):
            heapq.heappush(steps, (pair[0].cost - pair[1].cost, *pair))
    return sorted(found)


def _solve(factors: Sequence[Factor], price: float) -> Point:
    """The combination with the least loss + price * cost."""
    places = least([factor.at(price) for factor in factors])
    picked, costs, losses = zip(*(factor.pick(places, price) for factor in factors), strict=True)
    return Point(sum(costs), sum(losses), tuple(places), picked)


def elimination_order(scopes: Iterable[Collection[int]]) -> list[tuple[int, frozenset[int]]]:
    """Variables in the order in which they are eliminated, each with the others on which its best value depends.

    The next one is that with the fewest of these (Rose 1970).

    Args:
        scopes: the variables of each table.
    """
    near: dict[int, set[int]] = {}
    for scope in scopes:
        for variable in scope:
            near.setdefault(variable, set()).update(set(scope) - {variable})
    order: list[tuple[int, frozenset[int]]] = []
    while near:
        variable = min(near, key=lambda each: (len(near[each]), each))
        others = near.pop(variable)
        for other in others:
            near[other] |= others - {other}
            near[other].discard(variable)
        order.append((variable, frozenset(others)))
    return order


def least(tables: Sequence[Table]) -> list[int]:
    """The value of each variable at which the sum of all tables is least; of equals, the first.

    Args:
        tables: name every variable 0 .. n - 1.
    """
    pending = list(tables)
    solved: list[Table] = []
    order = elimination_order(table.variables for table in tables)
    for variable, others in order:
        scope = (*sorted(others), variable)
        own = [table for table in pending if variable in table.variables]
        pending = [table for table in pending if variable not in table.variables]
        found = sum((_spread(table, scope) for table in own), torch.zeros((), dtype=torch.float64, device="cpu"))
        lowest = found.min(-1)
        solved.append(Table(scope[:-1], lowest.indices))
        pending.append(Table(scope[:-1], lowest.values))
    chosen = [0] * len(order)
    for (variable, _), table in zip(reversed(order), reversed(solved), strict=True):
        chosen[variable] = int(table.values[tuple(chosen[other] for other in table.variables)])
    return chosen


def _spread(table: Table, scope: Sequence[int]) -> Tensor:
    """The values with an axis for each variable of a larger scope."""
    axes = sorted(range(len(table.variables)), key=lambda axis: scope.index(table.variables[axis]))
    values = table.values.permute(axes)
    return values[tuple(slice(None) if each in table.variables else None for each in scope)]
