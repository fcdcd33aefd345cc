"""Checks of options that are not numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from balf_fx.errors import OptionError


def check_patterns(name: str, patterns: Any) -> None:
    """Check a list of glob patterns; `include` may be None."""
    if patterns is None and name == "include":
        return
    listed = not isinstance(patterns, str) and isinstance(patterns, Sequence)
    if not listed or not all(isinstance(pattern, str) for pattern in patterns):
        raise OptionError(f"{name} must be a list of patterns, such as ['head', 'blocks.*'], not {patterns!r}")


def check_function(name: str, function: Any, arguments: str) -> None:
    """Check a function of the user's, or None.

    Args:
        arguments: what it is a function of.
    """
    if function is not None and not callable(function):
        raise OptionError(f"{name} must be a function of {arguments}, not {function!r}")


def check_folder(name: str, folder: Any) -> None:
    """Check the path of a folder, or None."""
    if folder is not None and not isinstance(folder, str | os.PathLike):
        raise OptionError(f"{name} must be the path of a folder, not {folder!r}")
