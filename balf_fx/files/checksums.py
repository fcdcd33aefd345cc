"""Checksums of tensors, to find out whether a file has been changed since it was written."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping

from torch import Tensor


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """The SHA-256 of a text, and of the names, dtypes, shapes and values of plain tensors, in hexadecimal digits."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            found.update((ctypes.c_char * value.nbytes).from_address(value.data_ptr()))
    return found.hexdigest()
