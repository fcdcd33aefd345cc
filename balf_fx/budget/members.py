"""The members of a cluster and their costs by the sizes of the widths: sites, and other operations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from balf_fx.graph.curves import Candidate, Cost, Measure, RankCurve
from balf_fx.graph.site import Site
from balf_fx.ranks.costs import rank_flops, rank_params, timed, useful_ranks, with_blocks
from balf_fx.ranks.hulls import lower_hull, segments

_RANKS = 48  # ranks tried for each site at each size; the steps between them only limit the allocation's resolution

_T = TypeVar("_T")


@dataclass(frozen=True)
class Share:
    """An operation whose cost depends on the sizes: an attention product, a depthwise convolution, a small layer.

    Attributes:
        full: its cost at full size.
        shrinks: the share of the cost that is proportional to each width, by the width's index in the cluster.
        padded: whether the cost depends only on the width that keeps the largest share of its features, since the
            others are padded to it (`passes.Narrow`).
    """

    full: Cost
    shrinks: tuple[tuple[int, float], ...]
    padded: bool = False

    def cost(self, kept: Sequence[float]) -> Cost:
        """The cost, given the share of features that each width keeps."""
        factor = 1.0 - sum(share * (1.0 - kept[index]) for index, share in self.shrinks)
        if self.padded:
            whole = math.isclose(sum(share for _, share in self.shrinks), 1.0)
            factor = max(kept[index] for index, _ in self.shrinks) if whole else 1.0
        return Cost(*(round(factor * value) for value in (self.full.flops, self.full.params, self.full.latency)))


@dataclass(frozen=True)
class Member:
    """A site of a cluster.

    Attributes:
        flops, output_elements: of the layer at full size.
        outputs: the index in the cluster of each width that it outputs, and the number of its rows in that width.
        reads: the index of the width that it reads, or None.
        mixed: whether narrowing combines its rows, so that it must stay dense if its outputs are narrowed.
        bias: whether it has a bias, or gets one when it reads fewer features.
        heads: the index of each width whose heads may get identity blocks in it, and the number of these heads.
        along: the index of the width whose features its groups process, so that it has fewer groups at smaller sizes.
    """

    site: Site
    flops: int
    output_elements: int
    outputs: tuple[tuple[int, int], ...]
    reads: int | None
    mixed: bool
    bias: bool
    heads: tuple[tuple[int, int], ...] = ()
    along: int | None = None

    @property
    def depends_on(self) -> tuple[int, ...]:
        """The indices of the widths on whose sizes its candidates depend."""
        own = (index for index in (self.reads, self.along) if index is not None)
        return tuple(sorted({*own, *(index for index, _ in self.outputs)}))

    def narrowed(self, kept: Sequence[float]) -> Site:
        """The site at these sizes."""
        outputs = self.site.out_features - sum(round(rows * (1.0 - kept[index])) for index, rows in self.outputs)
        inputs = self.site.in_features
        if self.reads is not None:
            inputs = round(inputs * kept[self.reads])
        groups = self.site.groups if self.along is None else round(self.site.groups * kept[self.along])
        return dataclasses.replace(self.site, out_features=outputs, in_features=inputs, groups=groups)

    def candidates(self, curve: RankCurve, kept: Sequence[float], every: bool = False) -> list[Candidate]:
        """Some of its ranks at these sizes, or all with `every`, ascending; then dense."""
        site = self.narrowed(kept)
        choose = list if every else _thin
        if site == self.site:
            blocks = (each for each in curve.candidates if each.blocks)
            return [*choose(list(curve.whole.values())), *blocks, curve.dense]
        if self.along is not None:
            aligned = [each for rank, each in curve.whole.items() if rank % site.step == 0]
            return [_with_groups(each, site.groups, self.site) for each in (*choose(aligned), curve.dense)]
        flops = self.flops // (self.site.out_features * self.site.in_features) * site.out_features * site.in_features
        elements = self.output_elements // self.site.out_features * site.out_features
        biased = self.bias and (self.reads is None or kept[self.reads] < 1.0 or self.site.bias is not None)
        extra = site.out_features if biased and self.site.bias is None else 0
        dense = Candidate(None, flops, rank_params(site, None, False) + extra, 0.0)
        simpler = with_blocks(dense, self._blocks(kept), elements // site.out_features)
        if self.mixed and any(kept[index] < 1.0 for index, _ in self.outputs):
            return timed([*simpler, dense], site, curve.clock)
        gains = biased or curve.spectrum.mean is not None
        ranks = choose([rank for rank in useful_ranks(site) if rank in curve.whole])
        costs = ((rank_flops(site, rank, flops, elements), rank_params(site, rank, gains)) for rank in ranks)
        low = [Candidate(rank, *cost, curve.whole[rank].distortion) for rank, cost in zip(ranks, costs, strict=True)]
        return timed([*low, *simpler, dense], site, curve.clock)

    def _blocks(self, kept: Sequence[float]) -> int:
        """The entries of its identity blocks at these sizes."""
        rows = dict(self.outputs)
        return sum(heads * round(rows[index] / heads * kept[index]) ** 2 for index, heads in self.heads)


class Hull(NamedTuple):
    """A lower convex hull of candidates: points [k + 1] int64 from the cheapest on, slopes [k] float64 between them."""

    points: Tensor
    slopes: Tensor


@dataclass(frozen=True)
class Ranks:
    """The candidates of a member at some sizes, before their losses are weighted.

    Attributes:
        curve: the curve of the member.
        candidates: n of them, as from `Member.candidates`.
        costs, losses: [n] int64 and float64, their costs and normalised distortions.
    """

    curve: RankCurve
    candidates: tuple[Candidate, ...]
    costs: Tensor
    losses: Tensor

    @classmethod
    def of(
        cls, member: Member, curve: RankCurve, kept: Sequence[float], measure: Measure, every: bool = False
    ) -> Ranks:
        """The candidates of a member at these sizes, `every` one or some."""
        found = tuple(member.candidates(curve, kept, every))
        costs = torch.tensor([candidate.cost(measure) for candidate in found], dtype=torch.int64, device="cpu")
        lost = [curve.normalised(candidate.distortion) for candidate in found]
        return cls(curve, found, costs, torch.tensor(lost, dtype=torch.float64, device="cpu"))

    @cached_property
    def hull(self) -> Hull:
        """The lower convex hull; a weight of the losses changes all slopes alike."""
        costs, losses = self.costs.tolist(), self.losses.tolist()
        points = lower_hull(costs, losses)
        slopes = [steepness for steepness, _ in segments(costs, losses, points)]
        return Hull(torch.tensor(points, device="cpu"), torch.tensor(slopes, dtype=torch.float64, device="cpu"))


def _with_groups(candidate: Candidate, groups: int, site: Site) -> Candidate:
    """The candidate of a site with fewer groups, which all cost the same."""
    before = candidate.flops, candidate.params, candidate.latency
    flops, params, latency = (value * groups // site.groups for value in before)
    return dataclasses.replace(candidate, flops=flops, params=params, latency=latency)


def _thin(found: Sequence[_T]) -> list[_T]:
    if len(found) <= _RANKS:
        return list(found)
    picked = sorted({round(i * (len(found) - 1) / (_RANKS - 1)) for i in range(_RANKS)})
    return [found[i] for i in picked]
