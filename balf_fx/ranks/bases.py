"""Free changes of basis between two linear maps, chosen so that a block of one of them is the identity.

Nothing but a sum over the features of a head separates queries from keys, and nothing but an average over positions
separates values from the output projection. So for any invertible C of each head, the model's output is the same with

    keys C^-1 W_k x and queries C^T W_q x,    or    values C^-1 W_v x and the output projection W_o C.

With C = W[:, P], r columns of the head's own matrix W [r, D], the columns P of C^-1 W are the identity, and

    C^-1 W x = x_P + T x_rest

costs r (D - r) in place of r D, for every head. One set of columns P serves all heads, so that x is split once.

In the same way, one order of the features of a width serves all low-rank maps that have pivots among them
(`ranks.pivots`): the factors of these maps take the place of the heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from balf_fx.ranks.pivots import GAIN, interchanged

BOUND = 32.0
"""The largest entry of T: rounding errors grow with it."""


def shared_columns(heads: Sequence[Tensor]) -> Tensor:
    """The order of the columns of several sets of heads that starts with columns P for which C is well-conditioned.

    As in `ranks.pivots.pivot_rows`, columns are interchanged until the volume of the blocks, here the product of those
    of all heads, is locally maximal. The columns of a larger size contain those of a smaller one.

    Args:
        heads: W [heads, r, D] of each set.

    Returns:
        [D]: the columns of the smallest size, then the others of each larger one, then the rest.
    """
    found: list[int] = []
    for size in sorted({own.shape[1] for own in heads}):
        rows = torch.cat([own for own in heads if own.shape[1] == size]).to("cpu", torch.float64)
        bases, _ = torch.linalg.qr(rows.mT)
        found = _columns(bases, found)
    return torch.tensor([*found, *sorted(set(range(heads[0].shape[-1])) - set(found))])


def _columns(bases: Tensor, given: Sequence[int]) -> list[int]:
    """Add to the given rows of Q [heads, D, r] until they are r, for which the product of all volumes is large."""
    _, features, size = bases.shape
    rest = bases.clone()
    taken: list[int] = []
    for step in range(size):
        lengths = rest.norm(dim=-1)
        index = given[step] if step < len(given) else int(_volumes(lengths, taken).argmax())
        taken.append(index)
        direction = rest[:, index] / lengths[:, index, None].clamp_min(1e-300)
        rest = rest - (rest @ direction.unsqueeze(-1)) * direction.unsqueeze(-2)
    order = torch.tensor([*taken, *sorted(set(range(features)) - set(taken))])
    others = _solved(bases[:, order], size)
    for _ in range(features * size):
        if size == features or others is None:
            break
        gains = _volumes(others.abs().flatten(1), ())
        gains = gains.reshape(features - size, size)[:, len(given) :]
        if not gains.numel() or not float(gains.max()) > math.log(GAIN):
            break
        row, column = divmod(int(gains.argmax()), gains.shape[1])
        column += len(given)
        order[[column, size + row]] = order[[size + row, column]]
        others = interchanged(others, row, column)
    return [int(index) for index in order[:size]]


def _volumes(factors: Tensor, taken: Sequence[int]) -> Tensor:
    """The logarithm of the product over heads of [heads, n]; -inf for those that are taken."""
    found = factors.clamp_min(1e-300).log().sum(0)
    found[list(taken)] = -math.inf
    return found


def _solved(bases: Tensor, size: int) -> Tensor | None:
    """T [heads, D - r, r] of each head; None if some block is singular."""
    solved, info = torch.linalg.solve_ex(bases[:, :size], bases[:, size:], left=False)
    return None if info.any() or not solved.isfinite().all() else solved


def largest_entry(heads: Tensor, order: Tensor) -> float:
    """The largest entry of T for W [heads, r, D] and an order of the columns that starts with P; infinity if there is
    no T."""
    bases, _ = torch.linalg.qr(heads.to("cpu", torch.float64).mT)
    others = _solved(bases[:, order], heads.shape[1])
    if others is None:
        return math.inf
    return float(others.abs().max()) if others.numel() else 0.0
