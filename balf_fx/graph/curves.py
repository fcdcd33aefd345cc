"""What each rank of a site keeps and costs. Shapes are those of `graph.site`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

PartRanks = tuple[int | None, ...]


Rank = int | PartRanks | None
"""One rank for all of a site, or one for each of its parts; None is dense."""


Measure = Literal["flops", "params"]


@dataclass(frozen=True)
class Spectrum:
    """What each rank of a site keeps, and the map that keeps it.

    The spectrum of a site's parts has the parts in place of the groups, with O outputs each.

    Attributes:
        energies: [G, m] float64, descending: mean squared output error avoided by each component.
        left: [G, O, m] float64; rank-r factors are A = left[..., :r] and B = right[..., :r, :] W.
        mean: [G, O] float64, the mean of W x over positions, for the bias correction; None where not centred.
        right: [G, m, O] float64, a left inverse of `left`; None for its transpose, where columns are orthonormal.
    """

    energies: torch.Tensor
    left: torch.Tensor
    mean: torch.Tensor | None
    right: torch.Tensor | None = None

    def maps(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """L [G, O, r] and R [G, r, O] with W' = L R W."""
        left = self.left[..., :rank]
        return left, left.mT if self.right is None else self.right[..., :rank, :]

    def only(self, group: int) -> Spectrum:
        """The spectrum of one group, or part."""
        own = slice(group, group + 1)
        mean, right = (None if value is None else value[own] for value in (self.mean, self.right))
        return Spectrum(self.energies[own], self.left[own], mean, right)


@dataclass(frozen=True)
class Candidate:
    """One choice for a site; `distortion` is mean squared output error."""

    rank: Rank
    flops: int
    params: int
    distortion: float

    def cost(self, measure: Measure) -> int:
        return self.flops if measure == "flops" else self.params


@dataclass(frozen=True)
class RankCurve:
    """Distortion and cost of a site as a function of rank.

    Attributes:
        candidates: ranks 1 .. break-even ascending, then ranks of the parts that beat them, ascending, then dense.
        energy: mean squared output of the site (centred or not, as asked), which normalises its distortions.
        output_elements: of all uses of the site together, on which FLOPs depend.
        spectrum: what the factors are made of.
        loss: what the loss rises by, to second order, where the site's output is replaced by its mean; None where no
            gradient is known.
        parts: the spectrum of the site's parts, where these may have factors of their own.
    """

    candidates: tuple[Candidate, ...]
    energy: float
    output_elements: int
    spectrum: Spectrum
    parts: Spectrum | None = None
    loss: float | None = None

    @property
    def dense(self) -> Candidate:
        return self.candidates[-1]

    def normalised(self, distortion: float) -> float:
        """`distortion` as a share of the site's energy; a site of no energy has nothing to lose."""
        return distortion / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True)
class Solution:
    """What a site, or a part of it, computes in the compressed model: left right x + bias.

    Attributes:
        left: [G, O, r], None where it stays dense.
        right: [G, r, D], or [G, O, D] of a dense layer.
        bias: [G, O] or None.
    """

    left: torch.Tensor | None
    right: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class EnergyCurve:
    """The share of a site's energy that ranks keep, at a few of them, for pictures.

    Attributes:
        ranks: ascending, from 0 to the full rank min(O, D); closer to each other where they are small.
        kept: for each of them, in [0, 1], to five digits.
    """

    ranks: tuple[int, ...]
    kept: tuple[float, ...]
