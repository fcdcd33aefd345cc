"""Random values and metrics for the tests of regressions."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from balf_fx.ranks.spectra import damped_roots, spectrum_from_output

PROPERTY = settings(max_examples=25, derandomize=True)
seeds = st.integers(0, 10_000)


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spectrum(seed, outputs, groups=1):
    """With a metric of its own."""
    gradients = random(seed + 10, groups, outputs, 30)
    y = random(seed + 11, groups, outputs, 40)
    return spectrum_from_output(y @ y.mT / 40, y.mean(-1), damped_roots(gradients @ gradients.mT / 30, 0.1))
