"""Low-rank factors with an error weighted by the influence of each weight (AIR, arXiv 2606.19993).

Let L be the Cholesky factor of E[x x^T], L L^T = E[x x^T]. The output error of a low-rank A B is then the plain error
of P Q as an approximation of M = W L, with A = P and B = Q L^-1: E|(W - A B) x|^2 = |M - P Q|^2. AIR multiplies the
squared error of each element by w = 1 + delta * influence, where the influence of a weight is |dLoss/dW * W| or the
diagonal Fisher information (dLoss/dW)^2. L is lower-triangular, so column j of M combines the columns of W from j on,
mainly column j itself. The elements of M therefore stay aligned with those of W, which an eigenvector root of
E[x x^T] would not ensure.

The weighted problem has no closed form. The truncated SVD of M is the optimum without weights, and the start of the
sweeps. A sweep over the components solves for the right and then the left factor of a few of them at a time. Given one
factor, each row or column of the other is the solution of an exact weighted least-squares problem, so the weighted
error never increases. The published sweep solves for one component at a time; blocks reach a lower error and read the
weights less often.

Shapes: weights, influences and M are [G, O, D], the factors P [G, O, r] and Q [G, r, D]. Results have the dtype and the
device of the input.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from balf_fx.calibration.sample import WeightGradients

Signal = Literal["weight_gradient", "fisher"]


_SLICE_ELEMENTS = 1 << 17  # small enough that the operands of an update stay in the cache


def influence(seen: WeightGradients, weight: Tensor, signal: Signal) -> Tensor:
    """The influence of each weight on the loss, [G, O, D], in any unit.

    Args:
        seen: [G, O, D], the gradients of all calibration batches.
        weight: W [G, O, D].
        signal: "weight_gradient" for |dLoss/dW * W|, "fisher" for (dLoss/dW)^2, averaged over the batches.
    """
    return weight.abs() * seen.absolute if signal == "weight_gradient" else seen.squares.to(weight.dtype)


def error_weights(influence: Tensor, delta: float, limit: float) -> Tensor:
    """1 + delta * influence, with the influence scaled to a mean of 1 in each matrix and then clipped at `limit`.

    Args:
        influence: [G, O, D]; a matrix of zeros has weights of 1.
    """
    mean = influence.mean((-2, -1), keepdim=True)
    scaled = influence / torch.where(mean > 0, mean, 1.0)
    return 1.0 + delta * scaled.clamp_max(limit)


def cholesky_root(moment: Tensor, damping: float) -> Tensor:
    """The lower-triangular L with L L^T = E[x x^T], damped so that it is invertible.

    Args:
        moment: E[x x^T] [G, D, D], which may be singular.
        damping: the value added to each eigenvalue, as a share of their mean. It is multiplied by ten as often as
            needed where rounding leaves the matrix indefinite.
    """
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    unit = torch.where(mean > 0, mean, 1.0)
    added = damping * unit
    while True:
        damped = moment + torch.diag_embed(added.unsqueeze(-1).expand(moment.shape[:-1]))
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(damped)
        if not ((failed > 0) & (added < unit)).any():
            return root
        added = torch.where(failed > 0, 10 * added, added)


def sweep(target: Tensor, weights: Tensor, left: Tensor, right: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Refine P and Q once, the last components first, to reduce the weighted error sum w (M - P Q)^2.

    Only the weighted residual Z = w * (M - P Q) is stored. The change dQ of a factor solves the normal equations
    (P^T diag(w) P) dq = P^T z for each column. The matrices of all these systems are one product of w with the
    pairwise products of the block's components, so a block reads w and Z only a few times.

    Args:
        target: M [G, O, D].
        weights: w [G, O, D], positive.
        left, right: P [G, O, r] and Q [G, r, D].
        block: the number of components solved for together; 1 is the sweep as published.

    Returns:
        P, with columns of length 1, and Q.
    """
    left, right = left.clone(), right.clone()
    residual = weights * (target - left @ right)
    for end in range(left.shape[-1], 0, -block):
        own = slice(max(end - block, 0), end)
        p, q = left[..., own], right[..., own, :]  # views
        _normalise(p, q, -2)
        change = _least_squares(p.mT, weights, residual)
        _explain(residual, weights, p, change)
        q += change
        _normalise(q, p, -1)
        change = _least_squares(q, weights.mT, residual.mT).mT
        _explain(residual, weights, change, q)
        p += change
        _normalise(p, q, -2)
    return left, right


def _normalise(factor: Tensor, other: Tensor, dim: int) -> None:
    """Move the lengths of one factor's components, which lie along `dim`, into the other factor, in place."""
    lengths = torch.linalg.vector_norm(factor, dim=dim, keepdim=True)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    factor /= lengths
    other *= lengths.mT


def _least_squares(fixed: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
    """The change of the free factor that minimises the weighted error.

    Args:
        fixed: the other factor of the block, [G, b, n], each component of length 1.
        weights, residual: w and w * (M - P Q), [G, n, m].

    Returns:
        [G, b, m].
    """
    size = fixed.shape[-2]
    rows, columns = torch.tril_indices(size, size, device=fixed.device)
    products = ((fixed[:, rows] * fixed[:, columns]) @ weights).mT  # [G, m, b (b + 1) / 2]
    gram = products.new_empty(*products.shape[:-1], size, size)
    gram[..., rows, columns] = products
    gram[..., columns, rows] = products
    # A ridge only shortens the step, and the error still decreases: equal or zero components need no special case.
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += 10 * size * torch.finfo(gram.dtype).eps * diagonal.amax(-1, keepdim=True)
    root, failed = torch.linalg.cholesky_ex(gram)
    change = torch.cholesky_solve((fixed @ residual).mT.unsqueeze(-1), root).squeeze(-1)
    return change.masked_fill((failed > 0).unsqueeze(-1), 0.0).mT


def _explain(residual: Tensor, weights: Tensor, left: Tensor, right: Tensor) -> None:
    """Subtract w * (P Q) from the weighted residual, in place."""
    rows = max(_SLICE_ELEMENTS // residual.shape[-1], 1)
    slices = (torch.split(value, rows, -2) for value in (residual, weights, left))
    for own, weight, factor in zip(*slices, strict=True):
        own.addcmul_(weight, factor @ right, value=-1)


def refined_factors(
    weight: Tensor, root: Tensor, weights: Tensor, left: Tensor, sweeps: int, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The factors A [G, O, r] and B [G, r, D] after some sweeps.

    Args:
        weight: W [G, O, D].
        root: L [G, D, D], from `cholesky_root`.
        weights: w [G, O, D], from `error_weights`.
        left: U [G, O, r], the leading left singular vectors of W L, from which the first sweep starts.
        dtype: the dtype of the sweeps.
    """
    target = weight @ root
    scale = target.square().mean((-2, -1), keepdim=True).sqrt()  # so that squares of the residual stay in range
    target = target / torch.where(scale > 0, scale, 1.0)
    p, q, target, weights = (value.to(dtype) for value in (left, left.mT @ target, target, weights))
    for _ in range(sweeps):
        p, q = sweep(target, weights, p, q, block)
    right = torch.linalg.solve_triangular(root, q.to(root.dtype) * scale, upper=False, left=False)
    return p.to(root.dtype), right
