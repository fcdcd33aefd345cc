import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balf_fx.calibration.sample import WeightGradients
from balf_fx.ranks.influence import cholesky_root, error_weights, influence, refined_factors, sweep

PROPERTY = settings(max_examples=60, derandomize=True)


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(seed, groups=1, outputs=9, inputs=7, rank=4):
    """A matrix, weights with outliers, and its truncated SVD."""
    target = random(seed, groups, outputs, inputs)
    weights = 1 + 2 * random(seed + 1, groups, outputs, inputs).pow(4).clamp_max(100)
    u, s, vh = torch.linalg.svd(target, full_matrices=False)
    return target, weights, u[..., :rank], s[..., :rank, None] * vh[..., :rank, :]


def weighted_error(target, weights, left, right):
    return float((weights * (target - left @ right).square()).sum())


def published_sweep(target, weights, left, right):
    """One component at a time, as the paper writes it, for a single matrix."""
    v = right / torch.linalg.vector_norm(right, dim=1, keepdim=True)
    s = torch.linalg.vector_norm(right, dim=1)
    u = left.clone()
    for r in reversed(range(len(s))):
        others = [j for j in range(len(s)) if j != r]
        weighted = weights * (target - u[:, others] * s[others] @ v[others])
        row = (u[:, r] @ weighted) / (s[r] * (u[:, r] ** 2 @ weights))
        column = (weighted @ row) / (weights @ row**2)
        s[r] = column.norm() * row.norm()
        u[:, r], v[r] = column / column.norm(), row / row.norm()
    return u * s @ v


@pytest.mark.parametrize("shape", [(9, 7, 4), (5, 12, 5), (6, 6, 1)])
def test_one_component_at_a_time_is_the_published_sweep(shape):
    outputs, inputs, rank = shape
    target, weights, left, right = problem(0, 1, outputs, inputs, rank)
    expected = published_sweep(target[0], weights[0], left[0], right[0])
    got, others = sweep(target, weights, left, right, block=1)
    torch.testing.assert_close(got[0] @ others[0], expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(torch.linalg.vector_norm(got, dim=-2), torch.ones(1, rank, dtype=torch.float64))


@PROPERTY
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 3),
    outputs=st.integers(1, 10),
    inputs=st.integers(1, 10),
    rank=st.integers(1, 6),
    block=st.integers(1, 8),
    start=st.sampled_from(["svd", "anything", "zero", "equal components"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_the_weighted_error_never_rises(seed, groups, outputs, inputs, rank, block, start, dtype):
    target, weights, left, right = problem(seed, groups, outputs, inputs, min(rank, outputs, inputs))
    if start == "anything":
        left, right = random(seed + 2, *left.shape), random(seed + 3, *right.shape)
    elif start == "zero":
        left, right = torch.zeros_like(left), torch.zeros_like(right)
    elif start == "equal components":
        left, right = left[..., :1].expand_as(left), right[..., :1, :].expand_as(right)
    given_ = [value.to(dtype) for value in (target, weights, left, right)]
    before = weighted_error(target, weights, left, right)
    tolerance = (1e-12 if dtype is torch.float64 else 1e-5) * weighted_error(target, weights, 0 * left, right)
    for _ in range(3):
        given_[2:] = sweep(*given_, block)
        after = weighted_error(target, weights, given_[2].double(), given_[3].double())
        assert after <= before + tolerance
        before = after


def test_weights_that_differ_leave_something_to_gain_and_equal_ones_nothing():
    target, weights, left, right = problem(3, 2, 20, 16, 5)
    for block in (1, 4, 16):
        refined = sweep(target, weights, left, right, block)
        assert weighted_error(target, weights, *refined) < 0.9 * weighted_error(target, weights, left, right)
        a, b = sweep(target, torch.full_like(weights, 3.0), left, right, block)
        torch.testing.assert_close(a @ b, left @ right)


def test_a_matrix_of_the_rank_is_kept_whatever_the_weights():
    target, weights, left, right = problem(4, 1, 12, 9, 3)
    a, b = sweep(left @ right, weights, left, right, block=2)
    torch.testing.assert_close(a @ b, left @ right)
    assert not torch.equal(target, left @ right)


def test_groups_are_solved_as_if_alone_and_nothing_is_changed():
    given_ = problem(5, 3, 8, 10, 4)
    before = [value.clone() for value in given_]
    left, right = sweep(*given_, block=3)
    for group in range(3):
        alone = sweep(*(value[group : group + 1] for value in given_), block=3)
        torch.testing.assert_close(left[group : group + 1] @ right[group : group + 1], alone[0] @ alone[1])
    assert all(torch.equal(a, b) for a, b in zip(given_, before, strict=True))


def test_large_matrices_go_slice_by_slice(monkeypatch):
    given_ = problem(6, 2, 30, 20, 6)
    whole = sweep(*given_, block=4)
    monkeypatch.setattr("balf_fx.ranks.influence._SLICE_ELEMENTS", 64)
    for a, b in zip(sweep(*given_, block=4), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_influence_has_a_mean_of_one_before_it_is_cut_off():
    raw = random(0, 2, 20, 30).abs()
    raw[1, 0, 0] = 1e6
    weights = error_weights(raw, delta=2.0, limit=100.0)
    assert float(weights[0].mean()) == pytest.approx(3.0)
    assert float(weights[1].max()) == 201.0
    scaled = raw[1] / raw[1].mean()
    torch.testing.assert_close(weights[1], 1 + 2 * scaled.clamp_max(100))
    assert torch.equal(error_weights(0 * raw, 2.0, 100.0), torch.ones_like(raw))
    assert torch.equal(error_weights(raw, 0.0, 100.0), torch.ones_like(raw))


def test_signals():
    weight, gradients = random(0, 1, 4, 5), random(1, 3, 1, 4, 5)
    seen = WeightGradients(gradients.abs().sum(0).float(), gradients.square().sum(0).float())
    by_weight = (gradients * weight).abs().sum(0)
    torch.testing.assert_close(influence(seen, weight, "weight_gradient"), by_weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(influence(seen, weight, "fisher"), gradients.square().sum(0), rtol=1e-5, atol=1e-6)


def svd_llm(weight, x, rank):
    """Activation-aware truncation with a Cholesky factor, straight from its definition."""
    root = np.linalg.cholesky(x @ x.T / x.shape[1])
    u, s, vh = np.linalg.svd(weight @ root, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank] @ np.linalg.inv(root), u[:, :rank]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_influence_it_is_activation_aware_truncation(dtype):
    weight, x = random(0, 8, 6), random(1, 6, 50)
    expected, u = svd_llm(weight.cpu().numpy(), x.cpu().numpy(), 3)
    root = cholesky_root((x @ x.mT / 50)[None], damping=1e-14)
    weights = error_weights(random(2, 1, 8, 6).abs(), 0.0, 100.0)
    left, right = refined_factors(weight[None], root, weights, torch.from_numpy(u)[None], 2, 2, dtype)
    tolerance = 1e-9 if dtype is torch.float64 else 1e-4
    np.testing.assert_allclose((left @ right)[0].cpu().numpy(), expected, atol=tolerance)
    assert left.dtype == right.dtype == torch.float64


def test_the_root_is_lower_triangular_and_keeps_columns_aligned():
    x = random(0, 2, 5, 40)
    moment = x @ x.mT / 40
    root = cholesky_root(moment, damping=1e-12)
    torch.testing.assert_close(root @ root.mT, moment, rtol=1e-9, atol=1e-9)
    assert torch.equal(root, root.tril())


@pytest.mark.parametrize(
    "x",
    [torch.zeros(1, 6, 4), torch.ones(1, 6, 4), 1e15 * random(0, 1, 6, 2), 1e-15 * random(0, 2, 6, 2)],
    ids=["nothing", "constant", "large, few samples", "small, few samples"],
)
def test_singular_inputs_give_a_root_and_finite_factors(x):
    x = x.double()
    moment = x @ x.mT / x.shape[-1]
    root = cholesky_root(moment, damping=1e-18)  # below what rounding allows
    assert torch.isfinite(root).all()
    assert (root.diagonal(dim1=-2, dim2=-1) > 0).all()
    root = cholesky_root(moment, damping=1e-6)
    weight = random(1, len(x), 5, 6)
    weights = error_weights(random(2, len(x), 5, 6).abs(), 2.0, 100.0)
    start = torch.linalg.svd(weight @ root)[0][..., :3]
    left, right = refined_factors(weight, root, weights, start, 1, 2, torch.float32)
    assert torch.isfinite(left).all()
    lost = (weight - left @ right) @ x
    assert lost.norm() <= 1e-2 * (weight @ x).norm()  # three components hold all that such inputs carry
