"""Low-rank maps written with some of their own rows or columns (PIFA: Zhao et al. 2025, "Pivoting Factorization").

A map M = A B of rank r, [O, D], has r rows P that span all others: with T = A_rest A_P^-1,

    M_P = A_P B,    M_rest = T M_P.

So y_P = M_P x and y_rest = T y_P compute the same outputs at r (O + D - r) numbers in place of r (O + D), and at full
rank at the cost of the dense map. In the same way r columns C of M span the others: M x = M_C (x_C + T x_rest).

Any r independent rows will do in exact arithmetic. Rounding errors grow with the entries of T, which are at most 1
where no interchange of rows increases the volume of A_P (Goreinov et al. 2010, "How to find a good submatrix").
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from balf_fx.graph.curves import Solution
from balf_fx.ranks.spectra import thin_qr

GAIN = 1.01
"""The least factor by which an interchange increases a volume; without a bound above 1, rounding could repeat them."""

_LEAST = 1e-10  # singular values of a factor that are smaller than the largest one by this factor count as zero


def pivot_rows(factor: Tensor) -> Tensor:
    """The order of the rows of a factor A [O, r] that starts with r rows that span all of them.

    No entry of T exceeds `GAIN`: otherwise an interchange would increase the volume of the pivots by more than that.

    Returns:
        [O]: the pivots, ascending, then the other rows, ascending.
    """
    rows, rank = factor.shape
    basis, _ = thin_qr(factor.detach().to(torch.float64))  # also spans rows of a lower rank
    _, exchanged = torch.linalg.lu_factor(basis)
    order = _permutation(exchanged, rows)
    others = torch.linalg.solve(basis[order[:rank]], basis[order[rank:]], left=False)
    for _ in range(rows * rank if others.numel() else 0):
        row, column = divmod(int(others.abs().argmax()), rank)
        if abs(float(others[row, column])) <= GAIN:
            break
        order[[column, rank + row]] = order[[rank + row, column]]
        interchange(others, row, column)
    return torch.cat([order[:rank].sort().values, order[rank:].sort().values])


def interchange(others: Tensor, row: int, column: int) -> None:
    """Interchange one of the other rows with a pivot in T [..., O - r, r], in place, as in the simplex method."""
    pivot = others[..., row, column, None].clone()
    scaled, coefficients = others[..., row, :] / pivot, others[..., column].clone()
    others.sub_(coefficients.unsqueeze(-1) * scaled.unsqueeze(-2))
    others[..., column] = coefficients / pivot
    others[..., row, :] = -scaled
    others[..., row, column] = 1 / pivot[..., 0]


def written_as_rows(solution: Solution, orders: Tensor | None) -> Solution:
    """A pair of factors as pivot rows and combinations of them.

    Args:
        solution: left [G, O, r] and right [G, r, D].
        orders: [G, O], for each group the rows, pivots first; None if they are in this order.
    """
    if solution.left is None:
        raise ValueError("a dense layer has no pivots")
    rank = solution.left.shape[-1]
    left, bias = solution.left, solution.bias
    if orders is not None:
        groups = torch.arange(len(orders), device="cpu").unsqueeze(-1)
        left, bias = left[groups, orders], None if bias is None else bias[groups, orders]
    others = _combined(left, rank)
    if bias is not None:
        given, rest = bias[:, :rank], bias[:, rank:]
        bias = torch.cat([given, rest - (others @ given.unsqueeze(-1)).squeeze(-1)], 1)
    right = left[:, :rank] @ solution.right
    return dataclasses.replace(solution, left=others, right=right, bias=bias, form="rows", order=orders)


def written_as_columns(solution: Solution, order: Tensor | None) -> Solution:
    """A pair of factors as pivot columns and combinations of them.

    Args:
        solution: left [1, O, r] and right [1, r, D].
        order: [1, D], the columns, pivots first; None if they are in this order.
    """
    if solution.left is None:
        raise ValueError("a dense layer has no pivots")
    rank = solution.left.shape[-1]
    right = solution.right if order is None else solution.right[..., order[0]]
    others = _combined(right.mT, rank)
    return dataclasses.replace(
        solution, left=solution.left @ right[..., :rank], right=others.mT, form="columns", order=order
    )


def _combined(factor: Tensor, rank: int) -> Tensor:
    """T [..., O - r, r] with A_rest = T A_P, for A [..., O, r] whose first r rows P span all of them.

    T is the same for A = Q R and for Q, whose pivots are well-conditioned unless A has a lower rank.
    """
    basis, triangle = thin_qr(factor.to(torch.float64))
    sizes = triangle.diagonal(dim1=-2, dim2=-1).abs()
    solved, failed = torch.linalg.solve_ex(basis[..., :rank, :], basis[..., rank:, :], left=False)
    if bool(failed.any()) or bool((sizes.amin(-1) <= _LEAST * sizes.amax(-1)).any()):
        pivots, rest = factor[..., :rank, :].mT.cpu(), factor[..., rank:, :].mT.cpu()
        solved = torch.linalg.lstsq(pivots, rest, rcond=_LEAST, driver="gelsy").solution.mT  # is on the CPU alone
    return torch.as_tensor(solved).to(factor)


def _permutation(exchanged: Tensor, rows: int) -> Tensor:
    """The row order after the interchanges of an LU decomposition, which are numbered from 1."""
    order = list(range(rows))
    for row, other in enumerate(exchanged.tolist()):
        order[row], order[other - 1] = order[other - 1], order[row]
    return torch.tensor(order, device="cpu")
