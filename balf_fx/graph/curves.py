"""The error and the cost of each rank of a site. Shapes are those of `graph.site`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch

PartRanks = tuple[int | None, ...]


Rank = int | PartRanks | None
"""One rank for the whole site, or one for each of its parts; None means dense."""


def each_rank(rank: Rank) -> PartRanks:
    """The rank of each part, or of the whole site as its only part."""
    return rank if isinstance(rank, tuple) else (rank,)


Measure = Literal["flops", "params", "latency"]
"""What a budget limits; a latency in nanoseconds."""


@dataclass(frozen=True)
class Cost:
    """A cost in each measure."""

    flops: int = 0
    params: int = 0
    latency: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.params + other.params, self.latency + other.latency)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.flops - other.flops, self.params - other.params, self.latency - other.latency)

    def repeated(self, calls: int) -> Cost:
        """The cost of several calls; parameters are stored once."""
        return Cost(calls * self.flops, self.params, calls * self.latency)

    def of(self, measure: Measure) -> int:
        """The cost in one measure."""
        return int(getattr(self, measure))


FREE = Cost()
"""No cost."""


Clock = Callable[[Any, Rank], int]
"""The nanoseconds of a site of a given size at a rank, over all of its uses in one call of the model."""


@dataclass(frozen=True)
class Spectrum:
    """The energy that each rank of a site keeps, and the maps of its factors.

    In the spectrum of a site's parts, the parts replace the groups, with O outputs each.

    Attributes:
        energies: [G, m] float64, descending: the mean squared output error that each component avoids.
        left: L [G, O, m] float64; rank-r factors are A = left[..., :r] and B = right[..., :r, :] W.
        mean: [G, O] float64, the mean of W x over positions, for the correction of the bias; None if not centred.
        right: R [G, m, O] float64, a left inverse of `left`; None for its transpose, if its columns are orthonormal.
        fitted: [G, m] float64, the energies on the samples that chose the components, where `energies` are those on
            other samples; None where they are the same.
    """

    energies: torch.Tensor
    left: torch.Tensor
    mean: torch.Tensor | None
    right: torch.Tensor | None = None
    fitted: torch.Tensor | None = None

    def rescaled(self, scale: Callable[[torch.Tensor], torch.Tensor]) -> Spectrum:
        """The spectrum with all energies [G, m] in another unit."""
        fitted = None if self.fitted is None else scale(self.fitted)
        return dataclasses.replace(self, energies=scale(self.energies), fitted=fitted)

    def maps(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """L [G, O, r] and R [G, r, O] with W' = L R W."""
        left = self.left[..., :rank]
        return left, left.mT if self.right is None else self.right[..., :rank, :]

    def only(self, group: int) -> Spectrum:
        """The spectrum of one group, or part."""
        own = slice(group, group + 1)
        others = (None if value is None else value[own] for value in (self.mean, self.right, self.fitted))
        return Spectrum(self.energies[own], self.left[own], *others)


@dataclass(frozen=True)
class Candidate:
    """One choice for a site.

    Attributes:
        distortion: its mean squared output error.
        blocks: whether a dense site's heads get a basis in which a block of each is the identity (`ranks.bases`).
        latency: nanoseconds; 0 where times have not been measured (`passes.Time`).
    """

    rank: Rank
    flops: int
    params: int
    distortion: float
    blocks: bool = False
    latency: int = 0

    @cached_property
    def total(self) -> Cost:
        """Its cost in each measure."""
        return Cost(self.flops, self.params, self.latency)

    def cost(self, measure: Measure) -> int:
        return int(getattr(self, measure))


_FITS = 0.25


def fits(lost: float, optimism: float) -> bool:
    """Whether a choice fits its samples: a quarter more is lost on others. With many samples, nothing does.

    Args:
        lost: what is lost on other samples.
        optimism: how much more that is.
    """
    return optimism > _FITS * (lost - optimism)


@dataclass(frozen=True)
class RankCurve:
    """Distortion and cost of a site as a function of rank.

    Attributes:
        candidates: the ranks ascending, then better ranks of the parts, ascending in cost, then dense with identity
            blocks if there can be some, then dense.
        energy: the mean squared output of the site, centred or not, by which its distortions are normalised.
        output_elements: the number of output elements of all uses of the site, on which FLOPs depend.
        spectrum: the spectrum from which the factors are computed.
        loss: the increase of a sample's loss, to second order, when the site's output is replaced by its mean; None if
            there are no gradients.
        parts: the spectrum of the site's parts, if these may have separate factors.
        kept: the experts that keep their matrices, since they have seen too few positions.
        strips: where the kernel is divided, the spectrum for strips of pixels, whose maps are those of inputs
            (`ranks.divided.strips_spectrum`); its energies are in the unit of `spectrum`.
        clock: the time of the site; None where times have not been measured.
        half: the curve by the first half of the samples; None if the ranks do not fit the samples (`fits_samples`).
    """

    candidates: tuple[Candidate, ...]
    energy: float
    output_elements: int
    spectrum: Spectrum
    parts: Spectrum | None = None
    loss: float | None = None
    kept: tuple[int, ...] = ()
    strips: Spectrum | None = None
    clock: Clock | None = None
    half: RankCurve | None = None

    @property
    def dense(self) -> Candidate:
        return self.candidates[-1]

    @cached_property
    def whole(self) -> dict[int, Candidate]:
        """The candidates of one rank for the whole site, by it, ascending."""
        return {each.rank: each for each in self.candidates if isinstance(each.rank, int)}

    @property
    def ranked(self) -> Spectrum:
        """The spectrum whose components the ranks count."""
        return self.spectrum if self.strips is None else self.strips

    def least_at_half(self, measure: Measure) -> float:
        """The least distortion at half of the dense site's cost."""
        half = self.dense.cost(measure) / 2
        return min((each.distortion for each in self.candidates if each.cost(measure) <= half), default=math.inf)

    def normalised(self, distortion: float) -> float:
        """`distortion` as a share of the site's energy; 0 for a site without energy."""
        return distortion / self.energy if self.energy > 0 else 0.0

    @property
    def fits_samples(self) -> bool:
        """Whether half of the dense site's cost loses much more on other samples than on those that chose the ranks."""
        cheap = [each for each in self.whole.values() if 2 * each.flops <= self.dense.flops]
        return bool(cheap) and fits(self.normalised(cheap[-1].distortion), self.optimism(cheap[-1].rank))

    def optimism(self, rank: Rank) -> float:
        """How much more a rank loses on other samples than on those that chose it, normalised; at least 0."""
        spectrum = self.parts if isinstance(rank, tuple) else self.spectrum
        if rank is None or self.strips is not None or spectrum is None or spectrum.fitted is None:
            return 0.0
        unseen = spectrum.energies - spectrum.fitted
        rows = zip([unseen.sum(0)] if isinstance(rank, int) else unseen, each_rank(rank), strict=True)
        lost = sum(float(row[own:].sum()) for row, own in rows if own is not None)
        return max(self.normalised(lost), 0.0)


@dataclass(frozen=True)
class Kept:
    """The matrices of experts that keep them, W [K, O, D]."""

    experts: tuple[int, ...]
    weight: torch.Tensor


Divided = Literal["separable", "pointwise_first"]
"""How a kernel is divided between two convolutions other than k x k, 1 x 1: k x 1, 1 x k, or 1 x 1, k x k."""

DIVIDED: tuple[str, ...] = get_args(Divided)

Form = Literal["pair", "rows", "columns", "blocks", Divided]
"""How a low-rank map is written: as two factors, or with some of its own rows or columns (`ranks.pivots`). Or that of a
dense map with identity blocks (`ranks.bases`), or that of a convolution with a divided kernel (`ranks.divided`)."""


@dataclass(frozen=True)
class Solution:
    """The weights of a site, or of a part of it, in the compressed model.

    It computes, for an input x,

    * "pair": left right x + bias, with left [G, O, r] and right [G, r, D], or right x + bias for a dense layer;
    * "rows": the outputs P, p = right x + bias_P, then the others, left p + bias_rest, with left [G, O - r, r] and
      right [G, r, D];
    * "columns": left (x_P + right x_rest) + bias, with left [1, O, r] and right [1, r, D - r];
    * "blocks": right x + bias, where the columns P of right [1, O, D] are the identity in each head of some rows;
    * "separable" and "pointwise_first": two convolutions, with left [1, O w, r] and right [1, r, C h], for kernels of
      h w pixels, of which right reads h (`ranks.divided`).

    Attributes:
        left: None for a dense layer.
        bias: [G, O] or None; for rows, in the order [P, rest].
        kept: the experts that keep their matrices; their factors are zero.
        order: for rows, [G, O], the rows as [P, rest]; for columns and blocks, [1, D], the columns in the same way.
            None if the graph already has the features in this order.
        taps: where the kernel is divided, the pixels that right and left read, h and w.
        blocks: for blocks, the rows [heads, r] of each set of heads, whose first r columns in `order` are the identity.
    """

    left: torch.Tensor | None
    right: torch.Tensor
    bias: torch.Tensor | None
    kept: Kept | None = None
    form: Form = "pair"
    order: torch.Tensor | None = None
    blocks: tuple[torch.Tensor, ...] = ()
    taps: tuple[int, int] = (1, 1)

    @property
    def divided(self) -> bool:
        """Whether it is that of a convolution with a divided kernel."""
        return self.form in DIVIDED


@dataclass(frozen=True)
class EnergyCurve:
    """The share of a site's energy that a few of its ranks keep, for plots.

    Attributes:
        ranks: ascending, from 0 to the full rank min(O, D), with smaller steps between small ranks.
        kept: the share for each of them, in [0, 1], to five digits.
    """

    ranks: tuple[int, ...]
    kept: tuple[float, ...]
