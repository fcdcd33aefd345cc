"""Memory that is free, but still held by the process."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Give memory that is free back to the system, where that is glibc's: it keeps it for tensors up to 32 MiB.

    What a large layer leaves is in pieces, so that the next one takes new memory. A call takes about ten milliseconds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
