"""Separable convolutions against convolutions of both factors, and against the best ones where these are known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from balf_fx.graph.curves import Solution
from balf_fx.ranks.separable import (
    by_column,
    by_patch,
    kernels_of,
    moment_of_strips,
    over_taps,
    separated,
    strips_of,
    whole,
)

TAPS = st.sampled_from([(3, 3), (3, 5), (2, 3), (5, 2)])


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(size, seed=0):
    root = randn(size, 2 * size, seed=seed)
    return root @ root.mT / size


def error(weight, other, moment):
    return float(((weight - other) @ moment @ (weight - other).mT).diagonal(dim1=-2, dim2=-1).sum())


@settings(deadline=None, max_examples=20, derandomize=True)
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


def test_other_solutions_stay_as_they_are():
    pair = Solution(randn(1, 3, 2), randn(1, 2, 4), None)
    assert whole(pair) is pair


def test_at_full_rank_nothing_is_lost():
    taps, weight, moment = (3, 3), randn(1, 4, 18), positive(18)
    left, right = separated(weight, weight @ moment, moment, torch.eye(4).double()[None], 6, taps)
    torch.testing.assert_close(kernels_of(left @ right, taps), weight)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_for_uncorrelated_strips_no_rank_r_map_is_better(rank):
    taps, (outputs, channels) = (3, 2), (5, 3)
    weight, strip = randn(1, outputs, channels * 6), positive(channels * 3)
    columns = strip.reshape(channels, 3, channels, 3)
    moment = torch.einsum("aibk,jl->aijbkl", columns, torch.eye(2).double()).reshape(channels * 6, channels * 6)
    torch.testing.assert_close(moment_of_strips(moment, taps)[0], strip)
    left, right = separated(weight, weight @ moment, moment, torch.eye(outputs).double()[None], rank, taps)
    dropped = torch.linalg.svdvals(strips_of(weight, taps)[0] @ torch.linalg.cholesky(strip))[rank:]
    assert error(weight, kernels_of(left @ right, taps), moment) == pytest.approx(float(dropped.square().sum()))


def test_the_second_factor_is_the_best_for_patches_of_any_moment():
    taps, weight, moment = (3, 3), randn(1, 4, 27), positive(27, seed=3)
    left, right = separated(weight, weight @ moment, moment, torch.eye(4).double()[None], 4, taps)
    least = error(weight, kernels_of(left @ right, taps), moment)
    for seed in range(20):
        other = left + 0.01 * randn(*left.shape, seed=seed)
        assert error(weight, kernels_of(other @ right, taps), moment) > least


def test_the_metric_decides_which_outputs_matter():
    taps, weight, moment = (3, 3), randn(1, 4, 18), torch.eye(18).double()
    metric = torch.diag(torch.tensor([100.0, 100.0, 0.01, 0.01]).double())[None]
    left, right = separated(weight, weight @ moment, moment, metric, 3, taps)
    plain = separated(weight, weight, moment, torch.eye(4).double()[None], 3, taps)
    weighted, other = ((metric @ (weight - kernels_of(a @ b, taps))).square().sum() for a, b in ((left, right), plain))
    assert weighted < other


def test_a_map_of_outputs_is_repeated_for_each_column():
    matrix, kernel = randn(1, 3, 3), randn(1, 3, 12, seed=1)
    torch.testing.assert_close(over_taps(matrix, 2) @ strips_of(kernel, (2, 2)), strips_of(matrix @ kernel, (2, 2)))
