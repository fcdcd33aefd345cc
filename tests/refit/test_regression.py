import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refit.helpers import PROPERTY, random, seeds, spectrum

from balf_fx.distributed.group import Group
from balf_fx.graph.curves import Solution, Spectrum
from balf_fx.refit import regression
from balf_fx.refit.regression import (
    apply,
    best,
    error,
    in_metrics,
    judged_solutions,
    lowest,
    metrics_of,
    ridge,
    root_of,
    rounded,
    solution_in_metric,
    solutions,
    total_error,
    truncate,
)
from balf_fx.refit.sums import JointSums, Shares, joint


def problem(seed, groups=1, outputs=4, inputs=3, positions=50):
    """x' [G, D, n], y [G, O, n] and weights [n]."""
    x = random(seed, groups, inputs, positions) + 2
    y = random(seed + 1, groups, outputs, inputs) @ x + random(seed + 2, groups, outputs, positions) - 1
    return x, y, random(seed + 3, positions).square() + 0.1


def bias_of(seen, fitted):
    return seen.mean_y - (fitted @ seen.inputs.mean.unsqueeze(-1)).squeeze(-1)


def objective(x, y, weights, fitted, bias, right=None):
    residual = y - fitted @ x - bias.unsqueeze(-1)
    residual = residual if right is None else right @ residual
    return float((residual.square().sum((0, 1)) * weights).sum() / weights.sum())


def test_without_a_ridge_it_is_weighted_least_squares():
    x, y, weights = problem(0, groups=2)
    seen = joint(x, y, weights)
    fitted, _ = ridge(seen, torch.zeros_like(y @ x.mT), 0.0)
    ones = torch.ones(2, 1, x.shape[-1], dtype=torch.float64)
    design = (torch.cat([x, ones], 1) * weights.sqrt()).mT
    expected = torch.linalg.lstsq(design, (y * weights.sqrt()).mT).solution.mT
    torch.testing.assert_close(fitted, expected[..., :-1])
    torch.testing.assert_close(bias_of(seen, fitted), expected[..., -1])


@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_gradient_descent_arrives_at_the_ridge(strength):
    x, y, weights = problem(1)
    prior = random(7, 1, 4, 3)
    fitted, _ = ridge(joint(x, y, weights), prior, strength)
    variable, bias = prior.clone().requires_grad_(), torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    mean = (x * weights).sum(-1, keepdim=True) / weights.sum()
    variance = float((((x - mean).square() * weights).sum(-1) / weights.sum()).mean())
    optimiser = torch.optim.LBFGS([variable, bias], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        residual = (y - variable @ x - bias.unsqueeze(-1)).square().sum((0, 1))
        value = (residual * weights).sum() / weights.sum() + strength * variance * (variable - prior).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    torch.testing.assert_close(fitted, variable.detach(), rtol=1e-5, atol=1e-6)


@PROPERTY
@given(seeds, st.integers(1, 3))
def test_no_other_map_of_that_rank_does_better(seed, rank):
    x, y, weights = problem(seed)
    seen, metric = joint(x, y, weights), spectrum(seed, 4)
    full, product = ridge(seen, torch.zeros(1, 4, 3, dtype=torch.float64), 0.0)
    left, right = truncate(full, product, metric, rank, root_of(metric))
    assert left.shape == (1, 4, rank)
    assert right.shape == (1, rank, 3)
    _, metric_map = metric.maps(4)
    fitted = left @ right
    best = objective(x, y, weights, fitted, bias_of(seen, fitted), metric_map)
    for scale in (1e-3, 1e-1, 1.0):
        other = (left + scale * random(seed + 5, *left.shape)) @ (right + scale * random(seed + 6, *right.shape))
        assert best <= objective(x, y, weights, other, bias_of(seen, other), metric_map) + 1e-9


def test_at_full_rank_nothing_is_lost():
    x, y, weights = problem(3)
    full, product = ridge(joint(x, y, weights), torch.zeros(1, 4, 3, dtype=torch.float64), 0.0)
    metric = spectrum(3, 4)
    left, right = truncate(full, product, metric, 3, root_of(metric))
    torch.testing.assert_close(left @ right, full)


@PROPERTY
@given(seeds, st.integers(1, 2))
def test_errors_from_sums_differ_as_errors_from_samples(seed, groups):
    x, y, weights = problem(seed, groups=groups)
    metric = spectrum(seed, 4, groups)
    seen = joint(x, y, weights)
    left, right = random(seed + 20, groups, 4, 2), random(seed + 21, groups, 2, 3)
    solutions = [
        Solution(left, right, random(seed + 22, groups, 4)),
        Solution(None, left @ right, random(seed + 22, groups, 4)),
        Solution(None, random(seed + 23, groups, 4, 3), None),
    ]
    fitted = [left @ right, left @ right, solutions[2].right]
    biases = [solutions[0].bias, solutions[1].bias, torch.zeros(groups, 4, dtype=torch.float64)]
    for root in (None, root_of(metric)):
        direct = [objective(x, y, weights, *each, root) for each in zip(fitted, biases, strict=True)]
        summed = [error(seen.seen(root), solution_in_metric(solution, root)) for solution in solutions]
        assert summed[0] == pytest.approx(summed[1])
        assert summed[0] - summed[2] == pytest.approx(direct[0] - direct[2], rel=1e-9, abs=1e-9)


def test_an_input_that_never_varies_keeps_the_prior():
    x, y, _ = problem(5)
    prior = random(9, 1, 4, 3)
    fitted, _ = ridge(joint(torch.zeros_like(x), y, None), prior, 0.1)
    torch.testing.assert_close(fitted, prior)


def alternating(seen, metric, rank, seed, rounds=3000):
    """The map that alternating least squares arrives at: each half is solved for while the other stands still."""
    covariance, cross = seen.inputs.covariance, seen.cross()
    gram = metric.mT @ metric
    left = random(seed, *cross.shape[:2], rank)
    for _ in range(rounds):
        right = torch.linalg.solve(left.mT @ gram @ left, left.mT @ gram @ torch.linalg.solve(covariance, cross.mT).mT)
        left = torch.linalg.solve(right @ covariance @ right.mT, (cross @ right.mT).mT).mT
    return left @ right


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_alternating_least_squares_arrives_at_the_map_of_reduced_rank(rank, weighted):
    x, y, weights = problem(30)
    weights = weights if weighted else None
    seen, metric = joint(x, y, weights), spectrum(30, 4)
    _, right = metric.maps(4)
    found = truncate(*ridge(seen, torch.zeros(1, 4, 3, dtype=torch.float64), 0.0), metric, rank, right)
    weights = torch.ones(x.shape[-1], dtype=torch.float64) if weights is None else weights
    closed = found[0] @ found[1]
    closed = objective(x, y, weights, closed, bias_of(seen, closed), right)
    maps = [alternating(seen, right, rank, seed) for seed in range(2)]
    others = [objective(x, y, weights, fitted, bias_of(seen, fitted), right) for fitted in maps]
    assert min(others) == pytest.approx(closed, rel=1e-6)
    assert closed <= min(others) * (1 + 1e-9)


def problem_with_prior(seed, rank):
    """Training and held-out sums, the weight, the one-shot solution of another input, and the metric."""
    x, y, weights = problem(seed)
    shares = [joint(x[..., own], y[..., own], weights[own]) for own in (slice(0, 37), slice(37, None))]
    metric, weight = spectrum(seed, 4), random(seed + 40, 1, 4, 3)
    left, right = metric.maps(rank)
    return shares, weight, Solution(left, right @ weight, random(seed + 41, 1, 4)), metric


@PROPERTY
@given(seeds, st.integers(1, 3), st.booleans(), st.booleans())
def test_refit_never_has_more_error_than_the_prior(seed, rank, dense, plain):
    (train, held_out), weight, prior, metric = problem_with_prior(seed, rank)
    prior = (Solution(None, weight, prior.bias),) if dense else (prior,)
    spectra = (None,) if plain and dense else (metric,)
    for held in (held_out, JointSums((1, 3), (1, 4), weight.device).joint()):
        found = best(Shares(train, held), weight, prior, spectra).solution
        assert found[0].left is None or found[0].left.shape[-1] == rank
        roots = [None if each is None else root_of(each) for each in spectra]
        seen = in_metrics(Shares(train, held).whole, roots)
        errors = [total_error(seen, list(map(solution_in_metric, each, roots))) for each in (found, prior)]
        assert errors[0] <= errors[1]


@PROPERTY
@given(seeds, st.integers(1, 3))
def test_with_its_right_factor_kept_a_layer_never_does_better(seed, rank):
    x, y, weights = problem(seed)
    (train, held_out), weight, prior, metric = problem_with_prior(seed, rank)
    seen, root = Shares(train, held_out).whole, root_of(metric)
    (full,) = solutions(seen, weight, (prior,), (metric,), 0.0, (root,))
    thin = joint(prior.right @ x, y, weights)
    (up,) = solutions(thin, prior.left, (Solution(None, prior.left, prior.bias),), (metric,), 0.0, (root,))
    up = Solution(up.right, prior.right, up.bias)
    errors = [error(seen.seen(root), solution_in_metric(solution, root)) for solution in (full, up, prior)]
    assert errors[0] <= errors[1] + 1e-9
    assert errors[1] <= errors[2] + 1e-9


def test_a_solution_is_applied_part_by_part():
    x = random(80, 1, 3, 10)
    thin = Solution(random(81, 1, 4, 2), random(82, 1, 2, 3), random(83, 1, 4))
    dense = Solution(None, random(84, 1, 4, 3), None)
    expected = torch.cat([thin.left @ thin.right @ x + thin.bias.unsqueeze(-1), dense.right @ x])
    torch.testing.assert_close(apply((thin, dense), x), expected)
    torch.testing.assert_close(apply(rounded((thin, dense), torch.float32), x.float()), expected.float())


def test_a_part_without_a_bias_is_solved_without_one():
    x, y, weights = problem(3, outputs=6)
    first, second = y.chunk(2, 1)
    seen = joint(x, torch.cat([first, second]), weights)
    toward, nothing = torch.zeros(2, 3, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    prior = (Solution(None, toward[:1], nothing), Solution(None, toward[1:], None))
    biased, plain = solutions(seen, toward, prior, (None, None), 0.0, (None, None))
    root = weights.sqrt()
    ones = torch.ones(1, x.shape[-1], dtype=torch.float64)
    expected = torch.linalg.lstsq((torch.cat([x[0], ones]) * root).mT, (first[0] * root).mT).solution.mT
    torch.testing.assert_close(torch.cat([biased.right[0], biased.bias.mT], 1), expected)
    torch.testing.assert_close(plain.right[0], torch.linalg.lstsq((x[0] * root).mT, (second[0] * root).mT).solution.mT)
    assert plain.bias is None


def answers(x, fitted, noise=0.0, seed=40):
    """The sums of x and of a map's outputs for it."""
    y = fitted @ x
    return joint(x, y + noise * random(seed, *y.shape), None)


def test_the_prior_stays_where_the_held_out_share_prefers_it():
    """The training share says otherwise, and it is the larger one."""
    x, other = random(0, 1, 6, 60), random(1, 1, 6, 20)
    prior, wrong = random(2, 1, 4, 6), random(3, 1, 4, 6)
    train, held_out = answers(x, wrong), answers(other, prior)
    solution = (Solution(None, prior, torch.zeros(1, 4, dtype=torch.float64)),)
    assert best(Shares(train, held_out), wrong, solution, (None,)).solution == solution


def test_the_prior_stays_where_all_samples_prefer_it():
    """The held-out share asks for a strong pull toward a map that is wrong for the training share."""
    x, other = random(0, 1, 6, 600), random(1, 1, 6, 20)
    prior, toward = random(2, 1, 4, 6), random(3, 1, 4, 6)
    train, held_out = answers(x, prior), answers(other, toward)
    solution = (Solution(None, prior, torch.zeros(1, 4, dtype=torch.float64)),)
    assert best(Shares(train, held_out), toward, solution, (None,)).solution == solution


@PROPERTY
@given(seeds, st.integers(1, 3), st.none() | st.integers(0, 4))
def test_no_neighbour_of_the_strength_has_less_error_unless_it_is_stronger_than_allowed(seed, rank, strongest):
    (train, held_out), weight, prior, metric = problem_with_prior(seed, rank)
    strengths = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    roots = [root_of(metric)]
    fitted = [judged_solutions(train, weight, (prior,), strength, roots) for strength in strengths]
    errors = [total_error(in_metrics(held_out, roots), each) for each in fitted]
    shares = Shares(train, held_out)
    found = best(shares, weight, (prior,), (metric,), strongest)
    stop = len(errors) if strongest is None else strongest + 1
    assert errors[found.strength] == min(errors[max(found.strength - 1, 0) : min(found.strength + 2, stop)])
    assert found.strength < stop
    expected = solutions(shares.whole, weight, (prior,), (metric,), strengths[found.strength], roots)[0]
    if found.solution[0] is not prior:
        torch.testing.assert_close(found.solution[0].left, expected.left)
        torch.testing.assert_close(found.solution[0].right, expected.right)


@PROPERTY
@given(st.integers(1, 9), st.data(), st.integers(1, 4))
def test_a_descent_finds_the_minimum_with_few_values(count, data, processes):
    """Of a function that falls and then rises; several processes try neighbours at once."""
    bottom, start = (data.draw(st.integers(0, count - 1)) for _ in range(2))
    steps = data.draw(st.lists(st.floats(0.1, 2.0), min_size=count, max_size=count))
    values = [sum(steps[min(bottom, index) : max(bottom, index)]) for index in range(count)]
    asked = []

    class Several(Group):
        size = processes

    def value(index):
        asked.append(index)
        return values[index]

    assert lowest(value, count, start, Several()) == (bottom, 0.0)
    assert len(asked) == len(set(asked)) <= abs(bottom - start) + 3


def test_a_descent_leaves_what_is_not_a_number():
    assert lowest([math.nan, 2.0, math.nan, math.nan].__getitem__, 4, 2) == (1, 2.0)
    assert lowest([math.nan, 1.0, 2.0].__getitem__, 3, 2) == (1, 1.0)


@st.composite
def wide_problems(draw):
    """Sums of y = T z and of z, of the training and the held-out share, the map T, a prior and the metrics."""
    seed, groups, parts, biased = draw(seeds), draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.booleans())
    groups = 1 if parts > 1 else groups
    x = random(seed, groups, 3, 80) + 1
    z = torch.cat([x + 0.3 * random(seed + 1, groups, 3, 80), torch.ones(groups, 1, 80, dtype=torch.float64)], 1)
    through = random(seed + 2, groups * parts, 7, 4)
    through[..., -1] *= float(biased)
    weights = random(seed + 3, 80).square() + 0.1
    shares = [
        (joint(x[..., own], through @ z[..., own], weights[own]), joint(x[..., own], z[..., own], weights[own]))
        for own in (slice(0, 60), slice(60, None))
    ]
    prior, spectra = [], []
    for part in range(parts):
        own = slice(None) if parts == 1 else slice(part, part + 1)
        metric, rank = spectrum(seed + part, 7, groups), draw(st.sampled_from((None, 1, 2)))
        bias = random(seed + 5, groups, 7) if biased else None
        left, right = metric.maps(rank or 1)
        weight = through[own, :, :3]
        prior.append(Solution(None, weight, bias) if rank is None else Solution(left, right @ weight, bias))
        spectra.append(None if rank is None and draw(st.booleans()) else metric)
    return shares, through, prior, spectra


@PROPERTY
@given(wide_problems())
def test_the_regression_for_fewer_values_is_that_for_the_outputs_that_are_a_map_of_them(drawn):
    shares, through, prior, spectra = drawn
    direct = Shares(*(seen for seen, _ in shares))
    fewer = Shares(*(replace(seen, through=through) for _, seen in shares))
    same = torch.eye(4, 3, dtype=torch.float64).expand(len(shares[0][1].y), -1, -1)
    expected = best(direct, through[..., :3], prior, spectra)
    found = best(fewer, same, prior, spectra)
    assert found.strength == expected.strength
    for one, other in zip(found.solution, expected.solution, strict=True):
        assert (one.left is None, one.bias is None) == (other.left is None, other.bias is None)
        maps = [each.right if each.left is None else each.left @ each.right for each in (one, other)]
        torch.testing.assert_close(*maps, rtol=1e-7, atol=1e-9)
        if one.bias is not None:
            torch.testing.assert_close(one.bias, other.bias, rtol=1e-7, atol=1e-9)


@PROPERTY
@given(wide_problems(), st.sampled_from((1e-3, 1.0)))
def test_what_is_judged_is_the_solution_in_the_metric(drawn, strength):
    shares, through, prior, spectra = drawn
    roots = [None if each is None else root_of(each) for each in spectra]
    same = torch.eye(4, 3, dtype=torch.float64).expand(len(shares[0][1].y), -1, -1)
    for index, toward in enumerate((through[..., :3], same)):
        seen = shares[0][index] if index == 0 else replace(shares[0][index], through=through)
        metrics = metrics_of(seen, roots)
        solved = solutions(seen, toward, prior, spectra, strength, metrics)
        judged = judged_solutions(seen, toward, prior, strength, metrics)
        for one, other in zip(map(solution_in_metric, solved, roots), judged, strict=True):
            maps = [each.right if each.left is None else each.left @ each.right for each in (one, other)]
            torch.testing.assert_close(*maps, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(one.bias, other.bias, rtol=1e-7, atol=1e-9)


def test_what_is_judged_of_a_divided_kernel_is_a_solution_for_uncorrelated_strips(monkeypatch):
    monkeypatch.setattr(regression, "ROUNDS", 0)
    x, y, weights = problem(50, inputs=18, positions=200)
    seen, metric = joint(x, y, weights), spectrum(50, 4)
    bias = torch.zeros(1, 4, dtype=torch.float64)
    prior = (Solution(random(51, 1, 12, 2), random(52, 1, 2, 6), bias, form="separable", taps=(3, 3)),)
    root, toward = root_of(metric), random(53, 1, 4, 18)
    (solved,) = solutions(seen, toward, prior, (metric,), 0.1, (root,))
    (judged,) = judged_solutions(seen, toward, prior, 0.1, (root,))
    assert solved.left.shape == (1, 12, 2)
    expected = solution_in_metric(solved, root)
    torch.testing.assert_close(judged.right, expected.right)
    torch.testing.assert_close(judged.bias, expected.bias)


def test_a_metric_takes_memory_for_as_many_outputs_as_it_has_components():
    """Its square for 200,000 outputs would take 320 GB."""
    x, outputs = random(0, 1, 3, 50), 200_000
    through, prior = random(1, 1, outputs, 4), random(2, 1, outputs, 3)
    left, _ = torch.linalg.qr(through[..., :3])
    metric = Spectrum(torch.ones(1, 3, dtype=torch.float64), left, None)
    z = torch.cat([2 * x, torch.ones(1, 1, 50, dtype=torch.float64)], 1)
    seen = replace(joint(x, z, None), through=through)
    same = torch.eye(4, 3, dtype=torch.float64).unsqueeze(0)
    (found,) = best(Shares(seen, seen), same, (Solution(None, prior, prior[..., 0]),), (metric,)).solution
    torch.testing.assert_close(found.right, 2 * through[..., :3], rtol=1e-2, atol=1e-2)
