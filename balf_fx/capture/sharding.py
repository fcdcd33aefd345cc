"""Models whose parameters are sharded over processes by `torch.distributed.fsdp.fully_shard`."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import Tensor, nn

from balf_fx.errors import ModelError

_ADDED = ("__composable_api", "_fsdp", "_is_fsdp")


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to a module of the model."""
    kind = _kind()
    return kind is not None and any(isinstance(module, kind) for module in model.modules())


def gathered_copy(model: nn.Module) -> nn.Module:
    """A plain copy of a sharded model, with all its weights in each process, which must all call this.

    Raises:
        ModelError: a tensor cannot be gathered, or a part of the model cannot be copied.
    """
    kind: Any = _kind()
    memo: dict[int, Any] = {}
    try:
        for parameter in model.parameters():  # one at a time, in the same order in all processes
            memo[id(parameter)] = nn.Parameter(_whole(parameter), parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = _whole(buffer)
        for module in model.modules():  # not by `copy.deepcopy`, which `fully_shard` forbids
            bases = type(module).__mro__
            memo[id(module)] = object.__new__(bases[bases.index(kind) + 1] if kind in bases else bases[0])
        for module in model.modules():
            memo[id(module)].__dict__.update(copy.deepcopy(_own_attributes(module), memo))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the weights that fully_shard has spread over the processes cannot be gathered: {error}. Pass a model "
            "with all its weights: torch.distributed.checkpoint.state_dict.get_model_state_dict gathers them"
        ) from error
    copied: nn.Module = memo[id(model)]
    return copied


def _kind() -> Any:
    """The class that `fully_shard` adds to modules; None if it has not been imported."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in memory of its own."""
    value = tensor.detach()
    whole: Tensor = value.full_tensor().clone() if hasattr(value, "full_tensor") else value.clone()
    return whole


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, without those that `fully_shard` has added, and without its hooks."""
    found = {name: value for name, value in module.__dict__.items() if not name.startswith(_ADDED)}
    for name, hooks in found.items():
        if name.endswith("_hooks") and isinstance(hooks, dict):
            found[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _shards(hook))
    return found


def _shards(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
