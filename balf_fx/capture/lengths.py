"""`len(tensor)` in a model's code: Python wants a number for it, to which torch.export would fix the batch size."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def symbolic_lengths(model: nn.Module) -> Iterator[None]:
    """Let `len(tensor)` return the symbolic size in the files that define the model's classes.

    For anything else, `len` there is the builtin one, so that code that runs at the same time is not affected.
    """
    changed = [names for names in _globals(model) if "len" not in names]
    for names in changed:
        names["len"] = _length
    try:
        yield
    finally:
        for names in changed:
            del names["len"]


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else builtins.len(value)


def _globals(model: nn.Module) -> list[dict[str, Any]]:
    """The global names of the user's code in the model's classes, each once."""
    classes = {base for module in model.modules() for base in type(module).__mro__ if issubclass(base, nn.Module)}
    members = [member for each in classes for member in vars(each).values()]
    members += [value for module in model.modules() for value in vars(module).values()]
    functions = [inspect.unwrap(getattr(each, "__func__", each)) for each in members if callable(each)]
    found = [function.__globals__ for function in functions if inspect.isfunction(function)]
    own = [names for names in found if not str(names.get("__name__")).startswith("torch.")]
    return list({id(names): names for names in own}.values())
