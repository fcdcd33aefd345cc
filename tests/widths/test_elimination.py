import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balf_fx.graph.widths import Width, WidthCurve, joint_widths, predict
from balf_fx.widths.elimination import conditioned, eliminate, prediction_errors


def positive(features, seed=0, samples=None):
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(features, samples or 3 * features, dtype=torch.float64, generator=draws)
    rows = torch.rand(features, 1, dtype=torch.float64, generator=draws) * rows
    return rows @ rows.mT / rows.shape[1]


def problem(features, readers, seed=0):
    """Covariances, conditioned, and metrics, some of which are singular."""
    covariances = [conditioned(positive(features, seed + i)) for i in range(readers)]
    metrics = [positive(features, seed + 100 + i, features // 2 if i else None) for i in range(readers)]
    return covariances, metrics


def lost(covariance, metric, kept):
    """tr A (C - C[:, K] C[K, K]^-1 C[K, :])."""
    left = covariance[:, kept] @ torch.linalg.inv(covariance[kept][:, kept]) @ covariance[kept]
    return float((metric * (covariance - left)).sum())


def lost_by_all(covariances, metrics, kept):
    return sum(lost(c, a, kept) for c, a in zip(covariances, metrics, strict=True))


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_elimination_takes_the_cheapest_each_time(readers, seed):
    covariances, metrics = problem(9, readers, 10 * seed)
    order, errors = eliminate(covariances, metrics)
    left = list(range(9))
    assert errors[9] == 0
    for size in reversed(range(9)):
        costs = {gone: lost_by_all(covariances, metrics, [i for i in left if i != gone]) for gone in left}
        gone = min(costs, key=costs.__getitem__)
        assert int(order[size]) == gone
        assert errors[size] == pytest.approx(costs[gone], rel=1e-8, abs=1e-12)
        left.remove(gone)


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("features", [64, 65, 150])
def test_many_features_are_no_different(features, readers):
    covariances, metrics = problem(features, readers)
    order, errors = eliminate(covariances, metrics)
    assert sorted(order.tolist()) == list(range(features))
    assert len(errors) == features + 1
    for size in range(0, features + 1, 7):
        wanted = lost_by_all(covariances, metrics, order[:size])
        assert errors[size] == pytest.approx(wanted, rel=1e-7, abs=1e-9 * errors[0])
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("block", [2, 3, 4])
def test_blocks_go_together(block, readers):
    covariances, metrics = problem(12, readers)
    before = [value.clone() for value in (*covariances, *metrics)]
    order, errors = eliminate(covariances, metrics, block)
    left = list(range(12 // block))

    def rows(numbers):
        return [block * number + own for number in sorted(numbers) for own in range(block)]

    for size in reversed(range(12 // block)):
        costs = {gone: lost_by_all(covariances, metrics, rows({*left} - {gone})) for gone in left}
        left.remove(min(costs, key=costs.__getitem__))
        assert sorted(order[: size * block].tolist()) == rows(left)
        assert errors[size * block] == pytest.approx(min(costs.values()), rel=1e-8, abs=1e-12)
        ahead, behind = errors[size * block], errors[(size + 1) * block]
        for own in range(block):
            assert errors[size * block + own] == pytest.approx(ahead + (behind - ahead) * own / block)
    assert all(torch.equal(a, b) for a, b in zip(before, (*covariances, *metrics), strict=True))


def test_delayed_removals_change_nothing(monkeypatch):
    covariances, metrics = problem(40, 2)
    order, errors = eliminate(covariances, metrics)
    for delayed in (1, 7):
        monkeypatch.setattr("balf_fx.widths.elimination._DELAYED", delayed)
        again, errors_again = eliminate(covariances, metrics)
        assert torch.equal(order, again)
        assert errors_again == pytest.approx(errors, rel=1e-9, abs=1e-12)


def test_copies_go_first():
    half = positive(6)
    covariance = conditioned(torch.cat([torch.cat([half, half]), torch.cat([half, half])], 1), 1e-8, 0)
    order, errors = eliminate([covariance], [torch.eye(12, dtype=torch.float64)])
    assert sorted((order[:6] % 6).tolist()) == list(range(6))
    assert errors[6] < 1e-6 * errors[0]
    assert errors[5] > 1e-4 * errors[0]


def test_what_nobody_minds_goes_first():
    metric = torch.diag(torch.tensor([0.0, 1, 0, 1, 1, 0], dtype=torch.float64))
    order, errors = eliminate([torch.eye(6, dtype=torch.float64)], [metric])
    assert set(order[:3].tolist()) == {1, 3, 4}
    assert errors == [3, 2, 1, 0, 0, 0, 0]


def test_elimination_leaves_its_arguments_alone():
    covariances, metrics = problem(8, 2)
    before = [value.clone() for value in (*covariances, *metrics)]
    eliminate(covariances, metrics)
    assert all(torch.equal(a, b) for a, b in zip(before, (*covariances, *metrics), strict=True))


@pytest.mark.parametrize("features", [5, 70])
def test_features_that_are_zero_can_all_go(features):
    covariance = conditioned(torch.zeros(features, features, dtype=torch.float64))
    order, errors = eliminate([covariance], [torch.eye(features, dtype=torch.float64)])
    assert sorted(order.tolist()) == list(range(features))
    assert max(errors) < 1e-9


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 1000))
def test_features_of_few_samples_go_in_some_order(features, samples, seed):
    covariance = conditioned(positive(features, seed, samples))
    metric = positive(features, seed + 1)
    order, errors = eliminate([covariance], [metric])
    assert sorted(order.tolist()) == list(range(features))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(errors))
    assert errors[0] == pytest.approx(float((covariance * metric).sum()), rel=1e-6)


def test_the_prediction_is_the_least_squares_solution():
    rows = torch.randn(200, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    kept = torch.tensor([1, 4, 6])
    solution = torch.linalg.lstsq(rows[:, kept], rows).solution.mT
    found = predict(rows.mT @ rows / 200, kept)
    torch.testing.assert_close(found, solution)
    torch.testing.assert_close(found[kept], torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [[0], [7], [2, 3, 6], [0, 1, 4, 7], list(range(8))])
def test_prediction_errors_are_what_is_measured(sizes):
    first, second = (torch.randn(50, 7, dtype=torch.float64) for _ in range(2))
    metric = positive(7)
    order = torch.randperm(7)
    covariance = conditioned(first.mT @ first / 50)
    found = prediction_errors(covariance, second.mT @ second / 50, metric, order, sizes)
    own = prediction_errors(covariance, covariance, metric, order, sizes)
    for size, one, other in zip(sizes, found, own, strict=True):
        kept = order[:size]
        error = second - second[:, kept] @ predict(covariance, kept).mT
        wanted = torch.einsum("nf,fe,ne->n", error, metric, error).mean()
        assert one == pytest.approx(float(wanted), abs=1e-9)
        assert other == pytest.approx(lost(covariance, metric, kept), abs=1e-9)


def test_what_has_no_inverse_is_not_a_number():
    indefinite = torch.diag(torch.tensor([1.0, 1, 1, 1, -0.5], dtype=torch.float64))
    _, errors = eliminate([indefinite], [torch.eye(5, dtype=torch.float64)])
    assert not math.isfinite(errors[0])


def test_conditioning_gives_every_covariance_an_inverse():
    rows = torch.randn(3, 20, dtype=torch.float64)
    for covariance in (rows.mT @ rows, torch.zeros(20, 20, dtype=torch.float64), 1e-30 * rows.mT @ rows):
        found = conditioned(covariance)
        assert torch.equal(found, found.mT)
        assert float(torch.linalg.eigvalsh(found).min()) > 0
        assert torch.isfinite(torch.linalg.inv(found)).all()


def test_conditioning_adds_a_share_of_mean_and_largest_eigenvalue():
    covariance = torch.diag(torch.tensor([9.0, 1, 1, 1], dtype=torch.float64))
    added = conditioned(covariance, 0.1, 0.01) - covariance
    torch.testing.assert_close(added, (0.1 * 3 + 0.01 * 9) * torch.eye(4, dtype=torch.float64), rtol=1e-3, atol=0)
    skew = torch.tensor([[2.0, 1], [0, 2]], dtype=torch.float64)
    assert torch.equal(conditioned(skew, 0, 0), (skew + skew.mT) / 2 + torch.finfo(torch.float64).tiny * torch.eye(2))


def test_maps_of_channels():
    covariances, metrics = problem(10, 2)
    order, errors = eliminate(covariances, metrics)
    means = (torch.randn(10), torch.randn(10))
    curve = WidthCurve(tuple(errors), 1.0, order, tuple(covariances), means=means)
    for size, reader in itertools.product((1, 4, 10), (0, 1)):
        maps = curve.maps(size, reader)
        assert maps.left.shape == (1, 10, size)
        assert maps.right.shape == (1, size, 10)
        torch.testing.assert_close(maps.right @ maps.left, torch.eye(size, dtype=torch.float64)[None])
        assert maps.kept.tolist() == sorted(order[:size].tolist())
        assert maps.mean is means[reader]
        torch.testing.assert_close(maps.left[0], predict(covariances[reader], maps.kept))
        assert torch.equal(maps.right[0] @ covariances[0], covariances[0][maps.kept])


def test_maps_of_heads():
    left = torch.randn(2, 6, 6, dtype=torch.float64)
    curve = WidthCurve((3.0, 0.0), 1.0, left=left, right=torch.linalg.inv(left))
    for size in (1, 4, 6):
        maps = curve.maps(size)
        assert maps.left.shape == (2, 6, size)
        assert maps.right.shape == (2, size, 6)
        identity = torch.eye(size, dtype=torch.float64).expand(2, -1, -1)
        torch.testing.assert_close(maps.right @ maps.left, identity)
        assert maps.kept is None
        assert maps.mean is None


def test_a_curve_needs_an_order_or_a_basis():
    with pytest.raises(ValueError, match="basis"):
        WidthCurve((1.0, 0.0), 1.0).maps(1)


def test_distortions_are_normalised_by_the_loss_of_everything():
    assert WidthCurve((4.0, 1.0, 0.0), 1.0).normalised(1.0) == 0.25
    assert WidthCurve((0.0, 0.0), 1.0).normalised(0.0) == 0.0


def width(producers, consumers):
    return Width("channels", "w", 8, tuple(map(str, producers)), tuple(map(str, consumers)))


def test_layers_are_named_once():
    assert Width("queries", "w", 8, ("qkv", "qkv")).layers == ("qkv",)
    assert width([1, 2], [2, 3]).layers == ("1", "2", "3")


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=8))
def test_widths_that_share_layers_are_grouped(layers):
    groups = joint_widths([width(own[:1], own[1:]) for own in layers])
    assert sorted(i for group in groups for i in group) == list(range(len(layers)))
    assert all(group == sorted(group) for group in groups)
    names = [{layer for i in group for layer in layers[i]} for group in groups]
    assert all(not a & b for a, b in itertools.combinations(names, 2))
    for group in groups:  # none falls apart
        reached, pending = {group[0]}, [group[0]]
        while pending:
            own = set(layers[pending.pop()])
            found = {i for i in group if i not in reached and own & set(layers[i])}
            reached |= found
            pending += found
        assert reached == set(group)


def test_an_error_of_zero_is_not_negative():
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        basis = torch.randn(3, 12, dtype=torch.float64, generator=generator)
        moment, metric = basis.mT @ basis, torch.randn(12, 12, dtype=torch.float64, generator=generator)
        covariance = moment + 1e-13 * torch.eye(12, dtype=torch.float64)
        errors = prediction_errors(covariance, moment, metric @ metric.mT, torch.arange(12), [4, 8, 11])
        assert all(0 <= error < 1e-9 * float(moment.trace()) for error in errors)


@pytest.mark.parametrize("error", [0.0, 4e-6, 1e-4])
def test_rounding_errors_of_sums_leave_a_covariance_positive_definite(error):
    """Sums over few positions in float32 have eigenvalues below zero."""
    values = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = values @ values.mT
    largest = torch.linalg.eigvalsh(covariance)[-1]
    wrong = covariance - error * largest * torch.eye(40, dtype=torch.float64)
    found = conditioned(wrong)
    eigenvalues = torch.linalg.eigvalsh(found)
    assert eigenvalues[0] > 0
    assert eigenvalues[-1] < 1.01 * largest
    order, errors = eliminate([found], [torch.eye(40, dtype=torch.float64)])
    assert sorted(order.tolist()) == list(range(40))
    assert all(math.isfinite(each) for each in errors)
