"""The problems solved at a layer: regression for all of it or for its left factor, or its bias alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from balf_fx.graph.curves import Solution, Spectrum
from balf_fx.refit.biases import Residual, best_shift
from balf_fx.refit.lockstep import Batch, Lockstep
from balf_fx.refit.regression import JointSums, Shares, apply, best
from balf_fx.refit.targets import Target
from balf_fx.refit.windows import Visit, Window, visits

Columns = Callable[[Batch, Window], Tensor]
"""A function that reads a window of a batch as [G, D, n] or [G, O, n]."""


@dataclass(frozen=True)
class Problem:
    """The regression of a layer's target outputs on values of the compressed model.

    Attributes:
        target: the target outputs.
        importance: [P], the weight of each position of a sample (`refit.windows.visits`).
        columns: reads [G, D, n], the layer's input or a function of it.
        outputs: extracts [G, O, n] from values of the shape of the layer's output.
        toward: [G, O, D], the map toward which the ridge shrinks.
        prior: the solution so far, from columns to outputs, one for each part.
        spectra: the metric of each part, None for the plain squared error.
    """

    target: Target
    importance: Tensor | None
    columns: Columns
    outputs: Callable[[Tensor], Tensor]
    toward: Tensor
    prior: Sequence[Solution]
    spectra: Sequence[Spectrum | None]

    def solve(self, walk: Lockstep) -> tuple[Solution, ...]:
        """The solution with the least error on the held-out share; a part without a bias gets none."""
        shares = self._sums(walk)
        fit = best(shares, self.toward, self.prior, self.spectra, group=walk.group)
        if self.target.limits is not None:
            shares = self._sums(walk, fit.solution, shares)
            fit = best(shares, self.toward, self.prior, self.spectra, fit.strength, walk.group)
        return fit.solution

    def _sums(self, walk: Lockstep, earlier: Sequence[Solution] | None = None, first: Shares | None = None) -> Shares:
        """The sums over the training share and over the held-out share of all batches, in all processes.

        Args:
            earlier: a first solution, which decides what errors count beyond the limits of the target; or None.
            first: the sums that led to it, with the same columns.
        """
        groups, outputs, inputs = self.toward.shape
        shape = (groups if len(self.prior) == 1 else 1, inputs)
        known = (None, None) if first is None else (first.train.inputs, first.held_out.inputs)
        shares = [JointSums(shape, (groups, outputs), self.toward.device, share) for share in known]
        for visit in visits(walk, self.target.node, self.target.site, (outputs, inputs), self.importance):
            x = self.columns(visit.batch, visit.window)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            predicted = None if earlier is None else apply(earlier, x)
            y = self.target.outputs(visit.batch, visit.window, self.outputs, predicted)
            weights = None if visit.weights is None else visit.weights.to(x.dtype)
            shares[visit.share].add(visit.keep(x), visit.keep(y).to(x.dtype), weights)
        for each in shares:
            each.merge(walk.group)
        return Shares(shares[0].joint(), shares[1].joint(), None if first is None else first.whole.inputs)


@dataclass(frozen=True)
class BiasProblem:
    """The bias of a layer, or of a part, whose weight does not change.

    Attributes:
        target, importance, outputs: as in `Problem`.
        present: reads [G, O, n], its outputs with the present bias.
        bias: [G, O], the present bias.
        spectrum: the metric, None for the plain squared error.
    """

    target: Target
    importance: Tensor | None
    outputs: Callable[[Tensor], Tensor]
    present: Columns
    bias: Tensor
    spectrum: Spectrum | None

    def solve(self, walk: Lockstep) -> Tensor:
        """The bias with the least error, or the present one if that has no larger error on the held-out share."""
        shift = best_shift(*self._residuals(walk, None), self.spectrum)
        if self.target.limits is not None:
            shift = best_shift(*self._residuals(walk, shift), self.spectrum)
        return self.bias + shift

    def _residuals(self, walk: Lockstep, earlier: Tensor | None) -> tuple[Residual, Residual]:
        """The residuals of the training and of the held-out share; `earlier` is a first shift of the bias [G, O].

        They are those of all processes.
        """
        nothing = Residual(0.0, torch.zeros_like(self.bias))
        shares = [nothing, nothing]
        for visit in visits(walk, self.target.node, self.target.site, (self.bias.shape[-1], 0), self.importance):
            shares[visit.share] += Residual.of(visit.keep(self._residual(visit, earlier)), visit.weights)
        train, held_out = (walk.group.merged(share, Residual.__add__) for share in shares)
        return train, held_out

    def _residual(self, visit: Visit, earlier: Tensor | None) -> Tensor:
        present = self.present(visit.batch, visit.window)
        present = present.to(torch.promote_types(present.dtype, torch.float32))
        predicted = None if earlier is None else present + earlier.to(present.dtype).unsqueeze(-1)
        return self.target.outputs(visit.batch, visit.window, self.outputs, predicted) - present
