"""The options of `torch.compile(model, backend="balf", options={...})`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx

from balf_fx.dynamo.frames import is_dynamic
from balf_fx.engine.options import options_of
from balf_fx.engine.settings import Settings
from balf_fx.errors import OptionError
from balf_fx.files.restore import Stored
from balf_fx.files.storage import read

Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]

_WHOLE = "it is measured on outputs of the whole model, which balf_fx.compile has"
_ELSEWHERE = {
    "capture": "Dynamo captures the graphs",
    "result": "the result is the compiled model",
    "safetensors": "the model runs, so it must have its weights",
    "distributed": "each process compiles its own calls; balf_fx.compile compresses one model in several processes",
    **dict.fromkeys(("disagreement", "divergence", "validation", "confidence", "minimise"), _WHOLE),
}
"""Options of `compile` that the backend does not have, and why."""


@dataclass(frozen=True)
class BackendOptions:
    """All options of `balf_fx.compile`, and those of the backend alone.

    Attributes:
        settings: as in `balf_fx.compile`, where the whole model is everything that Dynamo captured.
            `loss(output, inputs)` gets the output of the graphs and the arguments of the first one, and
            `weights(inputs)` gets these arguments.
        calibration_steps: the number of calls of the model that run uncompressed and are recorded.
        inner: the backend that compiles the compressed graphs, as a name or a callable.
        mode, inner_options: `mode` and `options` of `torch.compile` for the inner backend.
        plan: the result of `balf_fx.backend.plan`, or the path of a file written by `balf_fx.save`, in place of a
            budget and calibration.
    """

    settings: Settings
    calibration_steps: int = 16
    inner: str | Compiler = "inductor"
    mode: str | None = None
    inner_options: Mapping[str, Any] | None = None
    plan: Stored | str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.plan is None:
            self.settings.allocate()  # checks the budget
        elif self._replaced:
            listed = ", ".join(self._replaced)
            raise OptionError(
                f"a plan cannot be combined with a budget or with options that it replaces: drop {listed}"
            )
        else:
            _ = self.stored
        steps = self.calibration_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise OptionError(f"calibration_steps must be a whole number of calls, 1 or more, not {steps!r}")
        if self.mode is not None and self.inner_options is not None:
            raise OptionError("give either mode or inner_options: torch.compile takes only one of them")
        _ = self.compiler

    @property
    def _replaced(self) -> list[str]:
        """The options with other values than their defaults that a plan leaves without effect."""
        changed = [
            each.name
            for owner in (self.settings, self)
            for each in dataclasses.fields(owner)
            if each.name in (*options_of(), "calibration_steps") and getattr(owner, each.name) != each.default
        ]
        return [name for name in changed if name != "progress"]

    @cached_property
    def stored(self) -> Stored | None:
        """The plan, read from its file if it is a path."""
        if self.plan is None or isinstance(self.plan, Stored):
            return self.plan
        if isinstance(self.plan, str | os.PathLike):
            return read(self.plan)
        raise OptionError(
            f"plan must be the result of balf_fx.backend.plan or a path, not of type {type(self.plan).__name__}"
        )

    @cached_property
    def compiler(self) -> Compiler:
        """The inner backend with its own options, as `torch.compile` would call it."""
        return _inner_compiler(self.inner, self.mode, self.inner_options)

    def compile(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph with the inner backend while the model runs.

        A graph with symbolic sizes is compiled by torch.compile, which guards what the inner backend assumes of them.
        """
        if not is_dynamic(graph_module):
            return self.compiler(graph_module, list(inputs))
        options = None if self.inner_options is None else dict(self.inner_options)
        compiled: Callable[..., Any] = torch.compile(
            graph_module, backend=self.inner, mode=self.mode, options=options, dynamic=True
        )
        return compiled


def parse_options(given: Mapping[str, Any]) -> BackendOptions:
    """Check the user's options.

    Raises:
        OptionError: an option is wrong; the message says how, and lists all options.
    """
    own = [field.name for field in dataclasses.fields(BackendOptions) if field.name != "settings"]
    shared = [name for name in options_of() if name not in _ELSEWHERE]
    try:
        for name in given:
            if name in _ELSEWHERE:
                raise OptionError(f"{name!r} is not an option here: {_ELSEWHERE[name]}")
            if name not in (*shared, *own):
                raise OptionError(f"there is no option {name!r}")
        settings = Settings(**{name: value for name, value in given.items() if name in shared})
        settings = settings if given.get("plan") is not None else settings.with_free()
        return BackendOptions(settings, **{name: value for name, value in given.items() if name in own})
    except OptionError as error:
        listed = ", ".join((*shared, *own))
        raise OptionError(
            f'{error}. The options of torch.compile(backend="balf", options={{...}}) are: {listed}'
        ) from None


def _inner_compiler(inner: str | Compiler, mode: str | None, options: Mapping[str, Any] | None) -> Compiler:
    from torch._dynamo.backends.registry import lookup_backend  # imports every backend of torch: only when needed
    from torch._dynamo.exc import InvalidBackend

    if inner == "balf" or not (isinstance(inner, str) or callable(inner)):
        raise OptionError(f"inner must be the name of another backend or a callable, not {inner!r}")
    if inner == "inductor":
        wrapped: Compiler = torch._TorchCompileInductorWrapper(mode, None if options is None else dict(options), None)
        return wrapped
    try:
        backend: Any = lookup_backend(inner)
    except InvalidBackend:
        raise OptionError(f"inner is {inner!r}, which is not among torch._dynamo.list_backends()") from None
    given = {"mode": mode, "options": options}
    return partial(backend, **{name: value for name, value in given.items() if value is not None})
