"""Which weight each position of a value has."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balf_fx.calibration.batches import Calibration, checked_weights
from balf_fx.calibration.gradients import probe
from balf_fx.calibration.weights import Weights, counted, read_mask
from balf_fx.errors import CalibrationError

MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]])  # [N, L] = [4, 3]
SAMPLES = torch.tensor([0.0, 2.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("leading", "expected"),
    [
        ((4, 3), lambda w: w),
        ((4, 3, 2), lambda w: w[..., None].expand(4, 3, 2)),
        ((4, 5, 3), lambda w: w[:, None].expand(4, 5, 3)),
        ((4, 5, 3, 2), lambda w: w[:, None, :, None].expand(4, 5, 3, 2)),
        ((12,), lambda w: w),
        ((12, 2), lambda w: w.flatten()[:, None].expand(12, 2)),
        ((3, 4), lambda w: w.mT),
        ((3, 4, 2), lambda w: w.mT[..., None].expand(3, 4, 2)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_a_mask_applies_to_the_values_with_its_positions(leading, expected):
    weights = Weights(MASK.double())
    found = weights.at(leading)
    assert weights.fits
    assert torch.equal(found, expected(MASK.double()).flatten())


def test_the_weights_of_pixels_apply_to_images_and_to_sequences_of_pixels():
    weights = torch.rand(2, 3, 4).double()
    for leading in ((2, 3, 4), (2, 12), (24,)):
        assert torch.equal(Weights(weights).at(leading), weights.flatten())
    assert torch.equal(Weights(weights).at((2, 5, 3, 4)), weights[:, None].expand(2, 5, 3, 4).flatten())


@pytest.mark.parametrize("leading", [(4,), (4, 7), (4, 7, 2), (8, 5)])
def test_the_weights_of_samples_apply_to_all_positions_of_a_sample(leading):
    weights = Weights(SAMPLES)
    expected = SAMPLES.double().repeat_interleave(math.prod(leading) // 4)
    assert torch.equal(weights.at(leading), expected)
    assert weights.fits


def test_a_value_of_other_positions_has_the_largest_weight_of_each_sample():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    weights = Weights(mask)
    assert torch.equal(weights.at((2, 5)), torch.tensor([1.0] * 5 + [0.0] * 5, dtype=torch.float64))
    assert Weights(MASK).at((4, 7)) is None  # each sample has a position that counts
    assert not weights.fits


@pytest.mark.parametrize("leading", [(), (5,), (7, 3), (2, 6), (6, 2), (4, 0)], ids=str)
def test_everything_counts_in_a_value_that_has_neither_positions_nor_samples(leading):
    assert Weights(MASK).at(leading) is None


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.lists(st.integers(1, 4), max_size=4))
def test_there_is_a_weight_for_each_position_or_none(sizes, more):
    weights = torch.rand(sizes).double() + 2
    for leading in (more, [sizes[0], *more]):
        found = Weights(weights).at(leading)
        assert found is None or len(found) == math.prod(leading)
    for leading in ([*sizes, *more], [math.prod(sizes), *more]):
        found = Weights(weights).at(leading).reshape(weights.numel(), -1)
        assert torch.equal(found, weights.flatten()[:, None].expand_as(found))


def test_the_first_that_fits_is_taken():
    other = torch.ones(4, 5)
    other[0, 0] = 0
    weights = Weights(other, MASK)
    assert torch.equal(weights.at((4, 3)), MASK.double().flatten())
    assert torch.equal(weights.at((4, 5)), other.double().flatten())


def test_ones_are_no_weights():
    assert Weights(torch.ones(4, 3)).at((4, 3)) is None
    assert Weights(torch.ones(4, dtype=torch.bool)).at((4, 3)) is None
    assert Weights().at((4, 3)) is None


def test_masks_are_of_two_dimensions_and_hold_what_counts():
    assert torch.equal(read_mask(MASK), MASK.double())
    assert torch.equal(read_mask(MASK > 0), MASK.double())
    assert torch.equal(read_mask(MASK.half()), MASK.double())
    assert torch.equal(read_mask(2 * MASK), MASK.double())  # 2 is global attention
    assert not read_mask(torch.zeros_like(MASK)).any()
    additive = torch.zeros(4, 3).masked_fill(MASK == 0, -torch.inf)
    for other in (None, 1, MASK[0], MASK[:, None, None], additive, torch.zeros(4, 3), MASK.cfloat(), "mask"):
        assert read_mask(other) is None


def test_what_does_not_count_is_not_read():
    values = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [3.0, 4.0]])
    (rows,), weights = counted((values,), torch.tensor([1.0, 0.0, 2.0]), rows=True)
    assert torch.equal(rows, values[[0, 2]])
    assert torch.equal(weights, torch.tensor([1.0, 2.0]))
    (whole,), weights = counted((values,), None)
    assert whole is values
    assert weights is None


@pytest.mark.parametrize("tokens", [True, False], ids=["logits", "features"])
def test_the_probe_of_a_padded_output_is_that_of_the_output_without_it(tokens):
    plain = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(4, 3 if tokens else 1, dtype=torch.long)
    (expected,) = torch.autograd.grad(probe(plain, ids, torch.Generator().manual_seed(0)), plain)
    padded = torch.cat([torch.full((4, 2, 5), torch.nan), plain.detach()], 1).requires_grad_()
    mask = torch.tensor([0.0, 0, 1, 1, 1]).expand(4, 5)
    ids = torch.zeros(4, 5 if tokens else 1, dtype=torch.long)
    scalar = probe(padded, ids, torch.Generator().manual_seed(0), Weights(mask))
    (found,) = torch.autograd.grad(scalar, padded)
    assert not found[:, :2].any()
    torch.testing.assert_close(found[:, 2:], expected, rtol=1e-6, atol=0)


def test_the_weights_of_a_probe_are_those_of_its_second_moment():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([4.0, 0.0, 0.25])
    plain, weighted = (
        torch.autograd.grad(probe(logits[rows], None, torch.Generator().manual_seed(0), given), logits)[0]
        for rows, given in (([0, 2], None), ([0, 1, 2], Weights(weights)))
    )
    torch.testing.assert_close(weighted, plain * weights.sqrt()[:, None])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0] * 4, "it returned a list"),
        (torch.tensor(1.0), r"it returned a float32 tensor of shape \(\)"),
        (torch.ones(4, 3, dtype=torch.cfloat), "it returned a complex64 tensor"),
        (torch.ones(3, 4), r"it returned a float32 tensor of shape \(3, 4\), but the batch has 4 samples"),
        (torch.ones(0), "it returned a float32 tensor"),
        (torch.tensor([1.0, -1, 1, 1]), "negative, NaN or infinite"),
        (torch.tensor([1.0, torch.nan, 1, 1]), "negative, NaN or infinite"),
        (torch.tensor([1.0, torch.inf, 1, 1]), "negative, NaN or infinite"),
        (MASK * torch.tensor([1, 1, 0, 1])[:, None], "no weight above 0 for sample 2: leave out what is padding alone"),
        (torch.zeros(4), "no weight above 0 at all"),
    ],
)
def test_what_a_user_returns_must_be_weights(weights, message):
    batch = torch.zeros(4, 3, dtype=torch.long)
    start = r"weights\(batch\) must return .*; for batch 7, which is an int64 tensor of shape \(4, 3\), "
    with pytest.raises(CalibrationError, match=start + ".*" + message):
        Calibration([], None, weigh=lambda _: weights).given(7, batch)
    assert checked_weights(SAMPLES, batch, 0) is not None  # a sample may have none, but a row of positions not
