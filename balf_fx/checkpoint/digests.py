"""Digests of tensors and of nested values, bit for bit."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Feed = Callable[[Any], object]
"""Takes the next bytes of what is digested."""


def bytes_in(tensor: Tensor) -> Any:
    """A view of the bytes of a contiguous tensor on the CPU that is not empty; it does not keep the tensor alive."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def digest_of(value: Any) -> str:
    """The digest of nested values: tensors by dtype, shape and bytes, numbers and strings by value.

    Of other objects, only the type counts.
    """
    digest = hashlib.blake2b(digest_size=16)
    _feed(value, digest.update)
    return digest.hexdigest()


def _feed(value: Any, feed: Feed) -> None:
    if isinstance(value, Tensor):
        _feed_tensor(value.detach(), feed)
    elif isinstance(value, Mapping):
        feed(f"mapping {len(value)}".encode())
        for key, each in value.items():
            _feed(key, feed)
            _feed(each, feed)
    elif isinstance(value, list | tuple):
        feed(f"sequence {len(value)}".encode())
        for each in value:
            _feed(each, feed)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        feed(type(value).__name__.encode())
        for field in dataclasses.fields(value):
            _feed(getattr(value, field.name), feed)
    else:
        plain = value is None or isinstance(value, bool | int | float | complex | str | bytes)
        feed(f"{type(value).__name__} {value!r}".encode() if plain else type(value).__name__.encode())


def _feed_tensor(tensor: Tensor, feed: Feed) -> None:
    feed(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if hasattr(tensor, "__tensor_flatten__"):  # a quantized weight, for instance
        names, context = tensor.__tensor_flatten__()
        _feed([*(getattr(tensor, name) for name in names), str(context)], feed)
    elif tensor.numel():
        held = (tensor if tensor.layout is torch.strided else tensor.to_dense()).cpu().contiguous()
        feed(bytes_in(held))
