"""Checks of options. Each raises an OptionError that names the option and the values that it takes."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from balf_fx.budget.bounds import check_scipy
from balf_fx.errors import OptionError

_LEAST_LIMIT = 1e-9
"""The smallest limit on disagreement or divergence: it takes billions of samples to test."""


def check_choice(name: str, given: Any, values: Collection[Any]) -> None:
    """Check that an option has one of its values, if these are listed; 1 is not True."""
    if values and not any(given is value or (isinstance(given, str) and given == value) for value in values):
        raise OptionError(f"{name} must be one of {', '.join(map(repr, values))}, not {given!r}")


def chosen_among(name: str, given: Any, values: Sequence[Any]) -> list[Any]:
    """One or several of some values, as a list."""
    single = isinstance(given, str) or not isinstance(given, Collection)
    chosen = [given] if single else list(given)
    unknown = [each for each in chosen if each not in values]
    if unknown:
        listed, wrong = (", ".join(map(repr, each)) for each in (values, unknown))
        raise OptionError(f"{name} must be among {listed}, not {wrong}")
    return chosen


def check_patterns(**given: Any) -> None:
    """Check lists of glob patterns; `include` may be None."""
    for name, patterns in given.items():
        if patterns is None and name == "include":
            continue
        listed = not isinstance(patterns, str) and isinstance(patterns, Sequence)
        if not listed or not all(isinstance(pattern, str) for pattern in patterns):
            raise OptionError(f"{name} must be a list of patterns, such as ['head', 'blocks.*'], not {patterns!r}")


def check_seed(seed: Any) -> None:
    """Check the seed of the random probes, to which each process adds its rank."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise OptionError(f"seed must be a whole number, not {seed!r}")
    if not -(2**62) <= seed < 2**62:
        raise OptionError(f"seed must be a whole number of at most 62 bits, not {seed}")


def check_functions(**given: tuple[Any, str]) -> None:
    """Check options that are functions or None; each comes with the names of its arguments, for the message."""
    for name, (function, arguments) in given.items():
        if function is not None and not callable(function):
            raise OptionError(f"{name} must be a function of {arguments}, not {function!r}")


def check_ranks(allocation: Any) -> None:
    """Check the keys of `allocation` if it maps layers to ranks; the ranks are checked where they are used."""
    if isinstance(allocation, Mapping) and not all(isinstance(name, str) for name in allocation):
        raise OptionError(f"allocation must map names of layers to ranks, not {allocation!r}")


def check_paths(**given: Any) -> None:
    """Check paths of folders, or None; no system has paths with a null character."""
    for name, path in given.items():
        if path is not None and (not isinstance(path, str | os.PathLike) or "\0" in os.fsdecode(path)):
            raise OptionError(f"{name} must be the path of a folder, not {path!r}")


def check_limit(disagreement: Any, divergence: Any, confidence: Any, validation: Any) -> None:
    """Check the options of a limit on disagreement or divergence, which belong together."""
    values = {"disagreement": disagreement, "divergence": divergence, "confidence": confidence}
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (value is not None or name == "confidence") and not (number and 0 < value < 1):
            usual = 0.95 if name == "confidence" else 0.02
            raise OptionError(f"{name} must be a number between 0 and 1, such as {usual}, not {value!r}")
        if name != "confidence" and value is not None and value < _LEAST_LIMIT:
            raise OptionError(f"{name}={value!r} would need too many samples to test: give at least {_LEAST_LIMIT:g}")
    if disagreement is not None and divergence is not None:
        raise OptionError("give one limit, disagreement= for choices among classes or divergence= for others")
    limited = disagreement is not None or divergence is not None
    if limited and validation is None:
        raise OptionError(
            "disagreement= and divergence= are tested on batches that nothing else has seen: pass some as validation="
        )
    if disagreement is not None:
        check_scipy()
    if not limited and validation is not None:
        raise OptionError("validation= is for disagreement= or divergence=: pass one of them in place of a budget")
