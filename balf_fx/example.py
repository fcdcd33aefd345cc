"""How a model was called, as plain data: enough to call it again with values that do not matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Description = Mapping[str, Any]


def describe(value: Any) -> Description | None:
    """Shapes and dtypes of the tensors in nested dicts, lists and tuples, and plain values; None for anything else."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if type(value) in (list, tuple):
        items = [describe(item) for item in value]
        return None if None in items else {type(value).__name__: items}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        entries = {key: describe(item) for key, item in value.items()}
        return None if None in entries.values() else {"dict": entries}
    return None


def rebuild(description: Description, device: torch.device) -> Any:
    """A value of that description; tensors hold ones, which are a token's number and leave a mask open."""
    if "shape" in description:
        return torch.ones(description["shape"], dtype=getattr(torch, description["dtype"]), device=device)
    if "list" in description or "tuple" in description:
        items = [rebuild(item, device) for item in description.get("list", description.get("tuple", ()))]
        return items if "list" in description else tuple(items)
    if "dict" in description:
        return {key: rebuild(item, device) for key, item in description["dict"].items()}
    return description["value"]
