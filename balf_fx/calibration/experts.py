"""Statistics of layers of experts, where every expert has positions of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from balf_fx.calibration.moments import CHUNK_ELEMENTS, Moments, is_finite, sum_moments
from balf_fx.calibration.observers import CovarianceObserver, Recorded, SensitivityObserver
from balf_fx.calibration.sample import Gradients, Sample
from balf_fx.graph.expert_rows import ExpertRows
from balf_fx.graph.site import Side, Site


def expert_moments(
    rows: Sequence[Tensor], dtype: torch.dtype, weights: Sequence[Tensor] | None = None
) -> Moments | None:
    """Moments of the rows of each expert; None if there are no rows. Rows of zeros, which fill up places, do not count.

    Args:
        rows: [n, F] for each expert.
        weights: [n] for each expert; None for 1 each.
    """
    features = rows[0].shape[-1]
    device = rows[0].device
    count = torch.zeros(len(rows), dtype=torch.float64, device=device)
    mean = torch.zeros(len(rows), features, dtype=torch.float64, device=device)
    scatter = torch.zeros(len(rows), features, features, dtype=torch.float64, device=device)
    per_chunk = max(CHUNK_ELEMENTS // features, 4 * features)
    for index, own in enumerate(rows):
        filled = own.ne(0).any(-1)
        chunks = (piece.mT.unsqueeze(0) for piece in torch.split(own[filled], per_chunk) if len(piece))
        seen = sum_moments(chunks, dtype, None if weights is None else weights[index][filled])
        if seen is not None:
            count[index], mean[index], scatter[index] = seen.count, seen.mean[0], seen.scatter[0]
    return Moments(count, mean, scatter) if float(count.sum()) > 0 else None


class ExpertObserver(CovarianceObserver):
    """Gathers the moments of the rows that each expert sees.

    Args:
        site, skip_non_finite, side: as in `CovarianceObserver`.
        rows: where the rows of each expert are.
    """

    def __init__(self, site: Site, rows: ExpertRows, skip_non_finite: bool = False, side: Side | None = None) -> None:
        super().__init__(site, skip_non_finite, side)
        self.rows = rows
        self._assignment: Tensor | None = None

    def forward(self, value: Tensor, assignment: Tensor | None = None) -> None:  # type: ignore[override]
        """Observe a value, given the ids or ends that assign its rows."""
        self._assignment = assignment
        super().forward(value)
        self._assignment = None

    def _moments(self, value: Tensor, dtype: torch.dtype, weights: Tensor | None) -> Moments | None:  # noqa: ARG002
        return expert_moments(self.rows.split(value, self.side, self._assignment), dtype)


class ExpertSensitivityObserver(SensitivityObserver):
    """Gathers the sensitivity of the loss to the output errors of each expert.

    The weight of a row is its squared gradient, which contains the router's weight for it. The first rows of each
    expert and the last ones, usually of other samples, go to different halves.

    Args:
        site, basis, copies: as in `SensitivityObserver`.
        rows: where the rows of each expert are.
    """

    def __init__(self, site: Site, rows: ExpertRows, basis: Tensor | None, copies: bool) -> None:
        super().__init__(site, basis, copies)
        self.rows = rows

    def forward(  # type: ignore[override]
        self, source: Tensor, output: Tensor, assignment: Tensor | None = None
    ) -> None:
        """Record the output, the value on the site's side and the assignment until the gradient is known."""
        if self._recorded is not None and output.requires_grad:
            value = (output if self.site.side == "output" else source).detach()
            self._recorded.append(Recorded(output, value.clone() if self.copies else value, assignment, None))

    @torch.no_grad()
    def take(self, recorded: Recorded, gradient: Tensor) -> None:
        """Add the values of one call and the gradient at its output to the statistics."""
        assignment = recorded.features
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if gradient.numel() == 0 or not is_finite(gradient):
            return
        values = self.rows.split(recorded.value, self.site.side, assignment)
        gradients = self.rows.split(gradient, "output", assignment)
        samples = self.batch_samples or 1
        cuts = [(len(own) + self.batches % 2) // 2 for own in gradients]  # odd rows go to either half in turn
        for half, own in enumerate((_parts(cuts, first=True), _parts(cuts, first=False))):
            own_values, own_gradients = (
                [rows[part] for rows, part in zip(side, own, strict=True)] for side in (values, gradients)
            )
            seen = self._rows(own_values, own_gradients, samples / 2)
            if seen is not None:
                self._merge(half, seen)

    def _rows(self, values: Sequence[Tensor], gradients: Sequence[Tensor], samples: float) -> Sample | None:
        """Statistics of some rows, as a part of so many samples."""
        weights = [own.square().sum(-1) for own in gradients]
        moments = expert_moments(values, gradients[0].dtype, weights)
        if moments is None:
            return None
        inner = gradients if self.basis is None else [g @ q.to(g) for g, q in zip(gradients, self.basis, strict=True)]
        scatter = torch.stack([(own.mT @ own).to(torch.float64) for own in inner])
        return Sample(Gradients(samples, scatter, None), moments, None)


def _parts(cuts: Sequence[int], first: bool) -> list[slice]:
    return [slice(None, cut) if first else slice(cut, None) for cut in cuts]
