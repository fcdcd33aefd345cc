"""Fingerprints that distinguish the weights of layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 15  # elements that stay in a processor's cache in float64


@dataclass(frozen=True)
class Fingerprint:
    """A few sums over a layer's weight and bias."""

    shape: tuple[int, ...]
    sums: tuple[float, ...]

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Fingerprint:
        """The fingerprint of a layer, the same up to rounding on every device."""
        tensors = (weight,) if bias is None else (weight, bias)
        return cls(tuple(weight.shape), tuple(value for tensor in tensors for value in _sums(tensor)))

    def matches(self, other: Fingerprint) -> bool:
        """Whether both belong to the same layer, up to the rounding of its weights when BatchNorm is folded."""
        close = len(self.sums) == len(other.sums) and all(
            math.isclose(a, b, rel_tol=1e-5) for a, b in zip(self.sums, other.sums, strict=True)
        )
        return close and self.shape == other.shape


def _sums(tensor: Tensor) -> list[float]:
    """The sums of squares, of squares times a ramp from 1 to 2, and of absolute values."""
    flat = tensor.detach().flatten()
    sums = torch.zeros(3, dtype=torch.float64, device=flat.device)
    steps = max(len(flat) - 1, 1)
    size = _CHUNK if flat.device.type == "cpu" else max(len(flat), 1)
    places = torch.arange(min(size, len(flat)), dtype=torch.float64, device=flat.device)
    for index, piece in enumerate(torch.split(flat, size)):
        values = piece.to(torch.float64)
        squares = values.square()
        total = squares.sum()
        ramped = total * (1 + index * size / steps) + squares @ places[: len(squares)] / steps
        sums += torch.stack([total, ramped, values.abs().sum()])
    found: list[float] = sums.tolist()
    return found
