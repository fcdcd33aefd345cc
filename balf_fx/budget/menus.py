"""Menus: the candidates of a cluster's members at one choice of sizes, and the combinations of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from balf_fx.budget.members import Ranks
from balf_fx.budget.options import Option
from balf_fx.graph.curves import Cost

_PRODUCTS = 512  # up to so many choices of ranks at one size are all tried; else those on the convex hull


class Priced(NamedTuple):
    """Choices of one candidate per member at one choice of sizes.

    Attributes:
        costs, losses: [n] int64 and [n] float64.
        picks: [n, members] int64, the indices of the candidates; None for all choices in the order of
            `itertools.product`.
    """

    costs: Tensor
    losses: Tensor
    picks: Tensor | None = None


@dataclass(frozen=True)
class Menu:
    """The candidates at one choice of sizes.

    Attributes:
        others: the cost of the shares.
        rows: the candidates of each member.
    """

    others: Cost
    rows: tuple[Ranks, ...]

    @property
    def choices(self) -> int:
        """The number of choices of one candidate per member."""
        return math.prod(len(row.candidates) for row in self.rows)

    def all_choices(self, weights: Sequence[float]) -> Priced:
        """All choices, in the order of `itertools.product`."""
        costs = [row.costs for row in self.rows]
        losses = [weight * row.losses for row, weight in zip(self.rows, weights, strict=True)]
        return Priced(_all_sums(costs, torch.int64), _all_sums(losses, torch.float64))

    def pick(self, index: int) -> tuple[int, ...]:
        """The choice with this index among all choices."""
        found: list[int] = []
        for row in reversed(self.rows):
            index, own = divmod(index, len(row.candidates))
            found.append(own)
        return tuple(reversed(found))

    def option(self, picked: Sequence[int], sizes: tuple[int, ...], loss: float) -> Option:
        """The option of one choice at these sizes."""
        ranks = tuple(row.candidates[own] for row, own in zip(self.rows, picked, strict=True))
        return Option(ranks, sizes, sum((each.total for each in ranks), self.others), self.others, loss)


def priced_menus(menus: Sequence[Menu], weights: Sequence[float]) -> Iterator[Priced]:
    """The choices at each menu: all if they are few, else those on the lower convex hull of cost and weighted loss."""
    on_hulls = iter(_on_hulls([menu for menu in menus if menu.choices > _PRODUCTS], weights))
    for menu in menus:
        yield next(on_hulls) if menu.choices > _PRODUCTS else menu.all_choices(weights)


def _on_hulls(menus: Sequence[Menu], weights: Sequence[float]) -> list[Priced]:
    """The choices on the lower convex hull of each menu, for all menus at once.

    They begin with the cheapest; each next one takes the steepest segment that is left of any member, as
    `hulls.steepest_first` orders them.
    """
    if not menus:
        return []
    tables = [_Table.of([menu.rows[member] for menu in menus]) for member in range(len(weights))]
    slopes = torch.cat([weight * table.slopes for table, weight in zip(tables, weights, strict=True)], 1)
    members = torch.repeat_interleave(torch.tensor([table.slopes.shape[1] for table in tables], device="cpu"))
    steepest = torch.argsort(-slopes, dim=1, stable=True)
    taken = F.pad(F.one_hot(members[steepest], len(tables)).cumsum(1), (0, 0, 1, 0))  # segments of each member so far
    picks = [table.points.gather(1, own) for table, own in zip(tables, taken.unbind(2), strict=True)]
    pairs = list(zip(tables, picks, strict=True))
    costs = torch.stack([table.costs.gather(1, own) for table, own in pairs]).sum(0)
    losses = [weight * table.losses.gather(1, own) for weight, (table, own) in zip(weights, pairs, strict=True)]
    rows = zip(costs, torch.stack(losses).sum(0), torch.stack(picks, 2), strict=True)
    counts = (1 + torch.isfinite(slopes).sum(1)).tolist()  # what follows is of menus with longer hulls
    return [Priced(*(each[:count] for each in row)) for row, count in zip(rows, counts, strict=True)]


class _Table(NamedTuple):
    """The candidates of one member at some sizes and their hulls, as rows that are filled up to one length.

    Attributes:
        costs, losses: [sizes, n] int64 and float64.
        points: [sizes, k + 1] int64, filled up with 0.
        slopes: [sizes, k] float64, filled up with minus infinity.
    """

    costs: Tensor
    losses: Tensor
    points: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, rows: Sequence[Ranks]) -> _Table:
        distinct = list({id(row): row for row in rows}.values())
        number = {id(row): index for index, row in enumerate(distinct)}
        at = torch.tensor([number[id(row)] for row in rows], device="cpu")
        columns = zip(*((row.costs, row.losses, *row.hull) for row in distinct), strict=True)
        fills = (0, 0.0, 0, -math.inf)
        return cls(*(pad_sequence(list(own), True, fill)[at] for own, fill in zip(columns, fills, strict=True)))


def built(menu: Menu, picks: Tensor | None, sizes: tuple[int, ...], index: int, loss: float) -> Option:
    """The option with this index among those of `Priced`."""
    return menu.option(menu.pick(index) if picks is None else picks[index].tolist(), sizes, loss)


def _all_sums(rows: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sums of one item from each row, [product of lengths], in the order of `itertools.product`."""
    return reduce(lambda total, row: (total[:, None] + row).flatten(), rows, torch.zeros(1, dtype=dtype, device="cpu"))
