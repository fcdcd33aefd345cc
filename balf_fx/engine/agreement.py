"""What processes that compress one model have in common: the model and the options, and then the result."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from balf_fx.checkpoint.digests import digest_of
from balf_fx.distributed.group import Group
from balf_fx.engine.program import Program
from balf_fx.engine.rewriting import held_tensors
from balf_fx.engine.settings import Settings
from balf_fx.errors import ModelError, OptionError, ProcessError
from balf_fx.graph.parameters import is_quantized, put
from balf_fx.graph.plan import Plan

_OWN = ("progress", "validation")
"""Options in which processes may differ."""


def check_alike(model: nn.Module, settings: Settings, group: Group) -> None:
    """Check that all processes compress the same model with the same options.

    Raises:
        OptionError: an option differs, and is named.
        ModelError: a tensor differs; names it.
    """
    if group.size == 1:
        return
    names = [each.name for each in dataclasses.fields(settings) if each.name not in _OWN]
    options = {name: _described(getattr(settings, name)) for name in names}
    differing = _differing(group.gathered(options))
    if differing:
        raise OptionError(f"the processes have different options: give all of them the same {', '.join(differing)}")
    differing = _differing(group.gathered(_digests(model)))
    if differing:
        raise ModelError(
            f"the processes have different models: {', '.join(map(repr, differing[:5]))} differ. Load the same weights "
            "in each"
        )


def give_alike(compressed: Program, plan: Plan, group: Group) -> None:
    """Give all processes the tensors of process 0, bit for bit, where other hardware has rounded them differently.

    Raises:
        ProcessError: the processes have made other decisions.
    """
    if group.size == 1:
        return
    plans = group.gathered(digest_of(plan.to_dict()))
    if any(each != plans[0] for each in plans):
        raise ProcessError(
            "the processes have chosen different ranks, since they compute differently: use the same hardware, "
            "versions and number of threads in each, or pass distributed=False to compress in one of them"
        )
    for graph_module in compressed.graph_modules:
        tensors = dict(held_tensors(graph_module))
        given: dict[int, Tensor] = {}  # tensors that several names share remain shared
        for name in _differing(group.gathered(_digests(graph_module))):
            own = tensors[name]
            value = group.once(lambda own=own: own.detach())  # type: ignore[misc]
            if group.rank:
                wrapped = nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value
                put(graph_module, name, given.setdefault(id(own), wrapped))


def _described(value: Any) -> str:
    """A value in words; a plan by its digest, functions and other objects by their type."""
    if isinstance(value, Plan):
        return digest_of(value.to_json())
    plain = isinstance(value, str | int | float | bool | tuple | list | dict | None)
    return repr(value) if plain else type(value).__name__


def _differing(found: list[dict[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all."""
    keys = dict.fromkeys(key for each in found for key in each)
    return [key for key in keys if any(each.get(key) != found[0].get(key) for each in found)]


def _digests(model: nn.Module) -> dict[str, str]:
    """A digest of each tensor by its name."""
    return {name: digest_of(tensor) for name, tensor in held_tensors(model) if not is_quantized(tensor)}
