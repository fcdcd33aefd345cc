"""All options of `balf_fx.compile` as options of a command."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import click

from balf_fx.api import plan
from balf_fx.engine.options import options_of
from balf_fx.errors import OptionError

SHARE = click.FloatRange(0, 1, min_open=True)
"""A fraction in (0, 1]."""

_SPECIAL = {"progress": "--quiet", "seed": "--seed", "validation": "--validation-samples"}
"""Options that commands have already, for both data and compression."""
_TYPES: Mapping[str, Any] = {
    "flops": SHARE,
    "params": SHARE,
    "latency": str,
    "energy": SHARE,
    "disagreement": SHARE,
    "divergence": SHARE,
    "confidence": SHARE,
    "allocation": str,
    "multiple_of": str,
    "memory": str,
    "checkpoint": str,
    "safetensors": str,
    "loss": str,
    "weights": str,
}
_FUNCTIONS = ("loss", "weights")
_NUMBERS = ("latency", "multiple_of")
"""The options that take a number or a word."""
_NAMES = {"weights": "position-weights"}
"""The options whose word is not their name: --weights takes the file of the model's weights."""
_PATTERNS = ("include", "exclude", "dense")
_TEXTS = {
    "allocation": 'How the budget is distributed over the layers: "budget" (least total loss), "uniform" (the same '
    'share of each layer\'s cost) or "energy" (the same share of each layer\'s energy). Or, without a budget, "free", '
    "or a file with the plan of a model of the same architecture: .json, or .safetensors from `compress`.",
    "checkpoint": "A folder for what is finished: the allocation, refitted layers, the result; and the statistics of "
    "`compress`, while `sweep` calibrates again. If the run is killed, the same command goes on from there. Another "
    "model, other options or other data are an error.",
    "refit": 'Whether to solve every layer again for the input that it has in the compressed model: "full" solves for '
    'the whole layer, "up" for left factors and biases only, "none" for nothing. By default, effort decides.',
}
"""The texts of options that are not quite what they are in Python."""


def setting_options(skip: Collection[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of `balf_fx.compile` except for some; `settings_from_command` takes them."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, each in reversed(options_of().items()):
            if name not in (*_SPECIAL, *skip):
                command = _option(name, each)(command)
        return command

    return decorate


def _option(name: str, each: dataclasses.Field[Any]) -> Callable[..., Any]:
    written, values = each.metadata["text"], each.metadata["values"]
    dashed, text = _NAMES.get(name, name.replace("_", "-")), _TEXTS.get(name, f"{written[0].upper()}{written[1:]}.")
    if {True, False} <= set(values) <= {True, False, None}:
        return click.option(f"--{dashed}/--no-{dashed}", name, default=each.default, show_default=True, help=text)
    if name in _PATTERNS:
        return click.option(f"--{dashed}", name, metavar="GLOB", multiple=True, help=f"{text} Repeatable.")
    words = [value for value in values if isinstance(value, str)]
    kind = _TYPES.get(name) or click.Choice(["none", *words] if False in values else words)
    metavar = "MODULE:FUNCTION" if name in _FUNCTIONS else None
    own = dashed.replace("-", "_")
    shown = False if each.default is None else str(each.default)
    return click.option(f"--{dashed}", own, type=kind, metavar=metavar, default=None, show_default=shown, help=text)


def settings_from_command(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a command's options to those of `balf_fx.compile`; options that were not given are left out."""
    found: dict[str, Any] = {}
    names = {word.replace("-", "_"): name for name, word in _NAMES.items()}
    for own, value in given.items():
        name = names.get(own, own)
        if value is None or value == ():
            continue
        if name in _FUNCTIONS:
            found[name] = _function(value)
        elif name in _NUMBERS:
            found[name] = _number_or_word(value)
        elif name == "allocation" and Path(value).suffix in (".json", ".safetensors"):
            found[name] = plan(value)
        elif name == "refit" and value == "none":
            found[name] = False
        else:
            found[name] = value
    return found


def _number_or_word(written: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(written)
    return written


def _function(written: str) -> Any:
    """Import the function named by MODULE:FUNCTION."""
    module, _, name = written.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(f"there is no function {written!r}; write it as MODULE:FUNCTION: {error}") from error
