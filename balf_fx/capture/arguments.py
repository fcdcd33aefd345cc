"""The arguments of a model's call as plain data, enough to call it again with arbitrary values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from balf_fx.calibration.batches import Forward, run_batch
from balf_fx.errors import CalibrationError


@dataclass(frozen=True)
class Call:
    """One call of a model: its arguments by parameter name, the number of positional ones, and the output."""

    supplied: Mapping[str, Any]
    defaults: Mapping[str, Any]
    positional: int
    output: Any

    def value(self, name: str) -> Any:
        """The value of an argument in the call."""
        return self.supplied[name] if name in self.supplied else self.defaults[name]

    def description(self) -> dict[str, Any] | None:
        """The arguments as stored in `graph.annotation.Origin`."""
        names = list(self.supplied)
        positional = describe(tuple(self.supplied[name] for name in names[: self.positional]))
        keywords = describe({name: self.supplied[name] for name in names[self.positional :]})
        return None if positional is None or keywords is None else {"positional": positional, "keywords": keywords}


def record_call(model: nn.Module, batch: Any, forward: Forward) -> Call:
    """Run one batch and record how `forward` calls the model."""
    calls: list[Call] = []
    signature = inspect.signature(model.forward)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        supplied = dict(bound.arguments)
        bound.apply_defaults()
        defaults = {name: value for name, value in bound.arguments.items() if name not in supplied}
        calls.append(Call(supplied, defaults, len(args), output))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        run_batch(model, batch, forward, index=0)
    finally:
        handle.remove()
    if not calls:
        raise CalibrationError("forward(model, batch) did not call the model")
    return calls[0]


Description = Mapping[str, Any]


def describe(value: Any) -> Description | None:
    """Describe nested dicts, lists and tuples by the shapes and dtypes of tensors and by plain values.

    Returns None if the value contains anything else.
    """
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
    """A value with this description; tensors are filled with ones, which are valid token ids and mask nothing."""
    if "shape" in description:
        return torch.ones(description["shape"], dtype=getattr(torch, description["dtype"]), device=device)
    if "list" in description or "tuple" in description:
        items = [rebuild(item, device) for item in description.get("list", description.get("tuple", ()))]
        return items if "list" in description else tuple(items)
    if "dict" in description:
        return {key: rebuild(item, device) for key, item in description["dict"].items()}
    return description["value"]
