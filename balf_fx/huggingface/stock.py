"""Compressed models that stock transformers builds from their configuration, so that it reads their folders alone.

This is so where every layer is still one of its own class, and layers only became narrower as a field of the
configuration says.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from balf_fx.graph.plan import Plan

_SIZES = (
    *("intermediate_size", "shared_expert_intermediate_size", "hidden_dim", "d_ff", "n_inner"),
    *("ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"),
)
_BIASES = ("mlp_bias",)  # whether the layers of an MLP have biases, of which a narrower one may get its last


def adapt_configuration(model: Any, plan: Plan) -> bool:
    """Let a model's configuration describe its layers as they are now, if it can; else it stays as it is."""
    if any(recipe.form not in ("layer", "parameter") for recipe in (plan.modules or {}).values()):
        return False
    for changes in _changes(model.config, plan):
        candidate = copy.deepcopy(model.config)
        candidate.update(changes)
        if missing_biases(model, candidate) is not None:
            model.config.update(changes)
            return True
    return False


def _changes(config: Any, plan: Plan) -> Iterator[dict[str, Any]]:
    """The changes of fields to be tried."""
    sizes: dict[int, set[int]] = defaultdict(set)
    for width in plan.widths:
        if width.kind == "channels":
            sizes[width.features].add(width.size)
    found = {name: sizes.get(getattr(config, name, None) or 0, set()) for name in _SIZES}
    narrower = {name: min(own) for name, own in found.items() if len(own) == 1}
    biases = {name: True for name in _BIASES if getattr(config, name, None) is False}
    yield narrower
    if biases:
        yield {**narrower, **biases}


def missing_biases(model: Any, config: Any) -> dict[str, Tensor] | None:
    """Zeros for the biases that stock transformers expects of a model besides its own tensors.

    Args:
        config: the model's configuration, or another one.

    Returns:
        {name: zeros of the shape, dtype and device of the tensor}, often none; None if transformers does not build the
        model from its configuration.
    """
    if not type(model).__module__.startswith("transformers."):
        return None
    with torch.device("meta"):
        stock = type(model)(copy.deepcopy(config))
    if {name: type(module) for name, module in model.named_modules()} != {
        name: type(module) for name, module in stock.named_modules()
    }:
        return None
    held, expected = model.state_dict(), stock.state_dict()
    missing = expected.keys() - held.keys()
    fits = all(name in expected and expected[name].shape == value.shape for name, value in held.items())
    if not fits or not all(name.endswith(".bias") for name in missing):
        return None
    like = next(model.parameters())
    return {name: like.new_zeros(expected[name].shape) for name in sorted(missing)}
