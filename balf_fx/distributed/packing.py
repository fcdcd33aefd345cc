"""Values as bytes, which processes exchange: what pickle writes, and beside it the tensors, which are copied once."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; a multiple of the size of every dtype's elements
_HEAD = 8  # bytes of the length of what pickle has written


def packed(value: Any) -> Tensor:
    """A value as bytes, uint8 [n] on the CPU; of views, only what they show. Tensors keep their order in memory."""
    body = io.BytesIO()
    pickler = _Pickler(body)
    pickler.dump(value)
    specs = [(tensor.dtype, tuple(tensor.shape), _stride(tensor), tensor.device.type) for tensor in pickler.tensors]
    intro = pickle.dumps((specs, body.getvalue()))
    places = _places(len(intro), [tensor.nbytes for tensor in pickler.tensors])
    data = torch.zeros(places[-1], dtype=torch.uint8, device="cpu")
    data[:_HEAD] = torch.tensor([len(intro)], device="cpu").view(torch.uint8)
    data[_HEAD : _HEAD + len(intro)] = torch.frombuffer(bytearray(intro), dtype=torch.uint8)
    for tensor, start in zip(pickler.tensors, places, strict=False):
        if tensor.numel():
            own = data[start : start + tensor.nbytes].view(tensor.dtype)
            own.copy_(tensor.detach().reshape(-1))
    return data


def unpacked(data: Tensor, device: torch.device) -> Any:
    """The value of some bytes.

    Args:
        data: uint8 [n] on the CPU, from `packed`; only of processes that are trusted, since pickle runs code.
        device: of tensors that were on an accelerator.
    """
    length = int(data[:_HEAD].view(torch.int64))
    specs, body = pickle.loads(data[_HEAD : _HEAD + length].numpy().tobytes())  # noqa: S301
    sizes = [dtype.itemsize * torch.Size(shape).numel() for dtype, shape, *_ in specs]
    tensors = []
    for (dtype, shape, stride, kind), start, size in zip(specs, _places(length, sizes), sizes, strict=False):
        own = with_strides(data[start : start + size].view(dtype).reshape(shape).clone(), stride)
        tensors.append(own if kind == "cpu" else own.to(device))
    return _Unpickler(io.BytesIO(body), tensors).load()


def with_strides(value: Tensor, stride: Sequence[int]) -> Tensor:
    """A contiguous tensor with other strides."""
    if tuple(value.stride()) == tuple(stride):
        return value
    once = [1 if step == 0 else size for size, step in zip(value.shape, stride, strict=True)]  # expanded dimensions
    found = torch.empty_strided(once, tuple(stride), dtype=value.dtype, device=value.device)
    found.copy_(value[tuple(slice(0, size) for size in once)])
    return found.expand(value.shape)


def _stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a tensor without the gaps between its elements."""
    return torch.empty_like(tensor, device="meta").stride()


def _places(length: int, sizes: list[int]) -> list[int]:
    """Where each tensor begins, and where the last one ends, after `length` bytes that pickle has written."""
    return list(accumulate(map(_aligned, sizes), initial=_aligned(_HEAD + length)))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _Pickler(pickle.Pickler):
    """Leaves out plain tensors, and lists them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        plain = type(obj) is Tensor and obj.layout is torch.strided and not obj.is_quantized
        if not plain or obj.is_conj() or obj.is_neg():
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Puts them back."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        found: Tensor = self._tensors[pid]
        return found
