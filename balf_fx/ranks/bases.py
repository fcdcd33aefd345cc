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

BOUND = 64.0
"""The largest entry of T: rounding errors grow with it."""


_CONDITION = 1e4  # the largest condition number of C
_TINY = 1e-300
_LEAST = 1e-6  # singular values of C below this share of the largest one are raised to it


def shared_columns(heads: Sequence[Tensor]) -> Tensor:
    """The order of the columns of several sets of heads that starts with columns P for which C is well-conditioned.

    The columns of a larger size contain those of a smaller one. As in `ranks.pivots.pivot_rows`, columns are
    interchanged until the volume of the blocks, here the product of those of all heads, is locally maximal.

    Args:
        heads: W [heads, r, D] of each set.

    Returns:
        [D]: the columns of the smallest size, then the others of each larger one, then the rest.
    """
    bases = [torch.linalg.qr(own.detach().to("cpu", torch.float64).mT)[0] for own in heads]
    order = _first_order(bases)
    others = [_solved(basis[:, order]) for basis in bases]
    widest = max(own.shape[-1] for own in bases)
    for _ in range(len(order) * widest):
        gains = torch.zeros(len(order), widest, dtype=torch.float64)
        for own in others:
            rank = own.shape[-1]
            gains[rank:, :rank] += own.abs().clamp_min(_TINY).log().sum(0)
        place, pivot = divmod(int(gains.argmax()), widest)
        if not math.log(GAIN) < float(gains[place, pivot]) < math.inf:
            break
        order[[pivot, place]] = order[[place, pivot]]
        for index, own in enumerate(others):
            rank = own.shape[-1]
            if pivot < rank <= place:
                others[index] = interchanged(own, place - rank, pivot)
    return order


def has_blocks(heads: Sequence[Tensor], bound: float) -> bool:
    """Whether all heads W [heads, r, D] of some sets can get identity blocks without large rounding errors."""
    order = shared_columns(heads)
    return all(
        largest_entry(own, order) <= bound
        and float(torch.linalg.cond(own[..., order[: own.shape[1]]]).max()) < _CONDITION
        for own in heads
    )


def basis_of(heads: Tensor, order: Tensor) -> Tensor:
    """C [heads, r, r] for W [heads, r, D] and an order of the columns.

    A head whose weight has a lower rank than r gets an invertible C that differs from the block by rounding errors.
    """
    left, singular, right = torch.linalg.svd(heads[..., order[: heads.shape[1]]])
    least = _LEAST * float(singular.max())
    basis: Tensor = left * singular.clamp_min(least).unsqueeze(-2) @ right
    return basis


def _first_order(bases: Sequence[Tensor]) -> Tensor:
    """Choose rows of Q [heads, D, r] one by one: the one with the largest product of lengths outside of the spans.

    Lengths are updated by the component along each new direction, as in QR with column pivoting (Businger and Golub
    1965), so that Q is read once for each row and nothing of its size is written.
    """
    features = bases[0].shape[1]
    squares = [own.square().sum(-1) for own in bases]
    spans = [own.new_zeros(len(own), own.shape[-1], own.shape[-1]) for own in bases]  # rows: directions, one by one
    taken: list[int] = []
    for size in range(max(own.shape[-1] for own in bases)):
        wanted = [index for index, own in enumerate(bases) if own.shape[-1] > size]
        volumes = torch.cat([squares[index] for index in wanted]).clamp_min(_TINY).log().sum(0)
        volumes[taken] = -math.inf
        taken.append(int(volumes.argmax()))
        for index in wanted:
            span, direction = spans[index][:, :size], bases[index][:, taken[-1]]
            for _ in range(2):  # once leaves a rounding error where little of the row is outside of the span
                direction = direction - ((direction.unsqueeze(1) @ span.mT) @ span).squeeze(1)
            direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(_TINY)
            spans[index][:, size] = direction
            squares[index] -= (bases[index] @ direction.unsqueeze(-1)).squeeze(-1).square()
    return torch.tensor([*taken, *sorted(set(range(features)) - set(taken))])


def _solved(basis: Tensor) -> Tensor:
    """T [heads, D - r, r] for Q [heads, D, r] whose first rows are pivots; infinite where these are singular."""
    rank = basis.shape[-1]
    solved, info = torch.linalg.solve_ex(basis[:, :rank], basis[:, rank:], left=False)
    return torch.where((info == 0)[:, None, None] & solved.isfinite(), solved, math.inf)


def largest_entry(heads: Tensor, order: Tensor) -> float:
    """The largest entry of T for W [heads, r, D] and an order of the columns that starts with P."""
    basis, _ = torch.linalg.qr(heads.detach().to("cpu", torch.float64).mT)
    others = _solved(basis[:, order])
    return float(others.abs().max()) if others.numel() else 0.0
