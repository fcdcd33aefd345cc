"""Memory that is free, but still held by the process."""

from __future__ import annotations

import ctypes
import sys

_MUCH = 1 << 28  # bytes; pages that are taken again cost time
_FEW = 1 << 17  # numbers; a count walks over all free pieces, and takes longer than small layers do
BETWEEN_WALKS = 1 << 30
"""Bytes to be free between walks over samples, which soon take them again: less slows a refit by a fifth."""


class _Counts(ctypes.Structure):
    """What mallinfo2 of glibc returns: ten counts, of which the ninth are the bytes that are free."""

    _fields_ = [("others", ctypes.c_size_t * 8), ("free", ctypes.c_size_t), ("top", ctypes.c_size_t)]


def give_back(least: int = _MUCH, freed: int | None = None) -> None:
    """Give memory that is free back to the system, where that is glibc's: it keeps it for tensors up to 32 MiB.

    What a large layer leaves is in pieces, so that the next one takes new memory.

    Args:
        least: the bytes that have to be free; if it is not 0, glibc has to be recent enough to count them (2.33).
        freed: how many numbers the weights have whose statistics or copies were just freed; nothing happens if they
            are few.
    """
    if freed is not None and freed < _FEW:
        return
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    trim, count = (getattr(library, name, None) for name in ("malloc_trim", "mallinfo2"))
    if count is not None:
        count.restype = _Counts
    if trim is not None and (least == 0 or (count is not None and count().free >= least)):
        trim(0)
