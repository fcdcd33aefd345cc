"""Options that are written with a unit."""

from __future__ import annotations

import re
from typing import Any

from balf_fx.errors import OptionError

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def share_of(latency: Any, seconds: float | None = None) -> float:
    """A fraction as it is, or a time such as "12ms" as a share of the original's.

    Args:
        seconds: the original's time; None if it is not known, for a share of 1.

    Raises:
        OptionError: it is neither a fraction nor a time.
    """
    if isinstance(latency, int | float) and not isinstance(latency, bool):
        return latency  # not as a float, which not every whole number fits into
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|us|s)\s*", str(latency).lower())
    if not isinstance(latency, str) or found is None or float(found[1]) == 0:
        raise OptionError(
            f"latency must be a fraction in (0, 1], such as 0.6, or a time, such as '12ms', not {latency!r}"
        )
    return 1.0 if seconds is None else float(found[1]) * _SECONDS[found[2]] / seconds
