import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balf_fx.budget.bounds import clopper_pearson, empirical_bernstein, least_samples
from balf_fx.errors import MissingExtraError


def at_most(failures, samples, rate):
    """The probability of so many failures or fewer, summed term by term."""
    return math.fsum(math.comb(samples, k) * rate**k * (1 - rate) ** (samples - k) for k in range(failures + 1))


@given(st.integers(1, 200), st.floats(0.5, 0.999), st.data())
def test_a_rate_at_the_bound_gives_so_few_failures_with_the_rest_of_the_confidence(samples, confidence, data):
    failures = data.draw(st.integers(0, samples - 1))
    bound = clopper_pearson(failures, samples, confidence)
    assert failures / samples < bound < 1
    assert at_most(failures, samples, bound) == pytest.approx(1 - confidence, rel=1e-6)


def test_only_failures_bound_nothing():
    assert clopper_pearson(7, 7, 0.95) == 1.0


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50), st.floats(0.5, 0.999))
def test_the_bernstein_bound_is_the_published_formula(values, confidence):
    exact = torch.tensor(values, dtype=torch.float64)
    logarithm, n = math.log(2 / (1 - confidence)), len(values)
    expected = exact.mean() + (2 * exact.var() * logarithm / n).sqrt() + 7 * logarithm / (3 * (n - 1))
    assert empirical_bernstein(values, confidence) == pytest.approx(min(float(expected), 1.0), rel=1e-9)


def test_the_bernstein_bound_holds_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(400, 300, generator=generator, dtype=torch.float64) ** 8  # skewed, of mean 1 / 9
    held = [empirical_bernstein(row, 0.9) >= 1 / 9 for row in draws.tolist()]
    assert sum(held) >= 0.9 * len(held)
    assert empirical_bernstein(draws[0].tolist(), 0.9) < 0.3
    assert empirical_bernstein([0.5], 0.9) == 1.0


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize(("limit", "confidence"), [(0.02, 0.95), (0.1, 0.9), (0.5, 0.99)])
def test_the_least_number_of_samples_is_the_first_that_can_do(single, limit, confidence):
    needed = least_samples(limit, confidence, single)

    def bound(samples):
        return clopper_pearson(0, samples, confidence) if single else empirical_bernstein([0.0] * samples, confidence)

    assert bound(needed) <= limit < bound(needed - 1)
    assert (limit, confidence, single) != (0.02, 0.95, True) or needed == 149


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingExtraError, match=r"balf-fx\[certify\]"):
        clopper_pearson(0, 10, 0.95)
