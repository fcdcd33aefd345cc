"""Divided kernels against convolutions of both factors, and against the best ones where these are known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from balf_fx.graph.curves import Solution
from balf_fx.ranks.divided import (
    Patches,
    by_column,
    by_patch,
    divided_factors,
    kernels_of,
    moment_of_strips,
    strips_of,
    strips_spectrum,
    whole,
)

TAPS = st.sampled_from([(3, 3), (3, 5), (2, 3), (5, 2), (1, 9), (1, 6)])


def factors(weight, moment, metric, rank, taps, *rounds):
    nothing = torch.zeros_like(moment[:, :1])
    patches = Patches(moment, 1.0, nothing[:, 0], nothing[..., :1], taps)
    return divided_factors(weight, weight @ moment, patches, metric, rank, *rounds)


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(size, seed=0):
    root = randn(size, 2 * size, seed=seed)
    return (root @ root.mT / size)[None]


def error(weight, other, moment):
    return float(((weight - other) @ moment @ (weight - other).mT).diagonal(dim1=-2, dim2=-1).sum())


@settings(max_examples=20, derandomize=True)
@given(TAPS, st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_kernels_and_matrices_are_the_same_numbers(taps, channels, outputs, seed):
    weight = randn(1, outputs, channels * taps[0] * taps[1], seed=seed)
    matrix = strips_of(weight, taps)
    assert matrix.shape == (1, outputs * taps[1], channels * taps[0])
    assert torch.equal(kernels_of(matrix, taps), weight)
    assert torch.equal(by_column(by_patch(matrix, outputs), taps[1]), matrix)


@pytest.mark.parametrize("taps", [(3, 3), (3, 5), (2, 3)])
def test_two_convolutions_compute_what_one_with_the_whole_kernel_does(taps):
    (h, w), (outputs, channels, rank) = taps, (5, 4, 3)
    left, right, x = randn(1, outputs * w, rank), randn(1, rank, channels * h, seed=1), randn(2, channels, 9, 8, seed=2)
    kernel = whole(Solution(left, right, None, form="separable", taps=taps)).right.reshape(outputs, channels, h, w)
    thin = F.conv2d(x, right.reshape(rank, channels, h, 1), stride=(2, 1), padding=(1, 0))
    found = F.conv2d(thin, left.reshape(outputs, w, rank).transpose(1, 2).unsqueeze(2), padding=(0, 2))
    torch.testing.assert_close(found, F.conv2d(x, kernel, stride=(2, 1), padding=(1, 2)))


def test_a_pointwise_convolution_may_come_first():
    outputs, channels, rank, taps = 5, 4, 3, (1, 9)
    left, right, x = randn(1, outputs * 9, rank), randn(1, rank, channels, seed=1), randn(2, channels, 9, 8, seed=2)
    kernel = whole(Solution(left, right, None, form="pointwise_first", taps=taps)).right
    thin = F.conv2d(x, right.reshape(rank, channels, 1, 1))
    found = F.conv2d(thin, left.reshape(outputs, 9, rank).transpose(1, 2).unflatten(2, (3, 3)), padding=1)
    torch.testing.assert_close(found, F.conv2d(x, kernel.reshape(outputs, channels, 3, 3), padding=1))


def test_other_solutions_stay_as_they_are():
    pair = Solution(randn(1, 3, 2), randn(1, 2, 4), None)
    assert whole(pair) is pair


def test_at_full_rank_nothing_is_lost():
    taps, weight, moment = (3, 3), randn(1, 4, 18), positive(18)
    left, right = factors(weight, moment, torch.eye(4).double()[None], 6, taps)
    torch.testing.assert_close(kernels_of(left @ right, taps), weight)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_for_uncorrelated_strips_no_rank_r_map_is_better(rank):
    taps, (outputs, channels) = (3, 2), (5, 3)
    weight, strip = randn(1, outputs, channels * 6), positive(channels * 3)
    columns = strip.reshape(channels, 3, channels, 3)
    moment = torch.einsum("aibk,jl->aijbkl", columns, torch.eye(2).double()).reshape(1, channels * 6, channels * 6)
    torch.testing.assert_close(moment_of_strips(moment, taps), strip)
    left, right = factors(weight, moment, torch.eye(outputs).double()[None], rank, taps)
    dropped = torch.linalg.svdvals(strips_of(weight, taps)[0] @ torch.linalg.cholesky(strip[0]))[rank:]
    assert error(weight, kernels_of(left @ right, taps), moment) == pytest.approx(float(dropped.square().sum()))


def test_the_second_factor_is_the_best_for_patches_of_any_moment():
    taps, weight, moment = (3, 3), randn(1, 4, 27), positive(27, seed=3)
    left, right = factors(weight, moment, torch.eye(4).double()[None], 4, taps)
    least = error(weight, kernels_of(left @ right, taps), moment)
    for seed in range(20):
        other = left + 0.01 * randn(*left.shape, seed=seed)
        assert error(weight, kernels_of(other @ right, taps), moment) > least


@pytest.mark.parametrize("taps", [(3, 3), (1, 9)])
@pytest.mark.parametrize("seed", range(5))
def test_least_squares_in_turn_come_nearer_to_the_best_map(taps, seed):
    weight, pixels = randn(1, 4, 5 * 9, seed=seed), torch.arange(9.0).double()
    near = torch.exp(-(pixels[:, None] - pixels).abs() / 5)  # neighbours are alike
    moment = torch.kron(positive(5, seed=seed + 10)[0], near)[None]
    metric = torch.diag(torch.tensor([3.0, 1.0, 1.0, 0.3]).double())[None]

    def lost(rounds):
        left, right = factors(weight, moment, metric, 3, taps, rounds)
        return error(metric @ weight, metric @ kernels_of(left @ right, taps), moment)

    first, once, often = lost(0), lost(1), lost(200)
    assert often < once < first

    pair = [part.clone().requires_grad_() for part in factors(weight, moment, metric, 3, taps)]
    optimizer = torch.optim.LBFGS(pair, max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def descend():
        optimizer.zero_grad()
        missed = metric @ (weight - kernels_of(pair[0] @ pair[1], taps))
        loss = (missed @ moment * missed).sum()
        loss.backward()
        return loss

    optimizer.step(descend)
    assert often == pytest.approx(float(descend()), rel=1e-3)


@pytest.mark.parametrize("taps", [(3, 3), (1, 9)])
def test_the_moment_of_patches_is_not_formed(taps):
    products, mean, added = 5 * positive(27), randn(1, 27, seed=1), torch.full((1, 1, 1), 0.3).double()
    patches = Patches(products, 5.0, mean, added, taps)
    moment = products / 5 - mean.mT @ mean + added * torch.eye(27).double()
    right, rows = randn(1, 2, 3 * taps[0], seed=2), randn(4, 27, seed=3)
    torch.testing.assert_close(patches.strips(), moment_of_strips(moment, taps))
    torch.testing.assert_close(patches.after(rows), rows @ moment[0])
    strips = moment.reshape(1, 3 * taps[0], taps[1], 27).movedim(2, 1)
    torch.testing.assert_close(patches.read(right), (right.unsqueeze(1) @ strips).flatten(1, 2))


def test_the_metric_decides_which_outputs_matter():
    taps, weight, moment = (3, 3), randn(1, 4, 18), torch.eye(18).double()[None]
    metric = torch.diag(torch.tensor([100.0, 100.0, 0.01, 0.01]).double())[None]
    left, right = factors(weight, moment, metric, 3, taps)
    plain = factors(weight, moment, torch.eye(4).double()[None], 3, taps)
    weighted, other = ((metric @ (weight - kernels_of(a @ b, taps))).square().sum() for a, b in ((left, right), plain))
    assert weighted < other


@pytest.mark.parametrize("taps", [(3, 3), (1, 9)])
def test_energies_are_what_each_rank_loses_of_uncorrelated_strips(taps):
    (outputs, channels), metric = (4, 3), positive(4, seed=1)
    matrix, moment = randn(1, outputs * taps[1], channels * taps[0], seed=2), positive(channels * taps[0], seed=3)
    found = strips_spectrum(matrix, moment, None, taps[1], metric, None)
    weights = torch.kron(metric[0], torch.eye(taps[1]).double())
    singular = torch.linalg.svdvals(torch.linalg.cholesky(weights).mT @ matrix[0] @ torch.linalg.cholesky(moment[0]))
    torch.testing.assert_close(found.energies[0, : len(singular)], singular.square())
    for rank in range(1, channels * taps[0]):
        left, right = found.maps(rank)
        missed = (matrix - matrix @ left @ right)[0]
        lost = (missed @ moment[0] @ missed.mT * weights).sum()
        torch.testing.assert_close(lost, singular[rank:].square().sum())


def test_energies_may_be_measured_in_another_metric():
    matrix, moment = randn(1, 4 * 9, 3), positive(3)
    plain, energy_metric = torch.eye(4).double()[None], positive(4, seed=1)
    found = strips_spectrum(matrix, moment, None, 9, plain, energy_metric)
    left, right = found.maps(1)
    missed = (matrix - matrix @ left @ right)[0]
    lost = (missed @ moment[0] @ missed.mT * torch.kron(energy_metric[0], torch.eye(9).double())).sum()
    assert 0.5 * float(lost) < float(found.energies[0, 1:].sum()) < 1.001 * float(lost)  # what is convex is below


def test_channels_that_never_vary_take_no_rank():
    matrix, moment = randn(1, 2 * 9, 4), torch.block_diag(positive(2)[0], torch.zeros(2, 2).double())[None]
    found = strips_spectrum(matrix, moment, None, 9, None, None)
    left, right = found.maps(2)
    torch.testing.assert_close((matrix @ left @ right)[..., :2], matrix[..., :2])
    assert float(found.energies[0, 2:].abs().max()) < 1e-12
