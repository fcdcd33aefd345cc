import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refit.helpers import PROPERTY, random, seeds, spectrum

from balf_fx.refit.biases import Residual, best_shift
from balf_fx.refit.regression import root_of


@PROPERTY
@given(seeds, st.booleans(), st.booleans())
def test_a_bias_is_shifted_by_the_weighted_mean_of_what_is_left(seed, plain, weighted):
    left = random(seed, 1, 4, 60) + 0.3 * random(seed + 1, 1, 4, 1)
    weights = random(seed + 3, 60).square() + 0.1 if weighted else torch.ones(60, dtype=torch.float64)
    metric = None if plain else spectrum(seed, 4)
    gram = torch.eye(4, dtype=torch.float64) if metric is None else root_of(metric)[0].mT @ root_of(metric)[0]
    train, held_out = (
        Residual.of(left[..., own], weights[own] if weighted else None) for own in (slice(0, 45), slice(45, None))
    )

    def lost(shift, own):
        error = left[0, :, own] - shift[0].unsqueeze(-1)
        return float(((gram @ error) * error * weights[own]).sum() / weights[own].sum())

    def mean(own):
        return (left[..., own] * weights[own]).sum(-1) / weights[own].sum()

    nothing, training, held = torch.zeros(1, 4, dtype=torch.float64), slice(0, 45), slice(45, None)
    better = lost(mean(training), held) < lost(nothing, held)
    expected = mean(slice(None)) if better else nothing
    torch.testing.assert_close(best_shift(train, held_out, metric), expected)
    rise = held_out.rise(train.mean, None if plain else root_of(metric))
    assert rise == pytest.approx(lost(mean(training), held) - lost(nothing, held), abs=1e-12)


def test_a_bias_without_samples_stays():
    nothing = Residual(0.0, torch.zeros(1, 3, dtype=torch.float64))
    assert torch.equal(best_shift(nothing, nothing, None), nothing.total)
    seen = Residual.of(random(0, 1, 3, 8), None)
    torch.testing.assert_close(best_shift(seen, nothing, None), seen.mean)


def test_a_bias_stays_where_the_held_out_share_prefers_it():
    """The mean residual of the training share is none of its own."""
    train, held_out = (
        Residual.of(torch.full((1, 3, count), value), None) for count, value in ((300, 1.0), (100, -0.1))
    )
    assert torch.equal(best_shift(train, held_out, None), torch.zeros(1, 3, dtype=torch.float64))
    assert torch.equal(best_shift(train, train, None), torch.ones(1, 3, dtype=torch.float64))
