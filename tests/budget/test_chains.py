import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balf_fx.budget.chains import Factor, Table, elimination_order, hull, least
from balf_fx.ranks.hulls import lower_hull


@st.composite
def problems(draw):
    """Factors over a few variables, with whole costs, and the number of values of each variable."""
    count = draw(st.integers(1, 4))
    sizes = [draw(st.integers(1, 3)) for _ in range(count)]
    scopes = [(variable,) for variable in range(count)]
    scopes += draw(st.lists(st.permutations(range(count)).map(lambda own: tuple(own[:2])), max_size=4))
    seed = draw(st.integers(0, 1 << 20))
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for scope in scopes:
        shape = [sizes[variable] for variable in scope]
        lengths = torch.randint(1, 4, (math.prod(shape),), generator=generator).tolist()
        costs = [torch.randint(0, 9, (length,), generator=generator) for length in lengths]
        losses = [torch.rand(length, generator=generator, dtype=torch.float64) for length in lengths]
        factors.append(Factor.of(scope, shape, costs, losses))
    return factors, sizes


def all_points(factors, sizes):
    """The costs and losses of all combinations of values and of candidates."""
    for places in itertools.product(*map(range, sizes)):
        rows = []
        for factor in factors:
            at = tuple(places[variable] for variable in factor.variables)
            pairs = zip(factor.costs[at].tolist(), factor.losses[at].tolist(), strict=True)
            rows.append([pair for pair in pairs if math.isfinite(pair[1])])
        for picked in itertools.product(*rows):
            yield sum(cost for cost, _ in picked), sum(loss for _, loss in picked)


@given(problems())
def test_the_hull_is_that_of_all_combinations(problem):
    factors, sizes = problem
    costs, losses = zip(*all_points(factors, sizes), strict=True)
    wanted = [(costs[i], losses[i]) for i in lower_hull(costs, losses)]
    found = hull(factors)
    points = [(point.cost, point.loss) for point in found]
    for pair in wanted:
        assert any(pair == pytest.approx(own, abs=1e-9) for own in points)
    for point in found:  # each is a combination, with what it costs and loses
        own = [factor.losses[tuple(point.places[v] for v in factor.variables)] for factor in factors]
        assert point.loss == pytest.approx(sum(float(row[i]) for row, i in zip(own, point.picked, strict=True)))
        assert any(
            (point.cost, point.loss) == pytest.approx(pair, abs=1e-9) for pair in zip(costs, losses, strict=True)
        )


@given(problems())
def test_the_least_sum_is_that_of_all_combinations(problem):
    factors, sizes = problem
    tables = [factor.at(0.1) for factor in factors]

    def value(places):
        return sum(float(table.values[tuple(places[variable] for variable in table.variables)]) for table in tables)

    found = least(tables)
    assert value(found) == pytest.approx(min(map(value, itertools.product(*map(range, sizes)))))


def test_of_equals_the_first_is_chosen():
    tables = [Table((0,), torch.zeros(3)), Table((0, 1), torch.zeros(3, 2))]
    assert least(tables) == [0, 0]


def test_variables_of_a_chain_are_eliminated_from_its_ends():
    chain = [(i, i + 1) for i in range(20)]
    assert max(len(others) for _, others in elimination_order(chain)) == 1
    ring = [*chain, (20, 0)]
    assert max(len(others) for _, others in elimination_order(ring)) == 2
    together = list(itertools.combinations(range(5), 2))
    assert max(len(others) for _, others in elimination_order(together)) == 4


def test_a_long_chain_is_solved_where_its_combinations_are_too_many_to_list():
    """Each variable's value is best equal to the last one's plus one: one combination of 10^40 loses nothing."""
    count, values = 40, 10
    places = torch.arange(values, dtype=torch.float64)
    apart = ((places[None] - places[:, None] - 1) % values).ne(0).double()
    tables = [Table((i, i + 1), apart) for i in range(count - 1)] + [Table((0,), (places - 3).abs())]
    assert least(tables) == [(3 + i) % values for i in range(count)]
