"""What is folded into the layer before it: a map y = x * scale + shift of each feature.

Tensors have one entry for each of the layer's C output features, or a single one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchNorm:
    """A BatchNorm with running statistics: y = (x - mean) / sqrt(variance + eps) * weight + bias.

    Attributes:
        mean, variance: [C].
        weight, bias: [C] or None.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that determine it, by name."""
        found = {"mean": self.mean, "variance": self.variance, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def scale(self, dtype: torch.dtype) -> Tensor:
        """The factor of each feature, [C]."""
        scale = (self.variance.to(dtype) + self.eps).rsqrt()
        return scale if self.weight is None else scale * self.weight.detach().to(dtype)

    def shifted(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The bias [C] of a layer into which it is folded, given the bias that the layer has, if any."""
        centred = -self.mean.to(dtype) if bias is None else bias.detach() - self.mean
        scaled = centred.to(dtype) * self.scale(dtype)
        return scaled if self.bias is None else scaled + self.bias.detach().to(dtype)


@dataclass(frozen=True)
class Scale:
    """A product with a constant, as the layer scale of residual branches, or with a number: y = x * factor.

    Attributes:
        factor: C entries, in any shape, or one for all features.
        sources: the parameters and buffers from which the model computes it.
    """

    factor: Tensor | float
    sources: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that determine it, by name."""
        return {f"factor {index}": tensor for index, tensor in enumerate(self.sources)}

    def scale(self, dtype: torch.dtype) -> Tensor:
        """The factor of each feature, [C] or [1]."""
        if isinstance(self.factor, Tensor):
            return self.factor.detach().to(dtype).flatten()
        return torch.tensor([self.factor], dtype=dtype, device="cpu")

    def shifted(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The bias [C] of a layer into which it is folded; None if the layer has none."""
        return None if bias is None else bias.detach().to(dtype) * self.scale(dtype).to(bias.device)


@dataclass(frozen=True)
class Shift:
    """A sum with a constant, as in a BatchNorm that a model writes out, or with a number: y = x + summand.

    Attributes:
        summand, sources: as the factor of a `Scale` and its sources.
    """

    summand: Tensor | float
    sources: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that determine it, by name."""
        return {f"summand {index}": tensor for index, tensor in enumerate(self.sources)}

    def scale(self, dtype: torch.dtype) -> Tensor:
        """The factor of each feature, [1]."""
        return torch.ones(1, dtype=dtype, device="cpu")

    def shifted(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The bias of a layer into which it is folded, [C], or [1] for one without a bias."""
        summand = self.summand if isinstance(self.summand, Tensor) else torch.tensor([self.summand], dtype=dtype)
        flat = summand.detach().to(dtype).flatten()
        return flat if bias is None else bias.detach().to(dtype) + flat.to(bias.device)


Foldable = BatchNorm | Scale | Shift
