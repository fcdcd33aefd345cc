"""What a site costs as a function of its rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from balf_fx.graph.curves import Candidate, EnergyCurve, PartRanks, Rank, RankCurve, Spectrum
from balf_fx.graph.site import Site
from balf_fx.ranks.spectra import tail_energies

_POINTS = 64  # of an energy curve: more than a picture shows, few enough to be kept with the model


def rank_params(site: Site, rank: Rank, bias: bool) -> int:
    """Parameters of a site at a rank; with `bias` a site that has none gains one for what is not dense."""
    outputs, inputs = site.out_features, site.in_features
    total, parts, dense = _spread(rank)
    weights = total * (outputs // parts + inputs) + dense * (outputs // parts * inputs)
    if site.keeps_weight and rank is not None:
        weights += outputs * inputs
    biased = outputs if site.bias is not None else outputs // parts * (parts - dense) * bias
    return site.groups * (weights + biased)


def rank_flops(site: Site, rank: Rank, dense_flops: int, output_elements: int) -> int:
    """FLOPs of a site at a rank.

    The first factor is the layer itself with r outputs per group in place of O; the second takes r multiply-adds for
    each element of the output, or of that part of the output to which the rank belongs.

    Args:
        dense_flops, output_elements: of all uses of the site together.
    """
    if dense_flops == 0:
        return 0
    total, parts, dense = _spread(rank)
    return (
        dense_flops // site.out_features * total + 2 * total * output_elements // parts + dense_flops // parts * dense
    )


def _spread(rank: Rank) -> tuple[int, int, int]:
    """The outputs of the first factor per group, how many parts there are, and how many of them stay dense."""
    ranks = rank if isinstance(rank, tuple) else (rank,)
    return sum(r or 0 for r in ranks), len(ranks), ranks.count(None)


def rank_curve(
    site: Site, spectrum: Spectrum, dense_flops: int, output_elements: int, parts: Spectrum | None = None
) -> RankCurve:
    """Every choice there is for a site: ranks 1 .. break-even, ranks of its parts, then dense at distortion 0.

    Args:
        parts: the spectrum of the site's parts, if these may have factors of their own.
    """
    tail = tail_energies(spectrum)
    bias = site.bias is not None or spectrum.mean is not None

    def candidate(rank: Rank, distortion: float) -> Candidate:
        flops = rank_flops(site, rank, dense_flops, output_elements)
        return Candidate(rank, flops, rank_params(site, rank, bias), distortion)

    # Break-even is below min(O, D): the tail reaches that far.
    joint = [candidate(rank, tail[rank]) for rank in range(1, site.break_even + 1)]
    split = [] if parts is None else [candidate(*choice) for choice in _parts_choices(site, parts, tail)]
    dense = Candidate(None, dense_flops, rank_params(site, None, site.bias is not None), 0.0)
    return RankCurve((*joint, *split, dense), tail[0], output_elements, spectrum, parts)


def energy_curve(site: Site, curve: RankCurve) -> EnergyCurve:
    """What ranks of the site as a whole keep, up to the full rank; a site of no energy keeps all of it."""
    tail = tail_energies(curve.spectrum)
    steps = min(_POINTS - 1, site.full_rank)
    ranks = sorted({max(i, round(site.full_rank * (i / steps) ** 2)) for i in range(steps + 1)})
    return EnergyCurve(tuple(ranks), tuple(round(1.0 - curve.normalised(tail[rank]), 5) for rank in ranks))


def largest_part_rank(site: Site) -> int:
    """The largest rank of a part: at its D inputs the part had better stay dense."""
    return min(site.out_features // site.parts, site.in_features - 1)


def parts_candidate(site: Site, parts: Spectrum, ranks: PartRanks, dense_flops: int, output_elements: int) -> Candidate:
    """The choice of one rank, or None for dense, for each part of a site."""
    lost = [float(row[rank:].sum()) for row, rank in zip(parts.energies, ranks, strict=True) if rank is not None]
    flops = rank_flops(site, ranks, dense_flops, output_elements)
    return Candidate(ranks, flops, rank_params(site, ranks, site.bias is not None or parts.mean is not None), sum(lost))


def _parts_choices(site: Site, parts: Spectrum, tail: Sequence[float]) -> Iterator[tuple[PartRanks, float]]:
    """Ranks of the parts, ascending in cost, that lose less than whatever costs no more, with what they lose.

    Any of the parts may stay dense. A component costs the same in each of the others, so that there the largest
    energies are the best choice; each keeps one component at least.
    """
    outputs, inputs, largest = site.out_features // site.parts, site.in_features, largest_part_rank(site)
    price = outputs + inputs
    choices: list[tuple[int, float, tuple[int, ...], Tensor]] = []
    for count in range(1, site.parts + 1):
        for thin in itertools.combinations(range(site.parts), count):
            rest = parts.energies[list(thin), 1:largest]
            order = torch.argsort(rest.flatten(), descending=True, stable=True)
            lost = parts.energies[list(thin), 1:].sum() - torch.cat(
                [rest.new_zeros(1), rest.flatten()[order].cumsum(0)]
            )
            fixed = (site.parts - count) * outputs * inputs + count * price
            choices += [(fixed + i * price, value, thin, order[:i]) for i, value in enumerate(lost.tolist())]
    choices.sort(key=lambda choice: choice[:3])
    best = math.inf
    for cost, lost_here, thin, chosen in choices:
        rank = cost // (site.out_features + inputs)
        if cost >= site.out_features * inputs:
            return
        if lost_here < min(best, tail[min(rank, len(tail) - 1)]):
            best = lost_here
            counts = torch.bincount(chosen // max(largest - 1, 1), minlength=len(thin)) + 1
            ranks = dict(zip(thin, counts.tolist(), strict=True))
            yield tuple(ranks.get(part) for part in range(site.parts)), max(best, 0.0)
