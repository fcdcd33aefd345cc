"""The problems solved at a layer: regression for all of it or for its left factor, or its bias alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from balf_fx.calibration.moments import by_sample, output_columns
from balf_fx.graph.curves import Solution, Spectrum
from balf_fx.refit.biases import Residual, best_shift
from balf_fx.refit.lockstep import Batch, Lockstep
from balf_fx.refit.regression import apply, best, rounded
from balf_fx.refit.sums import Joint, JointSums, Shares
from balf_fx.refit.targets import Target
from balf_fx.refit.windows import Visit, Window, visits

Columns = Callable[[Batch, Window], Tensor]
"""A function that reads a window of a batch as [G, D, n] or [G, O, n]."""


@dataclass(frozen=True)
class LinearTarget:
    """The target outputs as a linear map of other values of the original model, y = T z.

    Where z has fewer entries than y, as in the head of a language model, it takes less to sum the products of x' and z
    than those of x' and y, and y is not computed at all.

    Attributes:
        columns: reads z [G, Z, n].
        map: T [G, O, Z + k].
        zeros: k, columns of T for values that are always 0: of maps toward which the ridge shrinks, beside those of z.
    """

    columns: Columns
    map: Tensor
    zeros: int = 0

    @property
    def size(self) -> int:
        """Z."""
        return self.map.shape[-1] - self.zeros

    def joint(self, seen: Joint) -> Joint:
        """The sums of x' and y, given those of x' and z."""
        y, yx = F.pad(seen.y, (0, self.zeros)), F.pad(seen.yx, (0, 0, 0, self.zeros))
        return Joint(seen.inputs, y, yx, self.map)


@dataclass(frozen=True)
class Problem:
    """The regression of a layer's target outputs on values of the compressed model.

    Attributes:
        target: the target outputs.
        importance: [P], the weight of each position of a sample (`refit.windows.visits`).
        columns: reads [G, D, n], the layer's input or a function of it.
        outputs: extracts [G, O, n] from values of the shape of the layer's output.
        toward: [G, O, D], the map toward which the ridge shrinks; with `linear`, M [G, Z + k, D] where that
            map is T M.
        prior: the solution so far, from columns to outputs, one for each part.
        spectra: the metric of each part, None for the plain squared error.
        linear: in place of `outputs`, for a target that is the layer's output as it is.
        taps: the pixels at which each channel of the columns is read; these are alike, so fewer positions are read.
    """

    target: Target
    importance: Tensor | None
    columns: Columns
    outputs: Callable[[Tensor], Tensor]
    toward: Tensor
    prior: Sequence[Solution]
    spectra: Sequence[Spectrum | None]
    linear: LinearTarget | None = None
    taps: int = 1

    def solve(self, walk: Lockstep) -> tuple[Solution, ...]:
        """The solution with the least error on the held-out share; a part without a bias gets none."""
        shares = self._sums(walk)
        fit = best(shares, self.toward, self.prior, self.spectra, group=walk.group)
        if self.target.limits is not None:  # no stronger ridge: it is hardly ever better then
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
        outputs = outputs if self.linear is None else self.linear.size
        shape = (groups if len(self.prior) == 1 else 1, inputs)
        known = (None, None) if first is None else (first.train.inputs, first.held_out.inputs)
        shares = [JointSums(shape, (groups, outputs), self.toward.device, share) for share in known]
        read = (outputs, inputs // self.taps)
        for visit in visits(walk, self.target.node, self.target.site, read, self.importance):
            x = self.columns(visit.batch, visit.window)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            earlier = None if earlier is None else rounded(earlier, x.dtype)  # once; it does nothing in later turns
            y = self._wanted(visit, x, earlier)
            weights = None if visit.weights is None else visit.weights.to(x.dtype)
            shares[visit.share].add(visit.keep(x), visit.keep(y).to(x.dtype), weights)
        for each in shares:
            each.merge(walk.group)
        train, held_out = (each.joint() for each in shares)
        if self.linear is not None:
            train, held_out = self.linear.joint(train), self.linear.joint(held_out)
        return Shares(train, held_out, None if first is None else first.whole.inputs)

    def _wanted(self, visit: Visit, x: Tensor, earlier: Sequence[Solution] | None) -> Tensor:
        """y [G, O, n], or z [G, Z, n]."""
        if self.linear is not None:
            return self.linear.columns(visit.batch, visit.window)
        predicted = None if earlier is None else apply(earlier, x)
        return self.target.outputs(visit.batch, visit.window, self.outputs, predicted)


@dataclass(frozen=True)
class DividedProblem:
    """The second factor and the bias of a divided kernel, changed by a map of its outputs, the layer's value.

    The factor reads each channel at several pixels, so that a regression on what it reads has far more unknowns.

    Attributes:
        target, importance: as in `Problem`.
        prior: the solution so far.
        spectrum: the metric, None for the plain squared error.
    """

    target: Target
    importance: Tensor | None
    prior: Solution
    spectrum: Spectrum | None

    def solve(self, walk: Lockstep) -> Solution:
        """The solution with the least error on the held-out share."""
        left, bias, node, site = self.prior.left, self.prior.bias, self.target.node, self.target.site
        if left is None:
            raise ValueError("a dense layer has no factors")
        same = torch.eye(site.out_features, dtype=left.dtype, device=left.device).unsqueeze(0)
        problem = Problem(
            self.target,
            self.importance,
            columns=lambda batch, own: output_columns(own.of(by_sample(batch.compressed[node], site)), site),
            outputs=partial(output_columns, site=site),
            toward=same,
            prior=(Solution(None, same, None if bias is None else torch.zeros_like(bias)),),
            spectra=(self.spectrum,),
        )
        (found,) = problem.solve(walk)
        if bias is not None and found.bias is not None:
            bias = found.bias + bias @ found.right[0].mT
        new = found.right @ left.reshape(1, site.out_features, -1)
        return dataclasses.replace(self.prior, left=new.reshape(left.shape), bias=bias)


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
