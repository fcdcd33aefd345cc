"""The factor for logits, against brute force."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from balf_fx.calibration import temperature
from balf_fx.calibration.outputs import find_token_logits
from balf_fx.calibration.temperature import FACTORS, closest_to_one, row_divergences
from balf_fx.calibration.weights import Weights


def test_one_is_among_the_factors():
    assert 1.0 in FACTORS
    assert sorted(FACTORS) == list(FACTORS)


@given(st.integers(2, 9), st.integers(1, 7), st.integers(1, 40), st.integers(0, 1000))
def test_each_row_has_its_divergence_for_each_factor(classes, count, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    wanted, logits = 5 * torch.randn(2, count, classes, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(temperature, "CHUNK_ELEMENTS", chunk)
        rows, weights = row_divergences(wanted, logits, torch.zeros(count, 3))
    given_ = torch.stack([(logits.double() * factor).log_softmax(-1) for factor in FACTORS], 1)
    target = wanted.double().log_softmax(-1).unsqueeze(1).expand_as(given_)
    expected = F.kl_div(given_, target, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(weights, torch.ones(count, dtype=torch.float64))


def test_classes_that_are_excluded_do_not_count():
    wanted = torch.tensor([[1.0, 2.0, -torch.inf]])
    rows, _ = row_divergences(wanted, wanted.clone(), torch.zeros(1, 3))
    assert rows[0, FACTORS.index(1.0)] == pytest.approx(0, abs=1e-6)


def test_padding_does_not_count():
    wanted, logits = torch.randn(2, 3, 4, 7)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    wanted[mask == 0] = torch.nan
    rows, weights = row_divergences({"logits": wanted}, {"logits": logits}, mask, Weights(mask * 0.5))
    assert len(rows) == len(weights) == 7
    assert rows.isfinite().all()
    assert torch.equal(weights, torch.full((7,), 0.5, dtype=torch.float64))


def test_images_have_no_rows():
    image = torch.randn(2, 3, 4, 4)
    assert row_divergences(image, image, image) is None


@pytest.mark.parametrize("factor", FACTORS)
def test_a_factor_that_errors_have_removed_is_found(factor):
    wanted = 3 * torch.randn(500, 10)
    rows, weights = row_divergences(wanted, wanted / factor, torch.zeros(500, 3))
    assert closest_to_one(rows, weights) == factor


def test_rows_count_by_their_weight():
    wanted = 3 * torch.randn(500, 10)
    logits = torch.cat([wanted[:250] / 0.5, wanted[250:] / 2])
    rows, _ = row_divergences(wanted, logits, torch.zeros(500, 3))
    first = (torch.arange(500) < 250).double()
    assert closest_to_one(rows, first) == 0.5
    assert closest_to_one(rows, 1 - first) == 2.0


@given(st.lists(st.lists(st.floats(0, 9), min_size=13, max_size=13), min_size=1, max_size=30), st.data())
def test_the_factor_is_within_one_standard_error_of_the_least(values, data):
    rows = torch.tensor(values, dtype=torch.float64)
    weights = data.draw(st.lists(st.floats(0.1, 2), min_size=len(rows), max_size=len(rows)))
    weights = torch.tensor(weights, dtype=torch.float64)
    found = closest_to_one(rows, weights)
    share = weights / weights.sum()
    least = int((share @ rows).argmin())

    def excess(index):
        difference = rows[:, index] - rows[:, least]
        mean = float(share @ difference)
        return mean - math.sqrt(float((share.square() * (difference - mean).square()).sum()))

    assert excess(FACTORS.index(found)) <= 1e-9
    nearer = [factor for factor in FACTORS if abs(math.log(factor)) < abs(math.log(found)) - 1e-9]
    assert all(excess(FACTORS.index(factor)) > -1e-9 for factor in nearer)


def test_a_few_confident_mistakes_change_nothing():
    wanted = torch.cat([10 * torch.eye(10), 10 * torch.eye(10).roll(1, 0)[:1]])
    logits = torch.cat([10 * torch.eye(10), 10 * torch.eye(10)[:1]])
    rows, weights = row_divergences(wanted, logits, torch.zeros(11, 3))
    assert int(rows.mean(0).argmin()) < FACTORS.index(1.0)
    assert closest_to_one(rows, weights) == 1.0


def test_divergences_that_are_not_finite_change_nothing():
    rows = torch.full((200, len(FACTORS)), torch.inf, dtype=torch.float64)
    assert closest_to_one(rows, torch.ones(200, dtype=torch.float64)) == 1.0


def test_logits_of_tokens_are_named_or_as_many_as_words():
    ids, output = torch.zeros(2, 5, dtype=torch.long), torch.randn(2, 5, 7)
    assert find_token_logits(output, ids, 7) is output
    assert find_token_logits(output, ids, 30) is None  # the features of an encoder
    assert find_token_logits({"logits": output}, ids, 30) is output
    assert find_token_logits({"logits": output}, torch.randn(2, 5), 7) is None
    assert find_token_logits(output[:, 0], ids, 7) is None
