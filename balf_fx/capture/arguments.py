"""The arguments of a model's call as plain data, enough to call it again with arbitrary values."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from balf_fx.calibration.batches import Forward, holds_tensor, run_batch
from balf_fx.capture.contexts import Autocast
from balf_fx.errors import CalibrationError, CaptureError


@dataclass(frozen=True)
class Call:
    """One call of a model.

    Items of `*args` have the names args_0, args_1 and so on, and those of `**kwargs` their own.

    Attributes:
        supplied: the arguments by name, those given by position first; copies, so that no two share memory.
        defaults: the arguments that the call leaves to their defaults.
        positional: how many are given by position.
        unrolled: for each starred parameter of `forward`, the names of its items.
        output: what the model returned.
        autocast: the contexts of autocast in which it was called.
    """

    supplied: Mapping[str, Any]
    defaults: Mapping[str, Any]
    positional: int
    unrolled: Mapping[str, tuple[str, ...]]
    output: Any
    autocast: tuple[Autocast, ...] = ()

    def input(self, name: str) -> Any:
        """The value of a graph's input in the call: None for a default that holds tensors, which the graph holds."""
        if name in self.supplied:
            return self.supplied[name]
        return None if holds_tensor(self.defaults[name]) else self.defaults[name]

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments without tensors, and those that the call leaves to their defaults."""
        given = {name: value for name, value in self.supplied.items() if not holds_tensor(value)}
        return {**given, **self.defaults}

    @property
    def by_position(self) -> dict[str, Any]:
        """The arguments that are given by position."""
        return dict(list(self.supplied.items())[: self.positional])

    @property
    def by_keyword(self) -> dict[str, Any]:
        """The arguments that are given by keyword."""
        return dict(list(self.supplied.items())[self.positional :])

    def description(self) -> dict[str, Any] | None:
        """The arguments as stored in `graph.annotation.Origin`."""
        positional, keywords = describe(tuple(self.by_position.values())), describe(self.by_keyword)
        return None if positional is None or keywords is None else {"positional": positional, "keywords": keywords}


def record_call(model: nn.Module, batch: Any, forward: Forward) -> Call:
    """Run one batch and record how `forward` calls the model, whose inputs are copied.

    Raises:
        CalibrationError: the model cannot run the batch, or `forward` does not call it.
        CaptureError: a keyword argument has no name that Python allows for a parameter.
    """
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Any] = []
    around: list[tuple[Autocast, ...]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given.append(copied((args, kwargs)))
        around.append(tuple(_autocasts(model)))
        return copied((args, kwargs))  # the model may write to them

    def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)

    handles = [model.register_forward_pre_hook(keep, with_kwargs=True), model.register_forward_hook(note)]
    try:
        run_batch(model, batch, forward, index=0)
    finally:
        for handle in handles:
            handle.remove()
    if not outputs:
        raise CalibrationError("forward(model, batch) did not call the model")
    call = _call(inspect.signature(model.forward), *given[0], outputs[0])
    return replace(call, autocast=around[0])


def _autocasts(model: nn.Module) -> Iterator[Autocast]:
    """The contexts of autocast for the devices of a model that are active now."""
    for device in sorted({parameter.device.type for parameter in model.parameters()} - {"meta"}):
        if torch.is_autocast_enabled(device):
            yield device, torch.get_autocast_dtype(device), True, torch.is_autocast_cache_enabled()


def _call(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
    bound = signature.bind(*args, **kwargs)
    supplied: dict[str, Any] = {}
    unrolled: dict[str, tuple[str, ...]] = {}
    for name, parameter in signature.parameters.items():
        items = {name: bound.arguments[name]} if name in bound.arguments else {}
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            items = {f"{name}_{index}": item for index, item in enumerate(items.get(name, ()))}
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            items = dict(items.get(name, {}))
        if parameter.kind in _STARRED:
            unrolled[name] = tuple(items)
        wrong = [each for each in items if each in supplied or each in kwargs.keys() - items.keys() or not _legal(each)]
        if wrong:
            raise CaptureError(f"the argument {wrong[0]!r} of forward(*args, **kwargs) cannot be the name of an input")
        supplied |= items
    bound.apply_defaults()
    defaults = {name: value for name, value in bound.arguments.items() if name not in {**supplied, **unrolled}}
    return Call(supplied, defaults, len(args), unrolled, output)


_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _legal(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def copied(values: Any) -> Any:
    """Nested values with a copy of each tensor; tensors made in inference mode become ordinary ones."""
    return pytree.tree_map_only(Tensor, torch.clone, values)


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
