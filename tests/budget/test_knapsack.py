import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from balf_fx.budget import knapsack
from balf_fx.budget.knapsack import minimum_cost, solve, spend

PROPERTY = settings(max_examples=150, derandomize=True)


@st.composite
def instances(draw, classes=4, candidates=5):
    """Costs, values and a budget that at least the cheapest choice keeps."""
    number = st.one_of(st.integers(0, 8).map(float), st.floats(0, 8, allow_subnormal=False))
    unit = draw(st.sampled_from([1, 10**9]))
    sizes = draw(st.lists(st.integers(1, candidates), min_size=1, max_size=classes))
    costs = [[unit * draw(st.integers(0, 30)) for _ in range(size)] for size in sizes]
    values = [[draw(number) for _ in range(size)] for size in sizes]
    cheapest, dearest = sum(map(min, costs)), sum(map(max, costs))
    return costs, values, draw(st.integers(cheapest, dearest + unit))


def convex_curves(seed, classes, ranks):
    """Ranks at equal steps of cost with shrinking gains, and a dense candidate that loses nothing."""
    generator = random.Random(seed)
    costs, values = [], []
    for _ in range(classes):
        step, decay = generator.randint(1, 50) * 1000, generator.uniform(0.7, 0.99)
        energies = [decay**k for k in range(2 * ranks)]
        costs.append([step * rank for rank in range(1, ranks + 1)] + [step * (ranks + 1)])
        values.append([sum(energies[rank:]) / sum(energies) for rank in range(1, ranks + 1)] + [0.0])
    return costs, values, sum(row[-1] for row in costs) // 2


def hard_instance(seed, classes):
    """Take or leave, where value is cost plus a constant: many choices lie close to the bound."""
    generator = random.Random(seed)
    sizes = [generator.randint(50, 1000) for _ in range(classes)]
    return [[0, size] for size in sizes], [[size + 100.0, 0.0] for size in sizes], sum(sizes) // 2


def total(table, choice):
    return sum(row[index] for row, index in zip(table, choice, strict=True))


def optimum(costs, values, budget):
    choices = itertools.product(*(range(len(row)) for row in costs))
    return min(total(values, choice) for choice in choices if total(costs, choice) <= budget)


def relaxed_optimum(costs, values, budget):
    """The linear programme in which a class may mix its candidates: by strong duality, the Lagrangian dual."""
    rows = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    one_each = (rows == np.arange(len(costs))[:, None]).astype(float)
    scale = max(1, *itertools.chain(*costs))
    spent = np.concatenate(costs)[None, :] / scale
    result = linprog(np.concatenate(values), spent, [budget / scale], one_each, np.ones(len(costs)), method="highs")
    assert result.success
    return result.fun


def upgrades(costs, values, choice, left):
    """Single changes that cost more, fit and do not raise the value."""
    return [
        (row, candidate)
        for row, chosen in enumerate(choice)
        for candidate in range(len(costs[row]))
        if 0 < costs[row][candidate] - costs[row][chosen] <= left and values[row][candidate] <= values[row][chosen]
    ]


@PROPERTY
@given(instances())
def test_small_instances_are_solved_to_the_brute_force_optimum(instance):
    costs, values, budget = instance
    solution = solve(costs, values, budget)
    assert solution.cost == total(costs, solution.choice) <= budget
    assert solution.value == pytest.approx(total(values, solution.choice), abs=1e-12)
    assert solution.value == pytest.approx(optimum(costs, values, budget), abs=1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_instances_with_many_choices_near_the_bound_are_solved_to_the_optimum(seed):
    generator = random.Random(seed)
    costs = [[0, *(generator.randint(20, 60) for _ in range(3))] for _ in range(5)]
    values = [[150.0 - 2 * cost + generator.randint(0, 15) for cost in row] for row in costs]
    budget = generator.randint(80, 200)
    assert solve(costs, values, budget).value == optimum(costs, values, budget)


@PROPERTY
@given(instances())
def test_bound_is_the_dual_optimum_and_below_every_choice(instance):
    costs, values, budget = instance
    solution = solve(costs, values, budget)
    assert solution.bound == pytest.approx(relaxed_optimum(costs, values, budget), abs=1e-6)
    assert solution.bound <= optimum(costs, values, budget) + 1e-12
    assert solution.bound <= solution.value


@PROPERTY
@given(instances())
def test_nothing_that_fits_is_left_unspent(instance):
    costs, values, budget = instance
    solution = solve(costs, values, budget)
    assert upgrades(costs, values, solution.choice, budget - solution.cost) == []


@PROPERTY
@given(instances(), st.data())
def test_spend_only_improves_and_leaves_no_upgrade(instance, data):
    costs, values, _ = instance
    start = [data.draw(st.integers(0, len(row) - 1)) for row in costs]
    budget = total(costs, start) + data.draw(st.integers(0, 60))
    choice = spend(costs, values, start, budget)
    assert total(costs, start) <= total(costs, choice) <= budget
    assert all(row[new] <= row[old] for row, old, new in zip(values, start, choice, strict=True))
    assert upgrades(costs, values, choice, budget - total(costs, choice)) == []


def test_spend_prefers_the_best_gain_per_cost():
    costs, values = [[0, 2, 4], [0, 1]], [[9.0, 5.0, 4.0], [3.0, 0.0]]
    assert spend(costs, values, [0, 0], 2) == [0, 1]
    assert spend(costs, values, [0, 0], 3) == [1, 1]
    assert spend(costs, values, [0, 0], 5) == [2, 1]


def test_equal_values_go_to_the_costliest_candidate_that_fits():
    costs, values = [[1, 2, 3], [1, 5]], [[0.0, 0.0, 0.0], [1.0, 1.0]]
    assert solve(costs, values, 9).choice == (2, 1)
    assert solve(costs, values, 5).choice == (2, 0)
    assert solve(costs, values, 3).choice == (1, 0)


def test_what_the_exact_step_leaves_over_is_spent_too():
    costs, values = [[0, 12], [0, 10], [0, 10], [1, 2]], [[13.2, 0.0], [10.0, 0.0], [10.0, 0.0], [0.0, 0.0]]
    assert solve(costs, values, 21).choice == (0, 1, 1, 0)
    assert solve(costs, values, 22).choice == (0, 1, 1, 1)


def test_greedy_is_not_enough_and_the_exact_step_finds_the_optimum():
    costs, values = [[0, 6], [0, 5], [0, 5]], [[6.6, 0.0], [5.0, 0.0], [5.0, 0.0]]
    solution = solve(costs, values, 10)
    assert total(values, spend(costs, values, [0, 0, 0], 10)) == 10.0
    assert (solution.choice, solution.value) == ((0, 1, 1), 6.6)
    assert solution.bound == pytest.approx(6.0)  # 6 of the 6.6, and 4/5 of a 5


@PROPERTY
@given(instances(), st.integers(1, 10))
def test_an_unreachable_budget_is_refused(instance, short):
    costs, values, _ = instance
    assert minimum_cost(costs) == sum(map(min, costs))
    with pytest.raises(ValueError, match=f"cheapest choice costs {minimum_cost(costs)}"):
        solve(costs, values, minimum_cost(costs) - short)
    assert solve(costs, values, minimum_cost(costs)).cost == minimum_cost(costs)


@PROPERTY
@given(instances())
def test_a_budget_for_everything_buys_the_least_value_and_proves_it(instance):
    costs, values, _ = instance
    solution = solve(costs, values, sum(map(max, costs)))
    assert solution.value == pytest.approx(sum(map(min, values)), abs=1e-12)
    assert solution.bound == pytest.approx(solution.value, abs=1e-12)


@pytest.mark.parametrize("seed", [0, 3, 4, 5])
def test_a_front_cut_short_stays_feasible_with_a_valid_bound_and_beats_greedy(seed, monkeypatch):
    costs, values, budget = hard_instance(seed, classes=12)
    best, greedy = optimum(costs, values, budget), total(values, spend(costs, values, [0] * 12, budget))
    assert solve(costs, values, budget).value == pytest.approx(best)
    monkeypatch.setattr(knapsack, "_FRONT_LIMIT", 16)
    cut = solve(costs, values, budget)
    assert best < cut.value < greedy  # the limit was felt
    assert cut.cost == total(costs, cut.choice) <= budget
    assert cut.bound <= best
    assert upgrades(costs, values, cut.choice, budget - cut.cost) == []


def points(size):
    """Costs and values, with ties."""
    return st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9).map(float)), min_size=1, max_size=size)


@PROPERTY
@given(points(8), points(8), st.integers(1, 5), st.integers(1, 4), st.integers(0, 18))
def test_states_made_in_pieces_have_the_front_of_all_of_them(front, row, piece, bins, most):
    both = [(one + other, value + more) for one, value in front for other, more in row]
    fitting = [(cost, value, number) for number, (cost, value) in enumerate(both) if cost <= most]
    best = []
    for one in sorted(fitting):  # of equal ones, the first
        best += [one] if not best or one[1] < best[-1][1] else []
    tables = [
        (torch.tensor([cost for cost, _ in each]), torch.tensor([value for _, value in each], dtype=torch.float64))
        for each in (front, row)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_PIECE", piece)
        patch.setattr(knapsack, "_BINS", bins)
        state, cost, value = knapsack._extended(*tables, lambda cost, _: cost <= most)
        own = knapsack._efficient(cost, value)
    assert state.tolist() == sorted(state.tolist())
    assert list(zip(cost[own].tolist(), value[own].tolist(), state[own].tolist(), strict=True)) == best


@pytest.mark.parametrize("seed", range(3))
def test_convex_curves_of_many_ranks_leave_almost_no_gap(seed):
    costs, values, budget = convex_curves(seed, classes=12, ranks=40)
    solution = solve(costs, values, budget)
    assert solution.cost <= budget
    assert solution.bound == pytest.approx(relaxed_optimum(costs, values, budget), abs=1e-6)
    assert 0 <= solution.value - solution.bound <= 1e-3 * max(solution.value, solution.bound)


def test_two_solutions_of_one_instance_are_equal():
    costs, values, budget = convex_curves(7, classes=10, ranks=25)
    assert solve(costs, values, budget) == solve([*map(tuple, costs)], [*map(tuple, values)], budget)


def test_classes_without_a_choice_and_no_classes_at_all():
    assert solve([[3], [4]], [[1.0], [2.0]], 7).choice == (0, 0)
    empty = solve([], [], 0)
    assert (empty.choice, empty.cost, empty.value, empty.bound) == ((), 0, 0, 0)
