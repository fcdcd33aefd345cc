"""Copies of models, and the devices that they use."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn

from balf_fx.calibration.batches import MODEL_ERRORS
from balf_fx.errors import ModelError


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, also of tensors that hooks compute and store on a module, as `torch.nn.utils.weight_norm` does.

    Raises:
        ModelError: another part of the model cannot be copied.
    """
    held = (value for module in model.modules() for value in vars(module).values())
    computed = {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}
    try:
        return copy.deepcopy(model, computed)
    except MODEL_ERRORS as error:
        raise ModelError(f"{type(model).__name__} cannot be copied with copy.deepcopy: {error}") from error


def cuda_devices(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that the model uses, whose random state must be restored."""
    tensors: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    return sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})


def without_expert_loops(model: nn.Module) -> None:
    """Let the experts of a model of transformers run in one grouped product, in place of a loop that depends on data.

    Args:
        model: a copy, whose configuration is changed.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) == "eager":
            config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]
