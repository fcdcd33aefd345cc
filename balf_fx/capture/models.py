"""Models without wrappers, copies of models, and the devices that they use."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from balf_fx.calibration.batches import MODEL_ERRORS
from balf_fx.errors import ModelError


def plain_model(model: Any) -> nn.Module:
    """The model inside the wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Raises:
        ModelError: it is no module, or is wrapped in a way that cannot be undone here; the message says what to pass.
    """
    kind = type(model)
    name, library = kind.__name__, kind.__module__.partition(".")[0]
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return plain_model(model.module)
    if name == "OptimizedModule" and library == "torch":
        return plain_model(model._orig_mod)
    if not isinstance(model, nn.Module):
        cure = ": load it first; only the command line takes names" if isinstance(model, str) else ""
        raise ModelError(f"the model must be a torch.nn.Module, not a {name}{cure}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the model is compiled by TorchScript, and its code cannot be captured: pass the original module"
        )
    if name == "FullyShardedDataParallel":
        raise ModelError("the model is sharded by FullyShardedDataParallel: pass a model with all its weights")
    if library == "peft" and hasattr(model, "merge_and_unload"):
        raise ModelError("the model has adapters of peft: pass model.merge_and_unload(), or model.get_base_model()")
    if any(type(each).__name__ == "OptimizedModule" for each in model.modules()):
        return _without_compiled_parts(model)
    return model


def _without_compiled_parts(model: nn.Module) -> nn.Module:
    """A copy of a model whose submodules are not compiled by `torch.compile`."""
    copied = copy_model(model)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            setattr(module, name, plain_model(child))
    return copied


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
