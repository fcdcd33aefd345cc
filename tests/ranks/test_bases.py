"""Changes of basis of heads, against products that do not see them, in float64."""

import pytest
import torch

from balf_fx.ranks.bases import (
    _SLACK,
    BOUND,
    SharedColumns,
    _first_order,
    basis_of,
    has_blocks,
    row_space,
)
from balf_fx.ranks.pivots import pivot_rows


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def combinations(basis, order):
    """T for Q [heads, D, r] and an order of the columns."""
    rank = basis.shape[-1]
    return torch.linalg.solve(basis[:, order[:rank]], basis[:, order[rank:]], left=False)


@pytest.mark.parametrize("sets", [[(3, 8)], [(4, 6), (4, 6)], [(2, 5), (2, 9)], [(1, 1)]])
def test_columns_are_a_permutation_and_well_conditioned_for_each_head(sets):
    heads = [randn(count, size, 24, seed=index) for index, (count, size) in enumerate(sets)]
    bases = [row_space(own) for own in heads]
    columns = SharedColumns(bases)
    assert sorted(columns.order.tolist()) == list(range(24))
    expected = [combinations(own, columns.order) for own in bases]
    for own, others in zip(columns.others, expected, strict=True):
        torch.testing.assert_close(own, others, rtol=1e-8, atol=1e-8)
    assert columns.largest() == pytest.approx([float(others.abs().max()) for others in expected])
    assert max(columns.largest()) < 16


@pytest.mark.parametrize("sets", [[(1, 30)], [(3, 20), (2, 60)], [(20, 70)]])
def test_each_of_the_first_columns_is_nearly_the_longest(sets):
    """By the definition, one by one: its part outside of the span of those before, in all heads that need more."""
    found = [row_space(randn(count, size, 200, seed=index)) for index, (count, size) in enumerate(sets)]
    order = _first_order(found)
    for step in range(max(own.shape[-1] for own in found)):
        volumes, heads = torch.zeros(200, dtype=torch.float64), 0
        for own in (own for own in found if own.shape[-1] > step):
            span = torch.linalg.qr(own[:, order[:step]].mT)[0]
            outside = own - own @ span @ span.mT
            volumes += outside.square().sum(-1).clamp_min(1e-300).log().sum(0)
            heads += len(own)
        assert volumes[order[step]] >= volumes.max() - heads * _SLACK - 1e-6, step


def test_heads_that_have_no_column_in_common_get_an_order():
    apart = torch.zeros(2, 4, 12, dtype=torch.float64)
    apart[0, :, :6], apart[1, :, 6:] = randn(4, 6, seed=1), randn(4, 6, seed=2)
    order = SharedColumns([row_space(apart)]).order
    assert sorted(order.tolist()) == list(range(12))
    assert not has_blocks([apart], BOUND)


def test_one_head_gets_the_columns_of_its_own_pivots():
    head = randn(1, 6, 20)
    basis = row_space(head)
    own = float(combinations(basis, pivot_rows(head[0].mT)).abs().max())
    assert SharedColumns([basis]).largest() == pytest.approx([own], rel=0.2)


def test_interchanges_improve_on_any_first_choice():
    """No interchange of a column in P with another one increases the product of the volumes by more than 1 %."""
    heads = randn(3, 4, 10)
    order = SharedColumns([row_space(heads)]).order
    inside, outside = order[:4].tolist(), order[4:].tolist()

    def volume(columns):
        return float(torch.linalg.det(heads[:, :, columns]).abs().prod())

    best = volume(inside)
    for place in range(4):
        for other in outside:
            assert volume([*inside[:place], other, *inside[place + 1 :]]) <= 1.02 * best


def test_heads_without_well_conditioned_columns_are_refused():
    heads = randn(2, 5, 12)
    assert has_blocks([heads], BOUND)
    low = heads.clone()
    low[1, 4] = low[1, 3]
    assert not has_blocks([low], BOUND)
    assert not has_blocks([heads, torch.zeros(1, 3, 12, dtype=torch.float64)], BOUND)
    assert not has_blocks([heads], 0.1)


def test_a_head_of_lower_rank_still_gets_an_invertible_basis():
    """A refit may leave such a head, after its form was decided."""
    heads = randn(2, 5, 12)
    heads[1, 4] = heads[1, 3]
    order = SharedColumns([row_space(heads)]).order
    basis = basis_of(heads, order)
    assert float(torch.linalg.cond(basis).max()) < 1e8
    torch.testing.assert_close(basis, heads[..., order[:5]], rtol=0, atol=1e-5)
    turned = torch.linalg.inv(basis) @ heads
    turned[..., order[:5]] = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(basis @ turned, heads, rtol=0, atol=1e-4)


def test_products_of_queries_and_keys_do_not_see_the_basis():
    queries, keys, x = randn(3, 6, 20), randn(3, 6, 20, seed=1), randn(20, 9, seed=2)
    order = SharedColumns([row_space(keys)]).order
    basis = keys[:, :, order[:6]]
    turned_keys, turned_queries = torch.linalg.inv(basis) @ keys, basis.mT @ queries
    torch.testing.assert_close(
        (turned_queries @ x).mT @ (turned_keys @ x), (queries @ x).mT @ (keys @ x), rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(turned_keys[:, :, order[:6]], torch.eye(6, dtype=torch.float64).expand(3, -1, -1))


@pytest.mark.parametrize("sets", [[(1, 30), (1, 45)], [(3, 20), (2, 60)]])
def test_the_order_of_more_sets_is_a_start_for_some_of_them(sets):
    found = [row_space(randn(count, size, 200, seed=index)) for index, (count, size) in enumerate([*sets, (2, 50)])]
    columns = SharedColumns(found)
    columns.keep([True] * len(sets) + [False])
    order = columns.order
    assert sorted(order.tolist()) == list(range(200))
    assert max(columns.largest()) < 8
    once = torch.ones(200, 60, dtype=torch.float64)  # the factor of the volume for each interchange
    for own, others in zip(found[:-1], columns.others, strict=True):
        expected = combinations(own, order)
        torch.testing.assert_close(others, expected, rtol=1e-8, atol=1e-8)
        rank = own.shape[-1]
        once[rank:, :rank] *= expected.abs().prod(0)
    assert float(once.max()) < 1.02
