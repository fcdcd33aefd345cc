"""Clusters: sites and widths that are chosen together, since the size of a width changes the cost of layers around it.

The options of a cluster are all combinations of sizes of its widths and, for each of them, combinations of ranks of
its sites: all of them if there are few, else those on the lower convex hull of cost and loss. The loss of a rank is
assumed to be the same at every size, and losses are added, as squared errors that are independent.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from balf_fx.budget.chains import Factor, hull
from balf_fx.budget.members import Member, Ranks, Share
from balf_fx.budget.menus import Menu, built, priced_menus
from balf_fx.budget.options import Option, Options
from balf_fx.graph.curves import FREE, Candidate, Cost, Measure, RankCurve
from balf_fx.graph.widths import Width, WidthCurve

_SIZES = {1: 32, 2: 12}  # the sizes tried for each width, by the number of widths in a cluster; 8 for each of more


class _Piece(NamedTuple):
    """Some options.

    Attributes:
        costs, losses: [n] int64 and [n] float64.
        build: makes one from its index and its loss.
    """

    costs: Tensor
    losses: Tensor
    build: Callable[[int, float], Option]


class _Asked(NamedTuple):
    """What options are wanted.

    Attributes:
        tried: the sizes of each width.
        lost: the loss of each width at sizes 0 .. features.
        curves, weights: the curve and the weight of each member.
    """

    tried: Sequence[Sequence[int]]
    lost: Sequence[Sequence[float]]
    curves: Sequence[RankCurve]
    weights: Sequence[float]
    measure: Measure


@dataclass(frozen=True)
class Cluster:
    """Widths that share layers, the sites among these layers, and other operations whose cost depends on their sizes.

    Members and shares depend on the shares of features that are kept: of each width, and then of each part of one.

    Attributes:
        parts: the index of a width, and how many of some of its features are kept at each of its sizes.

    The costs of the members' candidates do not depend on the weights and are cached: to try several weights, keep the
    cluster.
    """

    widths: tuple[Width, ...]
    curves: tuple[WidthCurve, ...]
    members: tuple[Member, ...]
    shares: tuple[Share, ...]
    parts: tuple[tuple[int, tuple[int, ...]], ...] = ()
    _known: dict[tuple[Measure, int, tuple[float, ...]], Ranks] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def options(
        self,
        curves: Sequence[RankCurve],
        weights: Sequence[float],
        width_weights: Sequence[float],
        measure: Measure,
        near: Option | None = None,
    ) -> Options:
        """The Pareto-optimal options, ascending in cost; without `near`, the last one is the unchanged model.

        Args:
            curves, weights: the curve and the weight of each member, in their order.
            width_weights: the loss of each width when all its features are removed.
            near: an earlier option; sizes between its own and the next larger ones are tried.
        """
        losses = [
            [weight * curve.normalised(d) for d in curve.distortion]
            for curve, weight in zip(self.curves, width_weights, strict=True)
        ]
        tried = [_sizes(width, len(self.widths)) for width in self.widths]
        if near is not None:
            tried = list(map(_between_sizes, near.sizes, tried, (width.step for width in self.widths)))
        asked = _Asked(tried, losses, curves, weights, measure)
        pieces = list(self._listed(asked) if len(self.widths) in _SIZES else self._chained(asked))
        if near is not None:
            pieces += self._neighbours(near, curves, weights, measure)
        starts = [0, *itertools.accumulate(len(piece.costs) for piece in pieces)]
        cost, loss = torch.cat([piece.costs for piece in pieces]), torch.cat([piece.losses for piece in pieces])
        efficient = _efficient(cost, loss)

        def make(index: int, loss: float) -> Option:
            own = bisect.bisect_right(starts, index) - 1
            return pieces[own].build(index - starts[own], loss)

        return Options(efficient.tolist(), cost[efficient].tolist(), loss[efficient].tolist(), make)

    def _listed(self, asked: _Asked) -> Iterator[_Piece]:
        """The options at all combinations of sizes."""
        all_sizes = list(itertools.product(*asked.tried))
        menus = [self._menu(sizes, asked) for sizes in all_sizes]
        for sizes, menu, priced in zip(all_sizes, menus, priced_menus(menus, asked.weights), strict=True):
            kept = sum(loss[size] for loss, size in zip(asked.lost, sizes, strict=True))
            costs = menu.others.of(asked.measure) + priced.costs
            yield _Piece(costs, kept + priced.losses, partial(built, menu, priced.picks, sizes))

    def _chained(self, asked: _Asked) -> Iterator[_Piece]:
        """The options on the lower convex hull of all combinations of sizes, and the most expensive one."""
        factors = [self._member_factor(index, asked) for index in range(len(self.members))]
        factors += [self._share_factor(share, asked) for share in self.shares]
        for index, (sizes, lost) in enumerate(zip(asked.tried, asked.lost, strict=True)):
            factors.append(Factor.of((index,), [len(sizes)], [[0]] * len(sizes), [[lost[size]] for size in sizes]))
        for point in hull(factors):
            sizes = tuple(own[place] for own, place in zip(asked.tried, point.places, strict=True))
            yield _piece(self._menu(sizes, asked), sizes, point.picked[: len(self.members)], asked)
        largest = tuple(sizes[-1] for sizes in asked.tried)
        menu = self._menu(largest, asked)
        yield _piece(menu, largest, [len(row.candidates) - 1 for row in menu.rows], asked)

    def _member_factor(self, index: int, asked: _Asked) -> Factor:
        member, curve, weight = self.members[index], asked.curves[index], asked.weights[index]
        variables = self._widths_of(member.depends_on)
        found = [self._ranks(index, curve, kept, asked.measure) for kept in self._all_kept(variables, asked)]
        costs, losses = [row.costs for row in found], [weight * row.losses for row in found]
        return Factor.of(variables, [len(asked.tried[variable]) for variable in variables], costs, losses)

    def _share_factor(self, share: Share, asked: _Asked) -> Factor:
        variables = self._widths_of(index for index, _ in share.shrinks)
        costs = [[share.cost(kept).of(asked.measure)] for kept in self._all_kept(variables, asked)]
        return Factor.of(variables, [len(asked.tried[each]) for each in variables], costs, [[0.0]] * len(costs))

    def _widths_of(self, shares: Iterable[int]) -> tuple[int, ...]:
        """The widths on which shares of kept features depend, ascending."""
        own = (index if index < len(self.widths) else self.parts[index - len(self.widths)][0] for index in shares)
        return tuple(sorted(set(own)))

    def _all_kept(self, variables: Sequence[int], asked: _Asked) -> Iterator[list[float]]:
        """The shares of kept features at each combination of sizes of some widths; the others keep all."""
        for sizes in itertools.product(*(asked.tried[variable] for variable in variables)):
            own = dict(zip(variables, sizes, strict=True))
            yield self._kept([own.get(index, width.features) for index, width in enumerate(self.widths)])

    def _kept(self, sizes: Sequence[int]) -> list[float]:
        """The shares of features that are kept at some sizes: those of the widths, then those of their parts."""
        widths = [size / width.features for size, width in zip(sizes, self.widths, strict=True)]
        return [*widths, *(counts[sizes[index]] / counts[-1] for index, counts in self.parts)]

    def _menu(self, sizes: tuple[int, ...], asked: _Asked) -> Menu:
        kept = self._kept(sizes)
        rows = (self._ranks(index, curve, kept, asked.measure) for index, curve in enumerate(asked.curves))
        return Menu(sum((share.cost(kept) for share in self.shares), FREE), tuple(rows))

    def _ranks(self, index: int, curve: RankCurve, kept: Sequence[float], measure: Measure) -> Ranks:
        """The candidates of one member, which depend on the sizes of few of the widths."""
        member = self.members[index]
        key = measure, index, tuple(kept[width] for width in member.depends_on)
        known = self._known.get(key)
        if known is None or known.curve is not curve:
            known = self._known[key] = Ranks.of(member, curve, kept, measure)
        return known

    def _neighbours(
        self, near: Option, curves: Sequence[RankCurve], weights: Sequence[float], measure: Measure
    ) -> Iterator[_Piece]:
        """Options that differ from `near` in one member's rank, for each member, over all ranks."""
        kept = self._kept(near.sizes)
        for index, (member, curve, weight) in enumerate(zip(self.members, curves, weights, strict=True)):
            old = near.ranks[index]
            row = Ranks.of(member, curve, kept, measure, every=True)
            cost = near.cost(measure) - old.cost(measure) + row.costs
            loss = near.loss + weight * (row.losses - curve.normalised(old.distortion))
            yield _Piece(cost, loss, partial(_changed, near, index, row.candidates))

    def repeated(self, calls: int) -> Cluster:
        """The same cluster in a graph that is run several times."""
        members = tuple(
            dataclasses.replace(each, flops=calls * each.flops, output_elements=calls * each.output_elements)
            for each in self.members
        )
        shares = tuple(dataclasses.replace(each, full=each.full.repeated(calls)) for each in self.shares)
        return dataclasses.replace(self, members=members, shares=shares)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its widths."""
        return tuple(width.key for width in self.widths)

    @property
    def full(self) -> Cost:
        """The cost of the shares at full size."""
        return sum((share.full for share in self.shares), FREE)


def _piece(menu: Menu, sizes: tuple[int, ...], picked: Sequence[int], asked: _Asked) -> _Piece:
    """One option."""
    cost, loss = menu.others.of(asked.measure), sum(lost[size] for lost, size in zip(asked.lost, sizes, strict=True))
    for row, own, weight in zip(menu.rows, picked, asked.weights, strict=True):
        cost, loss = cost + int(row.costs[own]), loss + weight * float(row.losses[own])
    found = torch.tensor([cost], device="cpu"), torch.tensor([loss], dtype=torch.float64, device="cpu")
    return _Piece(*found, partial(built, menu, torch.tensor([picked], device="cpu"), sizes))


def _sizes(width: Width, together: int) -> list[int]:
    """The sizes to try, the full one last: multiples of eight, which suit the hardware, if there are enough."""
    count = _SIZES.get(together, 8)
    step = math.lcm(width.step, 8 if width.features >= 8 * count else 4 if width.features >= 4 * count else 1)
    exact = [width.features * k / count for k in range(1, count)]
    least = math.ceil(width.least / step) * step
    rounded = {min(max(round(size / step) * step, least), width.features) for size in exact}
    return [*sorted(rounded - {width.features}), width.features]


def _between_sizes(size: int, tried: Sequence[int], step: int) -> list[int]:
    """A few sizes from this one up to the next larger one that was tried, in steps of a multiple of `step`."""
    following = next((other for other in tried if other > size), size)
    step *= max((following - size) // (8 * step), 1)
    return list(range(size, following, step)) or [size]


def _changed(near: Option, member: int, candidates: Sequence[Candidate], index: int, loss: float) -> Option:
    return near.changed(member, candidates[index], loss)


def _efficient(costs: Tensor, losses: Tensor) -> Tensor:
    """The indices of the Pareto-optimal choices, ascending in cost.

    Choices with the same loss are all kept, so that the rest of a budget can go to the more expensive one.
    """
    order = torch.argsort(losses, stable=True)
    order = order[torch.argsort(costs[order], stable=True)]
    ordered = losses[order]
    least = torch.cat([ordered.new_full((1,), math.inf), ordered.cummin(0).values[:-1]])
    return order[ordered <= least]
