"""The cost of a site as a function of its rank."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from balf_fx.graph.curves import Candidate, Clock, EnergyCurve, PartRanks, Rank, RankCurve, Spectrum, each_rank
from balf_fx.graph.site import Site
from balf_fx.ranks.spectra import tail_energies

_POINTS = 64  # points of an energy curve: enough for a plot, few enough to store with the model


def rank_params(site: Site, rank: Rank, bias: bool) -> int:
    """Parameters of a site at a rank; with `bias`, a site without a bias gets one for its parts that are not dense."""
    outputs, inputs = site.out_features, site.in_features
    second, first = site.factor_sizes
    total, parts, dense = _spread(rank)
    weights = total * (second // parts + first) + dense * (outputs // parts * inputs) - _saved(site, rank)
    if site.keeps_weight and rank is not None:
        weights += outputs * inputs
    biased = outputs if site.bias is not None else outputs // parts * (parts - dense) * bias
    return site.groups * (weights + biased)


def rank_flops(site: Site, rank: Rank, dense_flops: int, output_elements: int) -> int:
    """FLOPs of a site at a rank.

    The first factor is the layer itself with r outputs per group in place of O. The second needs r multiply-adds for
    each element of the output, or of the part of the output to which the rank belongs. Where the map is written with
    its own rows or columns, r of these elements need none. Where a kernel is divided, each factor reads some of the
    pixels under it.

    Args:
        dense_flops, output_elements: sums over all uses of the site.
    """
    if dense_flops == 0:
        return 0
    total, parts, dense = _spread(rank)
    taps = site.factor_taps[1]
    first = dense_flops // site.factor_sizes[0] * total + dense_flops // parts * dense
    return first + 2 * (
        total * taps * output_elements // parts - _saved(site, rank) * (output_elements // site.out_features)
    )


def _spread(rank: Rank) -> tuple[int, int, int]:
    """The first factor's outputs per group, the number of parts, and the number of parts that stay dense."""
    if isinstance(rank, int):
        return rank, 1, 0
    ranks = each_rank(rank)
    return sum(r or 0 for r in ranks), len(ranks), ranks.count(None)


def _saved(site: Site, rank: Rank) -> int:
    """The numbers of a pair of factors that need not be stored where the map is written in another form, per group."""
    if site.form(rank) not in ("rows", "columns"):
        return 0
    return rank * rank if isinstance(rank, int) else sum(r * r for r in each_rank(rank) if r is not None)


def possible_ranks(site: Site) -> list[int]:
    """The ranks whose factors have fewer numbers than the dense weight, ascending."""
    if site.keeps_rank:
        return []
    dense, both = site.out_features * site.in_features, sum(site.factor_sizes)
    ranks = range(site.step, site.full_rank, site.step)
    return [rank for rank in ranks if rank * both - _saved(site, rank) < dense]


def useful_ranks(site: Site) -> list[int]:
    """The possible ranks without those for which a higher one costs no more, ascending."""
    if site.keeps_rank:
        return []
    found: list[int] = []
    least, both = site.out_features * site.in_features, sum(site.factor_sizes)
    for rank in reversed(range(site.step, site.full_rank, site.step)):
        cost = rank * both - _saved(site, rank)
        if cost < least:
            found.append(rank)
            least = cost
    return found[::-1]


def rank_curve(
    site: Site,
    spectrum: Spectrum,
    dense_flops: int,
    output_elements: int,
    parts: Spectrum | None = None,
    kept: Mapping[int, int] | None = None,
    blocks: int = 0,
) -> RankCurve:
    """All candidates of a site: its ranks, ranks of its parts, then dense with distortion 0.

    Args:
        parts: the spectrum of the site's parts, if these may have separate factors.
        kept: the FLOPs of each expert that keeps its matrix; None if none does.
        blocks: the number of entries in blocks of the weight that a change of basis can turn into the identity.
    """
    tail = tail_energies(spectrum.energies)
    bias = site.bias is not None or spectrum.mean is not None
    whole = len(kept or ()) * site.out_features * site.in_features

    def candidate(rank: Rank, distortion: float) -> Candidate:
        flops = rank_flops(site, rank, dense_flops, output_elements) + sum(kept.values() if kept else ())
        return Candidate(rank, flops, rank_params(site, rank, bias) + whole, distortion)

    joint = [candidate(rank, tail[rank]) for rank in useful_ranks(site)]
    split = [] if parts is None else [candidate(*choice) for choice in _parts_choices(site, parts, tail)]
    dense = Candidate(None, dense_flops, rank_params(site, None, site.bias is not None), 0.0)
    simpler = with_blocks(dense, blocks, output_elements // site.out_features)
    candidates = (*joint, *split, *simpler, dense)
    return RankCurve(candidates, tail[0], output_elements, spectrum, parts, kept=tuple(kept or ()))


def with_blocks(dense: Candidate, blocks: int, positions: int) -> list[Candidate]:
    """The dense candidate with identity blocks of so many entries in total, if there are any."""
    if not blocks:
        return []
    return [Candidate(None, dense.flops - 2 * blocks * positions, dense.params - blocks, 0.0, blocks=True)]


def timed(candidates: Sequence[Candidate], site: Site, clock: Clock | None) -> list[Candidate]:
    """The candidates with their times, if these are known."""
    if clock is None:
        return list(candidates)
    return [dataclasses.replace(each, latency=clock(site, each.rank)) for each in candidates]


def energy_curve(site: Site, curve: RankCurve) -> EnergyCurve:
    """The share of energy kept by ranks of the whole site, up to full rank; 1 for a site without energy."""
    tail = tail_energies(curve.ranked.energies)
    steps = min(_POINTS - 1, site.full_rank)
    ranks = sorted({max(i, round(site.full_rank * (i / steps) ** 2)) for i in range(steps + 1)})
    return EnergyCurve(tuple(ranks), tuple(round(1.0 - curve.normalised(tail[rank]), 5) for rank in ranks))


def rank_candidate(site: Site, curve: RankCurve, rank: int) -> Candidate:
    """The candidate of any possible rank of a site without experts."""
    flops = rank_flops(site, rank, curve.dense.flops, curve.output_elements)
    params = rank_params(site, rank, site.bias is not None or curve.spectrum.mean is not None)
    return Candidate(rank, flops, params, tail_energies(curve.ranked.energies)[rank])


def largest_part_rank(site: Site) -> int:
    """The largest rank of a part; below D, since at rank D a dense part is cheaper."""
    largest = min(site.out_features // site.parts - (site.pivots is not None), site.in_features - 1)
    return largest // site.step * site.step


def parts_candidate(site: Site, parts: Spectrum, ranks: PartRanks, dense_flops: int, output_elements: int) -> Candidate:
    """The candidate with one rank, or None for dense, for each part of a site."""
    lost = [float(row[rank:].sum()) for row, rank in zip(parts.energies, ranks, strict=True) if rank is not None]
    flops = rank_flops(site, ranks, dense_flops, output_elements)
    return Candidate(ranks, flops, rank_params(site, ranks, site.bias is not None or parts.mean is not None), sum(lost))


def _parts_choices(site: Site, parts: Spectrum, tail: Sequence[float]) -> Iterator[tuple[PartRanks, float]]:
    """Yield ranks of the parts with their distortion, ascending in cost, each better than all that cost no more.

    Any of the parts may stay dense. A component of a pair costs the same in each of the other parts, so the components
    with the largest energies, or steps of several, are the best choice there. Each of these parts keeps at least one.
    """
    step, largest = site.step, largest_part_rank(site)
    if not largest:
        return
    plain = dataclasses.replace(site, bias=None, keeps_weight=False)
    choices: list[tuple[int, float, PartRanks]] = []
    for count in range(1, site.parts + 1):
        for thin in itertools.combinations(range(site.parts), count):
            own = parts.energies[list(thin), step:]
            steps = own[:, : largest - step].reshape(count, largest // step - 1, step).sum(-1)
            order = torch.argsort(steps.flatten(), descending=True, stable=True)
            lost = own.sum() - torch.cat([steps.new_zeros(1), steps.flatten()[order].cumsum(0)])
            counts = [step] * count
            grown = (order // max(steps.shape[1], 1)).tolist()
            for part, value in zip([None, *grown], lost.tolist(), strict=True):
                if part is not None:
                    counts[part] += step
                known = dict(zip(thin, counts, strict=True))
                ranks = tuple(known.get(index) for index in range(site.parts))
                choices.append((rank_params(plain, ranks, False), value, ranks))
    # A dense part sorts as rank 0, so that ties are decided in the same way everywhere.
    choices.sort(key=lambda choice: (*choice[:2], tuple(rank or 0 for rank in choice[2])))
    joint = [(rank_params(plain, rank, False), tail[rank]) for rank in useful_ranks(site)]
    best = math.inf
    for cost, lost_here, ranks in choices:
        if cost >= site.out_features * site.in_features:
            return
        while joint and joint[0][0] <= cost:
            best = min(best, joint.pop(0)[1])
        if lost_here < best:
            best = lost_here
            yield ranks, max(best, 0.0)
