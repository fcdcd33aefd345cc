"""Products x x^T of rows with themselves, of which one triangle is computed, since they are symmetric.

The blocks are the same on all devices, so that results differ as little as the devices do.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64  # columns that are computed at a time, or a multiple of it


def add_lower(total: Tensor, rows: Tensor) -> None:
    """Add products to the lower triangle of a total; what is above it is only a part of the sum.

    Args:
        total: [G, R, F], in any precision.
        rows: [G, R, n]; the first F rows are x, with which all rows are multiplied.
    """
    size = total.shape[-1]
    width = max(size // 16 // _BLOCK, 1) * _BLOCK
    for start in range(0, size, width):
        block = slice(start, min(start + width, size))
        total[:, start:, block] += rows[:, start:] @ rows[:, block].mT


def mirror(total: Tensor) -> Tensor:
    """Fill the upper triangle of [G, F, F] from the lower one, in place."""
    return total.tril_().add_(total.tril(-1).mT)


def gram(rows: Tensor) -> Tensor:
    """x x^T [G, F, F] of [G, F, n], in float64: products in the precision of x."""
    groups, size, _ = rows.shape
    total = rows.new_zeros(groups, size, size, dtype=torch.float64)
    add_lower(total, rows)
    return mirror(total)
