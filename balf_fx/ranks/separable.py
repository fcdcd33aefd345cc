"""Convolutions as one along the first axis of the kernel, and one along the second (Jaderberg et al., arXiv 1405.3866).

A kernel [O, C, h, w] is a matrix M with a row for each output and each of the w columns of the kernel, and a column for
each channel and each of its h rows. A rank r of M is a convolution of h x 1 to r channels, then one of 1 x w to the
outputs: W[o, c, i, j] = sum_r left[(o, j), r] right[r, (c, i)]. It has r (h C + w O) numbers.

Such a convolution reads strips of h pixels, one for each j, and adds up what it makes of them. If the strips are
uncorrelated, with the same second moment S, the output error is that of M on strips, which its singular value
decomposition in the metric of S minimises. Given the first factor, the second is found by least squares for patches,
which need not be uncorrelated.

Everything is float64; kernels have one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from balf_fx.graph.curves import Solution


def strips_of(weight: Tensor, taps: tuple[int, int]) -> Tensor:
    """M [1, O w, C h] of kernels [1, O, C h w]."""
    h, w = taps
    kernel = weight.reshape(1, weight.shape[1], -1, h, w)
    return kernel.permute(0, 1, 4, 2, 3).reshape(1, weight.shape[1] * w, -1)


def kernels_of(matrix: Tensor, taps: tuple[int, int]) -> Tensor:
    """The inverse of `strips_of`: [1, O, C h w]."""
    h, w = taps
    kernel = matrix.reshape(1, matrix.shape[1] // w, w, -1, h)
    return kernel.permute(0, 1, 3, 4, 2).reshape(1, matrix.shape[1] // w, -1)


def whole(solution: Solution) -> Solution:
    """A separable solution as a dense one; others as they are."""
    if solution.form != "separable" or solution.left is None:
        return solution
    return Solution(None, kernels_of(solution.left @ solution.right, solution.taps), solution.bias)


def over_taps(matrix: Tensor, taps: int) -> Tensor:
    """A map of outputs [G, O, O] as one of outputs at each of `taps` columns, [G, O w, O w]."""
    return torch.kron(matrix, torch.eye(taps, dtype=matrix.dtype, device=matrix.device))


def moment_of_strips(moment: Tensor, taps: tuple[int, int]) -> Tensor:
    """The second moment of strips [1, C h, C h] from that of patches [1, C h w, C h w], averaged over their columns."""
    h, w = taps
    channels = moment.shape[-1] // (h * w)
    columns = moment.reshape(channels, h, w, channels, h, w).diagonal(dim1=2, dim2=5)
    return columns.mean(-1).reshape(1, channels * h, channels * h)


def separated(
    full: Tensor, product: Tensor, moment: Tensor, metric: Tensor, rank: int, taps: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Factors [1, O w, r] and [1, r, C h] near a map M, for patches with the second moment C.

    Args:
        full, product: M and M C, [1, O, C h w].
        moment: C, positive definite.
        metric: R [1, m, O]; the first factor depends on the error R (y - y').
    """
    w = taps[1]
    seen = over_taps(metric, w) @ strips_of(full, taps)
    _, vectors = torch.linalg.eigh(seen @ moment_of_strips(moment, taps) @ seen.mT)
    right = vectors.flip(-1)[..., :rank].mT @ seen
    reads = _patches_read(right, taps)
    inner = reads @ moment @ reads.mT
    size = inner.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    inner = inner + 1e-10 * size * torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    left = torch.linalg.solve(inner, reads @ product.mT).mT  # [1, O, w r]
    return left.reshape(1, -1, rank), right


def _patches_read(right: Tensor, taps: tuple[int, int]) -> Tensor:
    """The first factor at each column of a patch, [1, w r, C h w]."""
    h, w = taps
    rank = right.shape[1]
    columns = torch.eye(w, dtype=right.dtype, device=right.device)
    strips = right.reshape(rank, -1, h)
    return torch.einsum("rci,jk->jrcik", strips, columns).reshape(1, w * rank, -1)


def by_patch(left: Tensor, outputs: int) -> Tensor:
    """The second factor [1, O w, r] as a map of patches [1, O, r w]."""
    return left.reshape(outputs, -1, left.shape[-1]).transpose(1, 2).reshape(1, outputs, -1)


def by_column(weight: Tensor, taps: int) -> Tensor:
    """The inverse of `by_patch`: [1, O w, r]."""
    outputs = weight.shape[1]
    return weight.reshape(outputs, -1, taps).transpose(1, 2).reshape(1, outputs * taps, -1)
