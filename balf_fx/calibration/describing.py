"""Batches in words, for error messages."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_LONG = 8  # how many items of a batch an error message describes


def describe(batch: Any) -> str:
    """Describe a batch briefly, for error messages."""
    if isinstance(batch, Tensor):
        return f"a {batch.dtype} tensor of shape {tuple(batch.shape)}".replace("torch.", "")
    if isinstance(batch, Mapping):
        items = [f"{key}: {describe(value)}" for key, value in itertools.islice(batch.items(), _LONG)]
        return "a mapping of " + _and_more(items, len(batch))
    if isinstance(batch, tuple | list):
        items = [describe(value) for value in batch[:_LONG]]
        if len(batch) > 1 and len({type(value) for value in batch}) == 1 and not isinstance(batch[0], Tensor):
            return f"a {type(batch).__name__} of {len(batch)} times {items[0]}"
        return f"a {type(batch).__name__} of ({_and_more(items, len(batch))})"
    return f"a {type(batch).__name__}"


def _and_more(items: Sequence[str], count: int) -> str:
    return ", ".join(items) + (f" and {count - len(items)} more" if count > len(items) else "")
