"""One factor for all logits of a compressed model (temperature scaling: Guo et al. 2017, arXiv 1706.04599).

Errors of the layers change how far the logits are apart. A factor corrects that: it moves the probabilities closer to
the original's, and leaves the order of the classes as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from balf_fx.calibration.moments import CHUNK_ELEMENTS
from balf_fx.calibration.outputs import logit_rows
from balf_fx.calibration.weights import Weights

FACTORS = tuple(2.0 ** (step / 4) for step in range(-8, 5))
"""The factors that are compared, from 1/4 to 2; 1 is among them."""


def row_divergences(
    reference: Any, output: Any, batch: Any, weights: Weights | None = None
) -> tuple[Tensor, Tensor] | None:
    """The Kullback-Leibler divergence of each row of logits for each of the factors.

    Args:
        reference, output: the outputs of the original and of the compressed model for a batch.
        weights: how much each row counts; None if all count alike.

    Returns:
        [n, F] and the weights [n] of the n rows that count, float64 on the CPU; None if there are no logits.
    """
    rows_and_weights = logit_rows(reference, output, batch, weights)
    if rows_and_weights is None:
        return None
    wanted, logits, own = rows_and_weights
    size = max(CHUNK_ELEMENTS // wanted.shape[-1], 1)
    found = [_divergences(*pair) for pair in zip(torch.split(wanted, size), torch.split(logits, size), strict=True)]
    rows = torch.cat(found).to("cpu", torch.float64)
    return rows, torch.ones_like(rows[:, 0]) if own is None else own.to(rows)


def _divergences(wanted: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(y) | softmax(f y')) = sum p log p - f sum p y' + log sum exp(f y') for each factor f, [n, F]."""
    target, given = wanted.float().log_softmax(-1), logits.float()
    given = given - given.amax(-1, keepdim=True)
    shares = target.exp()
    products = (shares * logits for logits in (target, given))
    known, mean = (each.where(shares > 0, 0).sum(-1) for each in products)  # classes may be excluded by -inf
    return torch.stack([known - factor * mean + (given * factor).logsumexp(-1) for factor in FACTORS], -1)


def closest_to_one(rows: Tensor, weights: Tensor) -> float:
    """The factor closest to 1 whose mean divergence is within one standard error of the least.

    With few rows, a factor is fitted to a few confident mistakes; the one-standard-error rule (Breiman et al. 1984,
    "Classification and Regression Trees", section 3.4.3) avoids this. The error is that of the difference.

    Args:
        rows: [n, F], `row_divergences` of all rows.
        weights: [n], how much each counts.
    """
    share = weights / weights.sum()
    means = share @ rows
    if not bool(means.isfinite().all()):
        return 1.0
    least = int(means.argmin())
    difference = rows - rows[:, least : least + 1]
    mean = share @ difference
    error = (share.square() @ (difference - mean).square()).sqrt()
    within: list[float] = [factor for factor, fits in zip(FACTORS, (mean <= error).tolist(), strict=True) if fits]
    return min(within, key=lambda factor: abs(math.log(factor)))
