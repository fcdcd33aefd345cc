"""A model's outputs, and the distance of a compressed model's from the original's, without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from balf_fx.calibration.batches import Calibration, Forward, Loss, run_batch, samples_of
from balf_fx.calibration.describing import describe
from balf_fx.calibration.moments import CHUNK_ELEMENTS
from balf_fx.calibration.weights import Weights, counted
from balf_fx.errors import CalibrationError


def find_logits(output: Any, batch: Any) -> Tensor | None:
    """The logits of a classifier or language model among a model's outputs, or None.

    These are the output named `logits`, [samples, classes] or [samples, length, classes], or, without one, the only
    tensor if its shape is [samples, classes], or [samples, length, classes] for integer inputs [samples, length]. There
    are at least two classes.
    """
    named = _named_logits(output)
    if named is not None:
        return named if named.dim() in (2, 3) and named.shape[-1] > 1 else None
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2 or output.shape[-1] < 2:
        return None
    return output if output.dim() == 2 or (output.dim() == 3 and _has_tokens(batch, output)) else None


def find_token_logits(output: Any, batch: Any, vocabulary: int) -> Tensor | None:
    """The logits of a language model, [samples, length, classes], among a model's outputs, or None.

    These are logits for integer inputs [samples, length] that are named so, or one for each word. Others of their
    shape may be the features of an encoder, and those of samples may be numbers that a model predicts.

    Args:
        vocabulary: the number of words.
    """
    logits = find_logits(output, batch)
    if logits is None or logits.dim() != 3 or not _has_tokens(batch, logits):
        return None
    return logits if _named_logits(output) is not None or logits.shape[-1] == vocabulary else None


def _has_tokens(batch: Any, output: Tensor) -> bool:
    """Whether a batch has an integer for each position of an output [samples, length, ...]."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and not leaf.is_floating_point()]
    return any(leaf.shape == output.shape[:2] for leaf in leaves)


def find_pixels(output: Any) -> Tensor | None:
    """The logits of at least two classes for pixels, [samples, classes, height, width], or None.

    These are the output named `logits` or, without one, the only tensor.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    named = _named_logits(output)
    found = leaves[0] if named is None and len(leaves) == 1 else named
    return found if found is not None and found.dim() == 4 and found.shape[1] > 1 else None


def _named_logits(output: Any) -> Tensor | None:
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return named if isinstance(named, Tensor) and named.is_floating_point() else None


def outputs_of(model: nn.Module, batches: Sequence[Any], forward: Forward) -> list[Any]:
    """The model's output for each batch."""
    return [run_batch(model, batch, forward, index) for index, batch in enumerate(batches)]


def element_weights(leaves: Sequence[Tensor], weights: Weights | None) -> list[Tensor | None]:
    """The weights of the elements of each output that is not logits, flattened; None for 1 each.

    An output of two dimensions is [N, features] beside others, even if there are as many features as positions.
    """
    if weights is None:
        return [None] * len(leaves)
    alone = all(leaf.dim() <= 2 for leaf in leaves)
    return [weights.of(leaf) if leaf.dim() != 2 or alone else _row_weights(leaf, weights) for leaf in leaves]


def _row_weights(leaf: Tensor, weights: Weights) -> Tensor | None:
    rows = weights.of(leaf, rows=True)
    return None if rows is None else rows.repeat_interleave(leaf.shape[-1])


def loss_given(loss: Loss, output: Any, batch: Any) -> Tensor:
    """The user's loss of an output.

    Raises:
        CalibrationError: it is not a scalar.
    """
    scalar: Any = loss(output, batch)
    if not isinstance(scalar, Tensor) or scalar.numel() != 1 or scalar.is_complex():
        raise CalibrationError(f"loss(output, batch) must return a scalar tensor, not {describe(scalar)}")
    return scalar


def divergence(
    model: nn.Module,
    calibration: Calibration,
    references: Sequence[Any],
    weigh: Callable[[int], Weights | None] = lambda _: None,
) -> float:
    """The mean loss of a model's outputs over batches; infinite if it is NaN.

    The loss is the user's, if given, which is a mean over samples. Otherwise it is the Kullback-Leibler divergence for
    logits, in nats per row of all batches, and the squared error relative to the mean square for other outputs. Padding
    does not count in either. The mean is over the batches of all processes.

    Args:
        calibration: the batches.
        references: the original model's outputs, one for each batch.
        weigh: the weights of the outputs for the batch of an index.
    """

    def measured(index: int, batch: Any, reference: Any) -> tuple[float, float]:
        output = run_batch(model, batch, calibration.forward, index)  # freed before the next is computed
        if calibration.loss is not None:
            return float(loss_given(calibration.loss, output, batch)), float(samples_of(batch))
        loss, weight = loss_and_weight(reference, output, batch, weigh(index))
        return float(loss), weight

    def summed() -> tuple[float, float]:
        total = count = 0.0
        for index, (batch, reference) in enumerate(zip(calibration.batches, references, strict=True)):
            loss, weight = measured(index, batch, reference)
            total, count = total + weight * loss, count + weight
        return total, count

    group = calibration.group
    total, count = map(sum, zip(*group.gathered(group.together(summed)), strict=True))
    mean = total / (count or 1.0)
    return mean if mean == mean else torch.inf


def loss_and_weight(reference: Any, output: Any, batch: Any, weights: Weights | None = None) -> tuple[Tensor, float]:
    """The loss of one batch's output, a scalar, and its weight in the mean over batches; see `divergence`.

    The weight is the number of rows that count for logits, else 1, or 0 if nothing counts.
    """
    found = logit_rows(reference, output, batch, weights)
    if found is not None:
        wanted, logits, own = found
        rows = _row_losses(wanted, logits)
        share = float(rows.numel() if own is None else own.sum())
        rows = rows if own is None else rows * own.to(rows)
        return rows.sum() / (share or 1.0), share
    pairs = [(a, b) for a, b in zip(real_leaves(reference), real_leaves(output), strict=True) if a.is_floating_point()]
    terms, share = [], 0.0
    for pair, own in zip(pairs, element_weights([a for a, _ in pairs], weights), strict=True):
        (a, b), own = counted(pair, own)
        error, size = ((value if own is None else value * own.to(value)).sum() for value in _squares(a, b))
        terms.append(error / size.clamp_min(torch.finfo(torch.float32).tiny))
        share = max(share, float(a.numel() > 0))
    return (torch.stack(terms).sum() if terms else torch.zeros((), device="cpu")), share


def logit_rows(
    reference: Any, output: Any, batch: Any, weights: Weights | None = None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The rows of logits of two outputs that count, [n, classes], and their weights [n]; None if there are no logits.

    The weights are None if all rows count alike.
    """
    wanted, logits = find_logits(reference, batch), find_logits(output, batch)
    if wanted is None or logits is None:
        return None
    own = None if weights is None else weights.of(logits, rows=True)
    (wanted, logits), own = counted((wanted, logits), own, rows=True)
    return wanted.flatten(0, -2), logits.flatten(0, -2), own


def _row_losses(wanted: Tensor, logits: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of each row of logits [n, classes], [n], a part of the rows at a time."""
    size = max(CHUNK_ELEMENTS // wanted.shape[-1], 1)
    found = []
    for pair in zip(torch.split(wanted, size), torch.split(logits, size), strict=True):
        target, given = (rows.float().log_softmax(-1) for rows in pair)
        found.append((target.exp() * (target - given)).sum(-1))
    return torch.cat(found)


def _squares(wanted: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """The squared errors, and the squares that they are relative to."""
    return (wanted.float() - given.float()).square(), wanted.float().square()


def real_leaves(output: Any) -> list[Tensor]:
    """The tensors of an output; complex ones as real [..., 2]."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves]
