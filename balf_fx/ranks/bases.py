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

from balf_fx.ranks.pivots import GAIN, interchange
from balf_fx.ranks.spectra import thin_qr

BOUND = 64.0
"""The largest entry of T: rounding errors grow with it."""


_CONDITION = 1e4  # the largest condition number of C
_TINY = 1e-300
_CANDIDATES = 48
_SLACK = 0.3  # the logarithm by which a squared length may be less than another that is not up to date
_LITTLE = 1e-2  # the share of a squared length
_NOISE = 1e-6  # squared lengths below this one are rounding errors of float32
_LEAST = 1e-6  # singular values of C below this share of the largest one are raised to it


def row_space(heads: Tensor) -> Tensor:
    """Q [heads, D, r] in float64, whose orthonormal columns span the rows of W [heads, r, D]."""
    basis, _ = thin_qr(heads.detach().to(torch.float64).mT)
    return basis.contiguous()  # products with a few directions take several times as long column by column


class SharedColumns:
    """An order of the columns of several sets of heads, that starts with columns P for which C is well-conditioned.

    The columns of a larger size contain those of a smaller one. As in `ranks.pivots.pivot_rows`, columns are
    interchanged until the volume of the blocks, here the product of those of all heads, is locally maximal.

    Args:
        bases: Q [heads, D, r] of each set, from `row_space`.

    Attributes:
        order: [D], the columns of the smallest size, then the others of each larger one, then the rest.
        others: T [heads, D - r, r] of each set, in this order; infinite where C is singular.
    """

    def __init__(self, bases: Sequence[Tensor]) -> None:
        self.order = _first_order(bases)
        self.others = [_solved(basis[:, self.order]) for basis in bases]
        self._interchange()

    def keep(self, wanted: Sequence[bool]) -> None:
        """Go on from this order with some of the sets: much faster than to choose the columns one by one."""
        self.others = [own for own, kept in zip(self.others, wanted, strict=True) if kept]
        self._interchange()

    def largest(self) -> list[float]:
        """The largest entry of T for each set."""
        return [float(own.abs().max()) if own.numel() else 0.0 for own in self.others]

    def _interchange(self) -> None:
        """Interchange columns while that increases the volume."""
        widest = max(own.shape[-1] for own in self.others)
        for _ in range(len(self.order) * widest):
            gains = self.others[0].new_ones(len(self.order), widest)
            for own in self.others:
                rank = own.shape[-1]
                gains[rank:, :rank] *= own.abs().clamp_min(_TINY).prod(0)
            place, pivot = divmod(int(gains.argmax()), widest)
            if not GAIN < float(gains[place, pivot]) < math.inf:
                break
            self.order[[pivot, place]] = self.order[[place, pivot]]
            for own in self.others:
                _reorder(own, pivot, place)


def _reorder(others: Tensor, pivot: int, place: int) -> None:
    """Bring T [heads, D - r, r] up to date, in place, where two columns have changed places."""
    rank = others.shape[-1]
    if place < rank:
        others[..., [pivot, place]] = others[..., [place, pivot]]
    elif pivot < rank:
        interchange(others, place - rank, pivot)
    else:
        others[..., [pivot - rank, place - rank], :] = others[..., [place - rank, pivot - rank], :]


def has_blocks(heads: Sequence[Tensor], bound: float) -> bool:
    """Whether all heads W [heads, r, D] of some sets can get identity blocks without large rounding errors."""
    columns = SharedColumns([row_space(own) for own in heads])
    return all(
        largest <= bound and float(torch.linalg.cond(own[..., columns.order[: own.shape[1]]]).max()) < _CONDITION
        for own, largest in zip(heads, columns.largest(), strict=True)
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

    These lengths only decrease. So rows are chosen among a few of the longest, whose parts outside of the spans are at
    hand, until one of the others may be longer (Minoux 1978); then all lengths are brought up to date at once.

    In float32: where lengths are too small for it, so are the pivots, and T exceeds every bound.
    """
    bases = [own.float() for own in bases]
    features, rank = bases[0].shape[1], max(own.shape[-1] for own in bases)
    squares = [own.square().sum(-1) for own in bases]
    spans = [own.new_zeros(len(own), own.shape[-1], own.shape[-1]) for own in bases]  # rows: directions, one by one
    taken: list[int] = []
    while len(taken) < rank:
        size = len(taken)
        wanted = [index for index, own in enumerate(bases) if own.shape[-1] > size]
        most = min(bases[index].shape[-1] for index in wanted)
        volumes = _volumes([squares[index] for index in wanted])
        volumes[taken] = -math.inf
        longest = volumes.topk(min(_CANDIDATES + 1, features))
        places, limits = longest.indices[:_CANDIDATES].tolist(), longest.values.tolist()[_CANDIDATES:]
        candidates = {index: bases[index][:, places] for index in wanted}
        products = torch.cat([_products(rows, spans[index][:, :size]) for index, rows in candidates.items()])
        least = limits[0] - len(products) * _SLACK if limits else -math.inf
        rows = _longest(products, least)[: most - size]
        for index, own in candidates.items():
            outside = _outside(own[:, rows], spans[index][:, :size])
            spans[index][:, size : size + len(rows)] = torch.linalg.qr(outside.mT)[0].mT
        taken += [places[row] for row in rows]
        for index in wanted:
            squares[index] -= (bases[index] @ spans[index][:, size : len(taken)].mT).square().sum(-1)
    return torch.tensor([*taken, *sorted(set(range(features)) - set(taken))], device="cpu")


def _longest(products: Tensor, least: float) -> list[int]:
    """Rows in the order of their volumes, by their inner products [heads, rows, rows], which are changed.

    At least one; the others while their volumes are not below `least`.
    """
    taken: list[int] = []
    squares = products.diagonal(dim1=-2, dim2=-1)
    gone = products.new_zeros(products.shape[-1])
    while len(taken) < len(gone):
        volume, row = (_volumes([squares]) + gone).max(0)
        if taken and float(volume) < least:
            break
        square = squares[:, row, None, None]
        column = torch.where(square > _NOISE, products[:, row, :, None] / square.sqrt(), 0.0)  # not of rounding errors
        products -= column @ column.mT
        gone[row] = -math.inf
        taken.append(int(row))
    return taken


def _volumes(squares: Sequence[Tensor]) -> Tensor:
    """The logarithms of products of lengths, for squared lengths [heads, rows]."""
    return torch.cat(list(squares)).clamp_min(_NOISE).log().sum(0)


def _products(rows: Tensor, span: Tensor) -> Tensor:
    """Inner products [heads, rows, rows] of the parts of rows [heads, rows, r] outside of a span [heads, ., r]."""
    inside = rows @ span.mT
    return rows @ rows.mT - inside @ inside.mT


def _outside(rows: Tensor, span: Tensor) -> Tensor:
    """Rows [heads, rows, r] without their parts in a span [heads, directions, r]."""
    found = rows - (rows @ span.mT) @ span
    if bool((found.square().sum(-1) > _LITTLE * rows.square().sum(-1)).all()):
        return found
    return found - (found @ span.mT) @ span  # for what is left of rounding errors


def _solved(basis: Tensor) -> Tensor:
    """T [heads, D - r, r] for Q [heads, D, r] whose first rows are pivots; infinite where these are singular."""
    rank = basis.shape[-1]
    solved, info = torch.linalg.solve_ex(basis[:, :rank], basis[:, rank:], left=False)
    return torch.where((info == 0)[:, None, None] & solved.isfinite(), solved, math.inf)
