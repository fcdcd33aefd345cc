"""Low-rank maps written with their own rows or columns, against the product of their factors in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balf_fx.graph.curves import Solution
from balf_fx.ranks.pivots import GAIN, pivot_rows, written_as_columns, written_as_rows

PROPERTY = settings(max_examples=60, derandomize=True)


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kahan(size, cosine=0.285):
    """Kahan's matrix, for which QR with column pivoting fails to reveal the rank."""
    upper = torch.eye(size, dtype=torch.float64) - cosine * torch.triu(
        torch.ones(size, size, dtype=torch.float64), diagonal=1
    )
    return (1 - cosine**2) ** (torch.arange(size, dtype=torch.float64) / 2)[:, None] * upper


def clustered():
    left, _, right = torch.linalg.svd(randn(40, 24), full_matrices=False)
    return left * torch.tensor([1.0] * 12 + [1e-6] * 12, dtype=torch.float64) @ right


ADVERSARIAL = {
    "random": lambda: randn(48, 20),
    "kahan": lambda: kahan(50)[:, :30],
    "kahan, transposed": lambda: kahan(50).mT[:, :30],
    "wilkinson": lambda: torch.tril(-torch.ones(60, 30, dtype=torch.float64), -1) + torch.eye(60, 30),
    "clustered": clustered,
    "repeated rows": lambda: randn(6, 6).repeat(5, 1),
    "zero rows": lambda: torch.cat([torch.zeros(10, 8, dtype=torch.float64), randn(12, 8)]),
    "lower rank": lambda: randn(30, 3) @ randn(3, 9),
    "zero": lambda: torch.zeros(12, 5, dtype=torch.float64),
    "one column": lambda: randn(9, 1),
    "all but one row": lambda: randn(9, 8),
    "scaled rows": lambda: randn(30, 10) * torch.logspace(-8, 8, 30, dtype=torch.float64)[:, None],
}


def of_rows(solution, x):
    """The outputs of a solution written as rows, in the original order."""
    rank = solution.right.shape[1]
    bias = torch.zeros(solution.order.shape, dtype=x.dtype) if solution.bias is None else solution.bias
    pivots = solution.right @ x + bias[:, :rank, None]
    both = torch.cat([pivots, solution.left @ pivots + bias[:, rank:, None]], 1)
    return torch.stack([own[torch.argsort(order)] for own, order in zip(both, solution.order, strict=True)])


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_coefficients_are_bounded_and_the_map_is_the_same(name):
    factor = ADVERSARIAL[name]()
    outputs, rank = factor.shape
    order = pivot_rows(factor)
    assert sorted(order.tolist()) == list(range(outputs))
    right, bias, x = randn(1, rank, 15, seed=1), randn(1, outputs, seed=2), randn(15, 7, seed=3)
    rows = written_as_rows(Solution(factor[None], right, bias), order[None])
    assert (rows.form, rows.left.shape, rows.right.shape) == ("rows", (1, outputs - rank, rank), (1, rank, 15))
    assert float(rows.left.abs().max()) <= GAIN + 1e-6
    wanted = factor @ (right[0] @ x) + bias[0, :, None]
    torch.testing.assert_close(of_rows(rows, x)[0], wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_columns_are_bounded_and_the_map_is_the_same(name):
    factor = ADVERSARIAL[name]()
    inputs, rank = factor.shape
    order = pivot_rows(factor)
    left, bias, x = randn(1, 11, rank, seed=1), randn(1, 11, seed=2), randn(inputs, 7, seed=3)
    columns = written_as_columns(Solution(left, factor.mT[None], bias), order[None])
    assert (columns.form, columns.left.shape, columns.right.shape) == (
        "columns",
        (1, 11, rank),
        (1, rank, inputs - rank),
    )
    assert float(columns.right.abs().max()) <= GAIN + 1e-6
    ordered = x[order]
    found = columns.left[0] @ (ordered[:rank] + columns.right[0] @ ordered[rank:]) + bias[0, :, None]
    wanted = left[0] @ (factor.mT @ x) + bias[0, :, None]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


@PROPERTY
@given(st.integers(2, 30), st.integers(1, 29), st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
def test_any_map_of_any_rank_and_number_of_groups(outputs, rank, groups, biased, seed):
    rank = min(rank, outputs - 1)
    left, right = randn(groups, outputs, rank, seed=seed), randn(groups, rank, rank + 4, seed=seed + 1)
    bias = randn(groups, outputs, seed=seed + 2) if biased else None
    orders = torch.stack([pivot_rows(own) for own in left])
    rows = written_as_rows(Solution(left, right, bias), orders)
    x = randn(groups, rank + 4, 5, seed=seed + 3)
    wanted = left @ right @ x + (0 if bias is None else bias[..., None])
    torch.testing.assert_close(of_rows(rows, x), wanted, rtol=1e-8, atol=1e-8)
    assert (rows.bias is None) == (bias is None)
    # r (O + D - r) numbers, in place of r (O + D)
    assert rows.left[0].numel() + rows.right[0].numel() == rank * (outputs + rank + 4 - rank)


def test_rows_that_are_in_order_already_need_no_order():
    left, right = randn(1, 12, 5), randn(1, 5, 7)
    order = pivot_rows(left[0])
    ordered = written_as_rows(Solution(left[:, order], right, None), None)
    gathered = written_as_rows(Solution(left, right, None), order[None])
    assert ordered.order is None
    torch.testing.assert_close(ordered.left, gathered.left)
    torch.testing.assert_close(ordered.right, gathered.right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_error_is_of_the_size_of_that_of_a_pair(dtype):
    """Rounding errors of the pivots are multiplied by T."""
    left, singular, right = torch.linalg.svd(randn(96, 64) / 8, full_matrices=False)
    left, right, x = left[:, :40], (singular[:40, None] * right[:40]), randn(64, 500, seed=1)
    wanted = left @ right @ x
    rows = written_as_rows(Solution(left[None], right[None], None), pivot_rows(left)[None])

    def product(a, b):
        return (a.to(dtype).float() @ b.to(dtype).float()).to(dtype)

    def error(value):
        return float((value.double() - wanted).norm() / wanted.norm())

    pivots = product(rows.right[0], x)
    found = torch.cat([pivots, product(rows.left[0], pivots)])[torch.argsort(rows.order[0])]
    assert error(found) <= 2 * error(product(left, product(right, x)))
