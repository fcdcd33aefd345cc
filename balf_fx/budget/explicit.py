"""The candidates for ranks that the user has chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from balf_fx.errors import OptionError, UnknownSiteError
from balf_fx.graph.curves import Candidate, PartRanks, Rank, RankCurve
from balf_fx.graph.site import Site
from balf_fx.ranks.costs import largest_part_rank, parts_candidate, possible_ranks, rank_candidate


def explicit_candidates(curves: Mapping[Site, RankCurve], ranks: Mapping[str, Rank]) -> list[Candidate]:
    """The candidate of each site for the ranks that the user gives; dense for sites that are not named.

    Raises:
        UnknownSiteError: a name is not that of a site.
        OptionError: a rank is impossible for its site; the message lists those that are possible.
    """
    names = [site.name for site in curves]
    unknown = sorted(set(ranks) - set(names))
    if unknown:
        raise UnknownSiteError(f"there is no site named {', '.join(unknown)}; the sites are: {', '.join(names)}")
    return [_explicit_candidate(site, curve, ranks.get(site.name)) for site, curve in curves.items()]


def _explicit_candidate(site: Site, curve: RankCurve, rank: Rank) -> Candidate:
    if rank is None:
        return curve.dense
    if isinstance(rank, tuple):
        return _explicit_parts(site, curve, rank)
    possible = possible_ranks(site)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank not in possible:
        allowed = _ranges(possible, site.step) + _in_steps(site)
        raise OptionError(
            f"the rank of {site.name!r} must be a whole number from {allowed}, or None for dense, which costs no more "
            f"than other ranks; not {rank!r}"
        )
    known = {each.rank: each for each in curve.candidates}
    return known[rank] if rank in known else rank_candidate(site, curve, rank)


def _in_steps(site: Site) -> str:
    return f" in steps of {site.step}" if site.step > 1 else ""


def _ranges(numbers: Sequence[int], step: int) -> str:
    """Ascending numbers as "1 to 8 or 12 to 15"."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - step]
    ends = [n for i, n in enumerate(numbers) if i + 1 == len(numbers) or numbers[i + 1] != n + step]
    return " or ".join(f"{start} to {end}" for start, end in zip(starts, ends, strict=True)) or "nothing"


def _explicit_parts(site: Site, curve: RankCurve, ranks: PartRanks) -> Candidate:
    if curve.parts is None:
        raise OptionError(f"{site.name!r} has no parts with ranks of their own: pass one whole number or None")
    limit = largest_part_rank(site)
    numbers = [rank for rank in ranks if rank is not None]
    whole = all(isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= limit for rank in numbers)
    whole = whole and all(rank % site.step == 0 for rank in numbers)
    if not whole or not numbers or len(ranks) != site.parts:
        raise OptionError(
            f"the ranks of the parts of {site.name!r} must be {site.parts} whole numbers from {site.step} to "
            f"{limit}{_in_steps(site)}, some of "
            f"which may be None for dense, not {ranks!r}"
        )
    return parts_candidate(site, curve.parts, ranks, curve.dense.flops, curve.output_elements)
