"""What observers gather of gradients: immutable values that merge, over batches and over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from balf_fx.calibration.moments import Moments


@dataclass(frozen=True)
class Gradients:
    """Second moments of the gradient g at a site's output, summed over the positions and samples that count.

    Attributes:
        samples: the number of samples that count.
        scatter: [G, m, m], the sum of h h^T, where h = g on the output side and h = Q^T g, W = Q R, on the input side;
            m = min(O, D).
        parts: [parts, O / parts, O / parts], the same for the parts of g, for sites that have parts.
    """

    samples: float
    scatter: Tensor
    parts: Tensor | None

    @property
    def unit(self) -> Tensor:
        """[G, 1], the mean eigenvalue of the scatter of each group."""
        return self.scatter.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)

    def loss(self, energies: Tensor, shared: bool) -> float:
        """The loss of a sample, to second order, if the site's output is replaced by its mean.

        Args:
            energies: [G, m], for gradients that are scaled to a mean square of 1 over all groups.
            shared: whether energies are means over the positions of all groups (`ranks.spectra.shared_energies`).
        """
        unit = self.unit.sum() if shared else self.unit.mean()
        return 0.5 * float(unit * energies.sum()) / self.samples

    def merge(self, other: Gradients) -> Gradients:
        """Both samples together."""
        parts = None if self.parts is None or other.parts is None else self.parts + other.parts
        return Gradients(self.samples + other.samples, self.scatter + other.scatter, parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gradients:
        return self


@dataclass(frozen=True)
class Sample:
    """The statistics of a site over some of the samples.

    Attributes:
        gradients: the gradients at the output.
        moments: the moments on the site's side, with positions weighted by their squared gradients, times the weights
            of the call's positions (`calibration.weights`).
        features: the moments of the input's features, for a convolution those of pixels, not of patches; None if they
            are not needed.
        parts: the moments with the weights of each part's own gradients, as groups; None where the site has no parts,
            or its moments are those of outputs.
    """

    gradients: Gradients
    moments: Moments
    features: Moments | None
    parts: Moments | None = None

    def merge(self, other: Sample) -> Sample:
        """Statistics of both samples together."""
        features = self.features if other.features is None else other.features
        if self.features is not None and other.features is not None:
            features = self.features.merge(other.features)
        parts = None if self.parts is None or other.parts is None else self.parts.merge(other.parts)
        return Sample(self.gradients.merge(other.gradients), self.moments.merge(other.moments), features, parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sample:
        return self


@dataclass(frozen=True)
class Positions:
    """Squared gradients at each position of a sample, summed over samples.

    Attributes:
        sums: the sums [P], and the numbers of samples for which each position counts, [P]; None where samples differ
            in their positions.
    """

    sums: tuple[Tensor, Tensor] | None

    @property
    def mean(self) -> Tensor | None:
        """[P], averaged over samples."""
        return None if self.sums is None else self.sums[0] / self.sums[1].clamp_min(1)

    def merge(self, other: Positions) -> Positions:
        """Both samples together."""
        if self.sums is None or other.sums is None or len(self.sums[0]) != len(other.sums[0]):
            return Positions(None)
        return Positions((self.sums[0] + other.sums[0], self.sums[1] + other.sums[1]))

    def __deepcopy__(self, memo: dict[int, Any]) -> Positions:
        return self


class Mergeable(Protocol):
    """Statistics of some samples."""

    def merge(self, other: Any) -> Any:
        """Statistics of both samples together."""


Statistics = tuple[Mergeable | None, ...]
"""All statistics of an observer, None for those that no value has reached."""


@dataclass(frozen=True)
class WeightGradients:
    """The gradient of the loss at a site's weight, summed over batches.

    Attributes:
        absolute, squares: [G, O, D] float32, the sums of |dL/dW| and of (dL/dW)^2.
    """

    absolute: Tensor
    squares: Tensor

    def merge(self, other: WeightGradients) -> WeightGradients:
        """Both samples together."""
        return WeightGradients(self.absolute + other.absolute, self.squares + other.squares)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightGradients:
        return self
