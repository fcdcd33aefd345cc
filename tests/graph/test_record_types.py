"""Records that were read from data hold what their annotations say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from balf_fx.graph.record_types import check_types


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    number: float = 1.0
    word: Literal["a", "b"] = "a"
    maybe: int | None = None
    flag: bool = False
    pair: tuple[int, str] = (1, "x")
    inner: Inner | None = None
    listed: tuple[Inner, ...] = ()
    named: Mapping[str, int] | None = None
    anything: Any = None


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"number": 3, "maybe": 3, "anything": [len]},
        {"inner": Inner(()), "listed": (Inner(), Inner((3,))), "named": {"a": 1}},
    ],
    ids=str,
)
def test_what_fits_is_taken(given):
    check_types(replace(Outer(), **given))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("number", value) for value in ("1", None, True)),
        *(("maybe", value) for value in (1.5, "1", [])),
        *(("word", value) for value in ("c", None, [])),
        *(("flag", value) for value in (0, None)),
        *(("pair", value) for value in ((1,), (1, 2), [1, "x"])),
        *(("inner", value) for value in ({}, Inner((1.5,)), Inner(None))),
        *(("listed", value) for value in ([Inner()], (Inner("x"),), ({},))),
        *(("named", value) for value in ({1: 1}, {"a": "b"}, [])),
    ],
)
def test_what_does_not_fit_is_named(name, value):
    with pytest.raises(TypeError, match="cannot be"):
        check_types(replace(Outer(), **{name: value}))
