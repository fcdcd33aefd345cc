"""Caches of attention without the zeros with which narrower heads are padded (`widths.layouts`).

Attention in transformers writes its keys and values to the cache, and reads those of all positions from it. A hook
gives the attention a view of the cache, which stores what is not zero and pads with zeros what is read. So the cache,
which is kept from token to token, takes less memory; what one layer needs while it runs does not change.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

_NAMES = {"cache", "past_key_values", "past_key_value", "layer_past"}


def takes_cache(module: nn.Module) -> bool:
    """Whether a module is attention that may be given a cache."""
    return bool(_NAMES & set(inspect.signature(module.forward).parameters))


@dataclass(frozen=True)
class NarrowCache:
    """A pre-hook of attention: its cache stores the first features of each head; the others are zero.

    Attributes:
        keys, values: the number of features that are stored; None for all.
    """

    keys: int | None
    values: int | None

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return tuple(map(self._wrapped, args)), {name: self._wrapped(value) for name, value in kwargs.items()}

    def _wrapped(self, value: Any) -> Any:
        """A view of a cache; other arguments as they are, and also the two caches of a decoder with an encoder."""
        is_cache = hasattr(value, "update") and hasattr(value, "get_seq_length")
        return _View(value, self) if is_cache and not hasattr(value, "cross_attention_cache") else value


class _View:
    """A cache that narrows what it is given and pads what it returns."""

    def __init__(self, cache: Any, sizes: NarrowCache) -> None:
        self._cache, self._sizes = cache, sizes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given, sizes = (key_states, value_states), (self._sizes.keys, self._sizes.values)
        found = self._cache.update(*map(_narrowed, given, sizes), *args, **kwargs)
        keys, values = map(_padded, found, given)
        return keys, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _narrowed(states: Tensor, size: int | None) -> Tensor:
    return states if size is None else states[..., :size]


def _padded(states: Tensor, like: Tensor) -> Tensor:
    """The states with as many features as others."""
    missing = like.shape[-1] - states.shape[-1]
    return F.pad(states, (0, missing)) if missing else states
