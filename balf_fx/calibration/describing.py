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
        return with_article(f"{batch.dtype} tensor of shape {tuple(batch.shape)}".replace("torch.", ""))
    if isinstance(batch, Mapping):
        items = [f"{key}: {describe(value)}" for key, value in itertools.islice(batch.items(), _LONG)]
        return f"a mapping of {_and_more(items, len(batch))}" if items else "an empty mapping"
    kind = with_article(type(batch).__name__)
    if isinstance(batch, tuple | list):
        items = [describe(value) for value in batch[:_LONG]]
        if len(batch) > 1 and len({type(value) for value in batch}) == 1 and not isinstance(batch[0], Tensor):
            return f"{kind} of {len(batch)} times {items[0]}"
        return f"{kind} of ({_and_more(items, len(batch))})"
    return kind


def with_article(noun: str) -> str:
    """A noun, such as the name of a type, with "a" or "an"."""
    return f"{'an' if noun[0].lower() in 'aeio' else 'a'} {noun}"


def _and_more(items: Sequence[str], count: int) -> str:
    return ", ".join(items) + (f" and {count - len(items)} more" if count > len(items) else "")
