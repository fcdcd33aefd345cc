"""The options of the functions for users, made from the fields of `Settings`."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from typing import Any, TypeVar

from balf_fx.engine.fields import Stage
from balf_fx.engine.settings import Settings
from balf_fx.errors import OptionError

_WRAPPER = textwrap.TextWrapper(120, initial_indent=" " * 8, subsequent_indent=" " * 12)
_F = TypeVar("_F", bound=Callable[..., Any])


def options_of(*stages: Stage) -> dict[str, dataclasses.Field[Any]]:
    """The options of some of the stages by name; all options if no stage is given."""
    found = dataclasses.fields(Settings)
    return {each.name: each for each in found if not stages or set(stages) & set(each.metadata["stages"])}


def settings_from(given: Mapping[str, Any], *stages: Stage) -> Settings:
    """Return the settings for a user's options.

    Args:
        stages: the stages whose options are allowed; all if none is given.

    Raises:
        OptionError: an option does not exist, belongs to another stage, or has a wrong value; an unknown name lists
            the options.
    """
    names = options_of(*stages)
    unknown = sorted(set(given) - set(names))
    if unknown:
        everywhere = options_of()
        elsewhere = sorted(
            {stage for name in unknown if name in everywhere for stage in everywhere[name].metadata["stages"]}
        )
        hint = f" (pass it to balf_fx.{' or balf_fx.'.join(elsewhere)})" if elsewhere else ""
        raise OptionError(
            f"there is no option {', '.join(map(repr, unknown))} here{hint}; the options are: {', '.join(names)}"
        )
    return Settings(**given)


def takes_settings(*stages: Stage, **defaults: Any) -> Callable[[_F], _F]:
    """Show the options in place of a function's `**options`: in its signature, and for {options} in its docstring.

    Args:
        stages: as in `settings_from`.
        defaults: options whose default differs for this function, with that default.
    """

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        found = {name: each for name, each in options_of(*stages).items() if name not in signature.parameters}
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name, None if each.default is MISSING else each.default),
                annotation=each.type,
            )
            for name, each in found.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        if function.__doc__ is not None:
            wrapped = (_WRAPPER.fill(f"{name}: {each.metadata['text']}.") for name, each in found.items())
            function.__doc__ = function.__doc__.replace("        {options}", "\n".join(wrapped))
        return function

    return decorate
