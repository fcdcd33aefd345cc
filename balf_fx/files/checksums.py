"""Checksums of tensors, to find out whether a file has been changed since it was written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from balf_fx.checkpoint.digests import bytes_in


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """The SHA-256 of a text, and of the names, dtypes, shapes and values of plain tensors, in hexadecimal digits."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            found.update(bytes_in(value))
    return found.hexdigest()
