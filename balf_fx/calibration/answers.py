"""The distance of a compressed model's outputs from the original's, without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from balf_fx.calibration.batches import Forward, Loss, run_batch


def find_logits(output: Any, batch: Any) -> Tensor | None:
    """The logits of a classifier or language model among a model's outputs, or None.

    These are the output named `logits` or, without one, the only tensor if its shape is [samples, classes], or
    [samples, length, classes] for integer inputs [samples, length].
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor) and named.is_floating_point():
        return named
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2 or output.shape[-1] < 2:
        return None
    tokens = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and not leaf.is_floating_point()]
    language = output.dim() == 3 and any(leaf.shape == output.shape[:2] for leaf in tokens)
    return output if output.dim() == 2 or language else None


def answers(model: nn.Module, batches: Sequence[Any], forward: Forward) -> list[Any]:
    """The model's output for each batch."""
    return [run_batch(model, batch, forward, index) for index, batch in enumerate(batches)]


def divergence(
    model: nn.Module, batches: Sequence[Any], references: Sequence[Any], forward: Forward, loss: Loss | None = None
) -> float:
    """The mean loss of a model's outputs over batches; infinite if it is NaN.

    The loss is the user's, if given. Otherwise it is the Kullback-Leibler divergence for logits, in nats per row, and
    the squared error relative to the mean square for other outputs.

    Args:
        references: the original model's `answers`.
    """
    total = 0.0
    for index, (batch, reference) in enumerate(zip(batches, references, strict=True)):
        output = run_batch(model, batch, forward, index)
        total += float(differ(reference, output, batch) if loss is None else loss(output, batch))
    mean = total / max(len(batches), 1)
    return mean if mean == mean else torch.inf


def differ(reference: Any, output: Any, batch: Any) -> Tensor:
    """The loss of one batch's output, a scalar; see `divergence`."""
    wanted, logits = find_logits(reference, batch), find_logits(output, batch)
    if wanted is not None and logits is not None:
        target, given = wanted.float().log_softmax(-1), logits.float().log_softmax(-1)
        return (target.exp() * (target - given)).sum(-1).mean()
    pairs = zip(real_leaves(reference), real_leaves(output), strict=True)
    terms = [
        (a.float() - b.float()).square().sum() / a.float().square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        for a, b in pairs
        if a.is_floating_point()
    ]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def real_leaves(output: Any) -> list[Tensor]:
    """The tensors of an output; complex ones as real [..., 2]."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves]
