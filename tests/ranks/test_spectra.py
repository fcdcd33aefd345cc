import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from balf_fx.graph.parameters import weight_matrix
from balf_fx.ranks.spectra import (
    corrected_bias,
    damped,
    damped_roots,
    factors,
    spectrum_from_input,
    spectrum_from_output,
    spectrum_from_weight,
    tail_energies,
    thin_qr,
    thin_triangle,
)

SHAPES = [(1, 4, 6), (1, 7, 3), (1, 5, 5), (3, 4, 2), (2, 3, 5)]
PROPERTY = settings(max_examples=40, derandomize=True)
seeds = st.integers(0, 10_000)


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(seed, groups, outputs, inputs, positions=60):
    """W [G, O, D], b [G, O] and correlated, off-centre x [G, D, n]."""
    mixing = random(seed + 1, groups, inputs, inputs)
    x = mixing @ random(seed + 2, groups, inputs, positions) + 3 * random(seed + 3, groups, inputs, 1)
    return random(seed, groups, outputs, inputs), random(seed + 4, groups, outputs), x


def statistics(v, centred):
    """Second moment [G, F, F] and mean (None where not centred) of samples [G, F, n]."""
    mean = v.mean(-1)
    shifted = v - mean.unsqueeze(-1) if centred else v
    return shifted @ shifted.mT / v.shape[-1], mean if centred else None


def both_spectra(weight, x, centred):
    return spectrum_from_output(*statistics(weight @ x, centred)), spectrum_from_input(weight, *statistics(x, centred))


def squared_error(y, y_prime):
    return float((y - y_prime).square().sum((0, 1)).mean())


def approximation(weight, bias, x, spectrum, rank):
    a, b = factors(weight, spectrum, rank)
    return a @ (b @ x) + corrected_bias(bias, spectrum, rank).unsqueeze(-1)


def best_affine_map(z, y, centred):
    """Least-squares prediction of y from z, with an intercept where centred."""
    features = torch.cat([z, torch.ones_like(z[:, :1])], 1) if centred else z
    return (torch.linalg.lstsq(features.mT, y.mT).solution.mT) @ features


@PROPERTY
@given(seeds, st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 8)), st.floats(0, 14))
def test_a_thin_qr_is_one_whatever_the_condition(seed, shape, decades):
    weight = random(seed, *shape) * torch.logspace(0, -decades, shape[-1], dtype=torch.float64)
    basis, triangle = thin_qr(weight)
    inner = min(shape[1:])
    assert basis.shape == (*shape[:2], inner)
    assert triangle.shape == (shape[0], inner, shape[2])
    torch.testing.assert_close(basis @ triangle, weight, rtol=0, atol=1e-14 * float(weight.abs().max()) * inner)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(inner, dtype=torch.float64).expand(shape[0], -1, -1))
    assert (triangle.diagonal(dim1=-2, dim2=-1) >= 0).all()
    torch.testing.assert_close(triangle.triu(), triangle, rtol=0, atol=0)
    torch.testing.assert_close(thin_triangle(weight), triangle, rtol=0, atol=0)


@pytest.mark.parametrize("dependent", ["a column of zeros", "a repeated column"])
def test_a_thin_qr_of_dependent_columns_is_orthonormal(dependent):
    weight = random(0, 1, 12, 4)
    weight[..., 2] = 0.0 if dependent == "a column of zeros" else weight[..., 1]
    basis, triangle = thin_qr(weight)
    torch.testing.assert_close(basis @ triangle, weight)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4, dtype=torch.float64).unsqueeze(0))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_sides_equal_whiten_svd_truncate_unwhiten(shape, centred):
    weight, _, x = problem(0, *shape)
    whitener = torch.linalg.cholesky(statistics(x, centred)[0])
    u, s, vh = torch.linalg.svd(weight @ whitener, full_matrices=False)
    for spectrum in both_spectra(weight, x, centred):
        torch.testing.assert_close(spectrum.energies[:, : s.shape[-1]], s.square(), rtol=1e-9, atol=1e-9)
        for rank in range(1, s.shape[-1] + 1):
            truncated = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
            expected = torch.linalg.solve_triangular(whitener, truncated, upper=False, left=False)
            a, b = factors(weight, spectrum, rank)
            assert a.shape == (*shape[:2], rank)
            assert b.shape == (shape[0], rank, shape[2])
            torch.testing.assert_close(a @ b, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_sides_know_the_same_output_mean(shape):
    weight, _, x = problem(1, *shape)
    for spectrum in both_spectra(weight, x, centred=True):
        torch.testing.assert_close(spectrum.mean, (weight @ x).mean(-1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_on_the_samples_is_the_sum_of_dropped_energies(shape, centred):
    weight, bias, x = problem(2, *shape)
    y = weight @ x + bias.unsqueeze(-1)
    for spectrum in both_spectra(weight, x, centred):
        tail = tail_energies(spectrum.energies)
        for rank in range(len(tail)):
            error = squared_error(y, approximation(weight, bias, x, spectrum, rank))
            assert error == pytest.approx(tail[rank], rel=1e-9, abs=1e-9 * tail[0])


@PROPERTY
@given(seeds, st.sampled_from(SHAPES), st.booleans(), st.integers(1, 4), st.sampled_from([1e-3, 1e-1, 1.0]))
def test_no_perturbation_of_the_optimum_does_better(seed, shape, centred, rank, scale):
    weight, bias, x = problem(seed, *shape)
    rank = min(rank, *shape[1:])
    y = weight @ x + bias.unsqueeze(-1)
    for spectrum in both_spectra(weight, x, centred):
        a, b = factors(weight, spectrum, rank)
        best_bias = corrected_bias(bias, spectrum, rank)
        noise = [scale * random(seed + k, *t.shape) for k, t in enumerate((a, b, best_bias), start=10)]
        moved_bias = best_bias + noise[2] if centred else bias
        moved = (a + noise[0]) @ (b + noise[1]) @ x + moved_bias.unsqueeze(-1)
        assert squared_error(y, moved) >= tail_energies(spectrum.energies)[rank] * (1 - 1e-9)


@PROPERTY
@given(seeds, st.sampled_from(SHAPES), st.booleans(), st.integers(1, 4))
def test_no_other_subspace_does_better_even_with_the_best_map_out_of_it(seed, shape, centred, rank):
    weight, _, x = problem(seed, *shape)
    rank = min(rank, *shape[1:])
    y = weight @ x
    rival = squared_error(y, best_affine_map(random(seed + 10, shape[0], rank, shape[2]) @ x, y, centred))
    for spectrum in both_spectra(weight, x, centred):
        assert rival >= tail_energies(spectrum.energies)[rank] - 1e-9 * tail_energies(spectrum.energies)[0]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("degeneracy", ["few samples", "dead inputs", "low-rank weight", "constant data", "zero data"])
def test_singular_statistics_are_no_special_case(degeneracy, shape, centred):
    weight, bias, x = problem(3, *shape, positions=2 if degeneracy == "few samples" else 60)
    if degeneracy == "dead inputs":
        x[:, 1:] = 0
    elif degeneracy == "low-rank weight":
        weight = weight[..., :1] @ weight[:, :1]
    elif degeneracy == "constant data":
        x = x[..., :1].expand(-1, -1, 60)
    elif degeneracy == "zero data":
        x = torch.zeros_like(x)
    y = weight @ x + bias.unsqueeze(-1)
    for spectrum in both_spectra(weight, x, centred):
        energies, identity = spectrum.energies, torch.eye(spectrum.left.shape[-1], dtype=torch.float64)
        assert torch.isfinite(energies).all()
        assert (energies >= 0).all()
        assert (energies.diff(dim=-1) <= 0).all()
        torch.testing.assert_close(spectrum.left.mT @ spectrum.left, identity.expand(shape[0], -1, -1))
        rank = min(2 - centred if degeneracy == "few samples" else 1, *shape[1:])
        error = squared_error(y, approximation(weight, bias, x, spectrum, rank))
        assert error <= 1e-20 * (1 + float(y.square().sum()))


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_corrected_bias_leaves_no_mean_error(shape, rank):
    weight, bias, x = problem(4, *shape)
    for spectrum in both_spectra(weight, x, centred=True):
        a, b = factors(weight, spectrum, rank)
        for given_bias, offset in ((bias, bias.unsqueeze(-1)), (None, 0.0)):
            error = weight @ x + offset - a @ (b @ x) - corrected_bias(given_bias, spectrum, rank).unsqueeze(-1)
            assert error.mean(-1).abs().max() < 1e-12 * (weight @ x).abs().max()


def test_bias_stays_as_it_is_without_a_mean():
    weight, bias, x = problem(5, 2, 4, 3)
    for spectrum in (*both_spectra(weight, x, centred=False), spectrum_from_weight(weight)):
        assert corrected_bias(bias, spectrum, 1) is bias
        assert corrected_bias(None, spectrum, 1) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_spectrum_from_weight_is_the_truncated_svd(shape):
    weight = random(6, *shape)
    spectrum = spectrum_from_weight(weight)
    tail = tail_energies(spectrum.energies)
    for rank in range(1, min(shape[1:]) + 1):
        a, b = factors(weight, spectrum, rank)
        for group in range(shape[0]):
            u, s, vh = np.linalg.svd(weight[group].cpu().numpy(), full_matrices=False)
            np.testing.assert_allclose((a @ b)[group], (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-12)
        assert float((weight - a @ b).square().sum()) == pytest.approx(tail[rank], abs=1e-12)
        rival = best_affine_map(random(7, shape[0], rank, shape[2]), weight, centred=False)
        assert float((weight - rival).square().sum()) >= tail[rank] * (1 - 1e-9)


def test_spectrum_from_weight_is_the_optimum_for_white_inputs():
    weight = random(8, 2, 5, 3)
    white = spectrum_from_input(weight, torch.eye(3, dtype=torch.float64).expand(2, -1, -1), None)
    torch.testing.assert_close(spectrum_from_weight(weight).energies, white.energies)


@PROPERTY
@given(seeds, st.sampled_from(SHAPES))
def test_tail_energies_fall_from_everything_to_nothing(seed, shape):
    spectrum = spectrum_from_weight(random(seed, *shape))
    tail = tail_energies(spectrum.energies)
    expected = [sum(energy for group in spectrum.energies.tolist() for energy in group[r:]) for r in range(len(tail))]
    assert len(tail) == min(shape[1:]) + 1
    assert tail == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert tail == sorted(tail, reverse=True)
    assert tail[-1] == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_weight_matrix_times_patches_is_the_grouped_convolution(groups, dtype):
    weight = random(9, 8, 4 // groups, 2, 3).to(dtype).requires_grad_()
    x = random(10, 3, 4, 5, 6)
    matrix = weight_matrix(weight, groups)
    patches = F.unfold(x, (2, 3)).unflatten(1, (groups, -1))
    y = torch.einsum("god,bgdn->bgon", matrix, patches).reshape(3, 8, 4, 4)
    assert matrix.dtype == torch.float64
    assert not matrix.requires_grad
    torch.testing.assert_close(y, F.conv2d(x, weight.detach().double(), groups=groups))


def test_weight_matrix_of_a_linear_layer_is_its_weight():
    weight = random(11, 3, 5).float()
    assert torch.equal(weight_matrix(weight, 1), weight.double().unsqueeze(0))


def test_roots_and_maps_are_inverse_to_each_other():
    draws = torch.Generator().manual_seed(0)
    gradient, weight, x = (torch.randn(2, *s, dtype=torch.float64, generator=draws) for s in ((4, 9), (6, 4), (4, 20)))
    root, inverse = damped_roots(gradient @ gradient.mT, 0.1)
    identity = torch.eye(4, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(root @ inverse, identity)
    unit = (gradient @ gradient.mT).diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    torch.testing.assert_close(root.mT @ root, (gradient @ gradient.mT / unit + 0.1 * identity) / 1.1)
    spectrum = spectrum_from_input(weight, x @ x.mT / 20, None, (root, inverse))
    left, right = spectrum.maps(4)
    torch.testing.assert_close(right @ left, identity)
    torch.testing.assert_close(left @ (right @ weight), weight)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_root_of_a_singular_metric_is_symmetric(rank):
    gradient = random(5, 1, 4, rank)
    root, inverse = damped_roots(gradient @ gradient.mT, 0.0)
    torch.testing.assert_close(root, root.mT)
    torch.testing.assert_close(root @ inverse, torch.eye(4, dtype=torch.float64).unsqueeze(0))
    torch.testing.assert_close(root.mT @ root, damped(gradient @ gradient.mT, 0.0))


def test_the_optimum_is_that_of_the_symmetric_root():
    gradient, y = random(1, 2, 5, 9), random(2, 2, 5, 40)
    values, vectors = torch.linalg.eigh(damped(gradient @ gradient.mT, 0.1))
    root = vectors * values.sqrt().unsqueeze(-2) @ vectors.mT
    wanted = spectrum_from_output(y @ y.mT, None, (root, root.inverse()))
    found = spectrum_from_output(y @ y.mT, None, damped_roots(gradient @ gradient.mT, 0.1))
    torch.testing.assert_close(found.energies, wanted.energies)
    for rank in range(6):
        (left, right), (left_wanted, right_wanted) = found.maps(rank), wanted.maps(rank)
        torch.testing.assert_close(left @ right, left_wanted @ right_wanted)
