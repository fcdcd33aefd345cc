"""Checks of records that were read from data, which may hold values of any type."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def check_types(record: Any) -> None:
    """Check that a record's fields, and those of the records in it, are of the types that they are annotated with.

    Raises:
        TypeError: one is not; the message names it.
    """
    hints = typing.get_type_hints(type(record))
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if not _fits(value, hints[field.name]):
            raise TypeError(f"{field.name} cannot be {value!r}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; a whole number is a float, too, but True is no number."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and _all_fit(value, arguments)
    if origin is not None:
        pairs = value.items() if isinstance(value, Mapping) else None
        return pairs is not None and all(_all_fit(pair, arguments) for pair in pairs)
    return _is_a(value, kind)


def _all_fit(values: tuple[Any, ...], kinds: tuple[Any, ...]) -> bool:
    """Whether each value is of its type, or all are of the one that is followed by an ellipsis."""
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    return len(values) == len(kinds) and all(map(_fits, values, kinds))


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a plain type, or a record whose fields are of their types."""
    if isinstance(value, bool):
        return kind is bool
    if not isinstance(value, int | float if kind is float else kind):
        return False
    if dataclasses.is_dataclass(value):
        check_types(value)
    return True
