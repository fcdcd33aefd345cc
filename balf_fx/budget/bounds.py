"""Upper confidence bounds on the mean of independent values in [0, 1], and the samples that they need."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

from balf_fx.errors import MissingExtraError

_MISSING = 'certified budgets need scipy: pip install "balf-fx[certify]"'


def check_scipy() -> None:
    """Check that `clopper_pearson` will work.

    Raises:
        MissingExtraError: scipy is missing.
    """
    if importlib.util.find_spec("scipy") is None:
        raise MissingExtraError(_MISSING)


def clopper_pearson(failures: int, samples: int, confidence: float) -> float:
    """The exact one-sided bound on the rate of failures (Clopper and Pearson, Biometrika 1934).

    Raises:
        MissingExtraError: scipy is missing.
    """
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise MissingExtraError(_MISSING) from error
    return 1.0 if failures >= samples else float(beta.ppf(confidence, failures + 1, samples - failures))


def empirical_bernstein(values: Sequence[float], confidence: float) -> float:
    """The empirical Bernstein bound on the mean (Maurer and Pontil, COLT 2009, theorem 4); at most 1."""
    count = len(values)
    if count < 2:
        return 1.0
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    logarithm = math.log(2 / (1 - confidence))
    return min(mean + math.sqrt(2 * variance * logarithm / count) + 7 * logarithm / (3 * (count - 1)), 1.0)


def least_samples(limit: float, confidence: float, single: bool) -> int:
    """The number of samples without any mistake whose bound is the limit.

    Args:
        single: whether each sample is right or wrong as a whole (`clopper_pearson`), not in part.
    """
    if single:  # the bound on no failure is 1 - (1 - confidence)^(1 / samples)
        return math.ceil(math.log(1 - confidence) / math.log1p(-limit))
    return 1 + math.ceil(7 * math.log(2 / (1 - confidence)) / (3 * limit))
