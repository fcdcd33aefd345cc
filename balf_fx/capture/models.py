"""Models without wrappers, copies of models, and the devices that they use."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from balf_fx.calibration.batches import MODEL_ERRORS
from balf_fx.calibration.describing import with_article
from balf_fx.calibration.pages import mapped
from balf_fx.capture.sharding import gathered_copy, is_sharded
from balf_fx.errors import ModelError
from balf_fx.graph.constants import Deterministic, NotConstantError
from balf_fx.graph.parameters import computed_tensors, is_quantized


def plain_model(model: Any) -> nn.Module:
    """The model inside the wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    A model that is sharded by `fully_shard` is gathered in each process, which must all call this.

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
        raise ModelError(f"the model must be a torch.nn.Module, not {with_article(name)}{cure}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the model is compiled by TorchScript, and its code cannot be captured: pass the original module"
        )
    if name == "FullyShardedDataParallel":
        raise ModelError(
            "the model is sharded by FullyShardedDataParallel: shard it by torch.distributed.fsdp.fully_shard, or pass "
            "a model with all its weights"
        )
    if is_sharded(model):
        return plain_model(gathered_copy(model))
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


def copy_model(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy, also of tensors that hooks compute and store on a module, as `torch.nn.utils.weight_norm` does.

    Tensors that are mapped from files (`calibration.pages`) are not copied. Modules are in the mode of the originals:
    torchvision's feature extractors copy themselves into training mode.

    Args:
        shared: other tensors that are not copied.

    Raises:
        ModelError: another part of the model cannot be copied.
    """
    try:
        kept = mapped((*model.parameters(), *model.buffers())) | {id(tensor): tensor for tensor in shared}
        copied = copy.deepcopy(model, {**computed_tensors(model), **kept})
    except MODEL_ERRORS as error:
        raise ModelError(f"{type(model).__name__} cannot be copied with copy.deepcopy: {error}") from error
    for original, own in zip(model.modules(), copied.modules(), strict=False):
        if own.training != original.training:
            own.train(original.training)
    return copied


def unchanged_parameters(model: nn.Module, copied: nn.Module) -> list[Tensor]:
    """The parameters of a model that a graph may share with it, since forward does not change them.

    Args:
        copied: a copy of the model whose forward has run. What it shares with the model, in files, is not read.
    """
    after = dict(copied.named_parameters())
    pairs = [(own, after[name]) for name, own in model.named_parameters() if name in after and _is_plain(own)]
    return [own for own, other in pairs if own is not other and torch.equal(own, other)]


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter is an ordinary one, whose gradients nobody watches."""
    watched = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    return type(parameter) is nn.Parameter and not (watched or parameter.is_inference() or is_quantized(parameter))


def fold_parametrizations(model: nn.Module) -> None:
    """Replace weights that `torch.nn.utils` computes on each access or call by their values.

    These are parametrizations, and the hooks of the older weight_norm and spectral_norm. They stay where a value takes
    more memory than the tensors from which it is computed, is random, or depends on tensors that other modules hold.

    Args:
        model: a copy, in evaluation mode.
    """
    modules = list(model.modules())
    holders = Counter(id(tensor) for module in modules for tensor in module._parameters.values())
    for module in modules:
        if any(each.training for each in module.modules()):
            continue
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, WeightNorm | SpectralNorm):
                hook.remove(module)
                del module._forward_pre_hooks[key]
        for hooks in (module._load_state_dict_pre_hooks, module._state_dict_hooks):  # they rename what is now folded
            for key, hook in list(hooks.items()):
                if str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.nn.utils."):
                    del hooks[key]
        if is_parametrized(module):
            lists: Any = module.parametrizations
            tensors = [tensor for each in lists.values() for tensor in (*each.parameters(), *each.buffers())]
            if all(holders[id(tensor)] <= 1 and not is_quantized(tensor) for tensor in tensors):
                _fold(module, lists, sum(tensor.numel() for tensor in tensors))


def _fold(module: nn.Module, parametrizations: nn.ModuleDict, limit: int) -> None:
    """Store the values of a module's parametrized tensors, unless one is random or all have over `limit` elements."""
    try:
        with torch.no_grad(), Deterministic():  # type: ignore[no-untyped-call]
            values = {name: getattr(module, name).clone() for name in parametrizations}
    except NotConstantError:
        return
    if sum(value.numel() for value in values.values()) > limit:
        return
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]  # not remove_parametrizations: the user's model has the same class
    for name, value in values.items():
        sources = list(parametrizations[name].parameters())
        if sources:
            setattr(module, name, nn.Parameter(value, any(source.requires_grad for source in sources)))
        else:
            module.register_buffer(name, value)


def device_of(model: Any) -> torch.device:
    """The device of the first tensor of a model; the CPU if there is none."""
    tensors = itertools.chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else iter(())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


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


def without_questions_about_masks(model: nn.Module) -> None:
    """Let encoders and decoders of torch.nn apply the mask that they are given, whatever its values are.

    They ask whether it is the causal one, which no graph can know, only to call a kernel that needs no mask then.

    Args:
        model: a copy, which gets hooks.
    """
    for module in model.modules():
        for kind, name in _ASKS_ABOUT_MASKS.items():
            if isinstance(module, kind) and type(module).forward is kind.forward:
                module.register_forward_pre_hook(functools.partial(_answered, name), with_kwargs=True)


_ASKS_ABOUT_MASKS: dict[type[nn.Module], str] = {
    nn.TransformerEncoder: "is_causal",
    nn.TransformerDecoder: "tgt_is_causal",
}
"""The argument that answers the question; None asks it."""


def _answered(name: str, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
    """The arguments of a call, all by name."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return (), {**given, name: bool(given.get(name))}
