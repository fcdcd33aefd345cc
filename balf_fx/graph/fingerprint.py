"""Fingerprints that distinguish the weights of layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fingerprint:
    """A few sums over a layer's weight and bias."""

    shape: tuple[int, ...]
    sums: tuple[float, ...]

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Fingerprint:
        """The fingerprint of a layer, the same up to rounding on every device."""
        sums: list[float] = []
        for tensor in (weight, *(() if bias is None else (bias,))):
            flat = tensor.detach().to(torch.float64).flatten()
            ramp = torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device)
            sums += [float(flat.square().sum()), float(flat.square() @ ramp), float(flat.abs().sum())]
        return cls(tuple(weight.shape), tuple(sums))

    def matches(self, other: Fingerprint) -> bool:
        """Whether both belong to the same layer, up to the rounding of its weights when BatchNorm is folded."""
        close = len(self.sums) == len(other.sums) and all(
            math.isclose(a, b, rel_tol=1e-5) for a, b in zip(self.sums, other.sums, strict=True)
        )
        return close and self.shape == other.shape
