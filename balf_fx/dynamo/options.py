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
from balf_fx.errors import OptionError
from balf_fx.files.restore import Stored
from balf_fx.files.storage import read
from balf_fx.graph.curves import Rank
from balf_fx.passes import Allocate, Score
from balf_fx.passes.allocate import Method, allocate_for
from balf_fx.passes.score import Factors

Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


@dataclass(frozen=True)
class BackendOptions:
    """What a user can say.

    Attributes:
        flops, params, allocation, energy, centred, split, fold_batchnorm, include, exclude, strict: as in
            `balf_fx.compile`, where the whole model is all that Dynamo captured.
        factors: "activations", "sensitivity", which runs every calibration call a second time, with the gradients of
            what each graph returns, or "svd".
        seed: of the random probes of sensitivity.
        calibration_steps: how many calls of the model run uncompressed and are observed.
        inner: the backend that compiles the compressed graphs, by name or as a callable.
        mode, inner_options: for the inner backend, as `torch.compile` takes them.
        plan: from `balf_fx.backend.plan`, or the path of a file that `balf_fx.save` has written, in place of a budget
            and of calibration.
    """

    flops: float | None = None
    params: float | None = None
    factors: Factors = "activations"
    allocation: Method | Mapping[str, Rank] = "budget"
    energy: float | None = None
    centred: bool = True
    split: bool = True
    fold_batchnorm: bool = True
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    strict: bool = True
    seed: int = 0
    calibration_steps: int = 16
    inner: str | Compiler = "inductor"
    mode: str | None = None
    inner_options: Mapping[str, Any] | None = None
    plan: Stored | str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.plan is None:
            _ = self.score, self.allocate  # these check what they are given
        elif self.flops is not None or self.params is not None or self.energy is not None:
            raise OptionError("a plan leaves nothing to a budget: give one of them")
        elif self.stored is not None:
            _check_layerwise(self.stored)
        if self.factors == "air":
            raise OptionError(
                "factors='air' needs the gradients of weights, which the backend does not gather: 'activations', or "
                "'sensitivity'"
            )
        steps = self.calibration_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise OptionError(f"calibration_steps is a whole number of calls, 1 or more, not {steps!r}")
        if self.mode is not None and self.inner_options is not None:
            raise OptionError("give mode or inner_options: torch.compile takes one of them")
        _ = self.compiler

    @cached_property
    def stored(self) -> Stored | None:
        """The plan, read from its file."""
        if self.plan is None or isinstance(self.plan, Stored):
            return self.plan
        if isinstance(self.plan, str | os.PathLike):
            return read(self.plan)
        raise OptionError(f"plan is what balf_fx.backend.plan returns, or a path, not {self.plan!r}")

    @cached_property
    def score(self) -> Score:
        return Score(self.factors, self.centred, self.split)

    @cached_property
    def allocate(self) -> Allocate:
        return allocate_for(
            self.allocation,
            flops=self.flops,
            params=self.params,
            energy=self.energy,
            strict=self.strict,
            sensitive=self.factors == "sensitivity",
        )

    @cached_property
    def compiler(self) -> Compiler:
        """The inner backend with its own options, as `torch.compile` would call it."""
        return _inner_compiler(self.inner, self.mode, self.inner_options)

    def compile(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Hand a graph to the inner backend while the model runs.

        A graph with open sizes goes through torch.compile, which guards whatever the inner backend assumes of them.
        """
        if not is_dynamic(graph_module):
            return self.compiler(graph_module, list(inputs))
        options = None if self.inner_options is None else dict(self.inner_options)
        compiled: Callable[..., Any] = torch.compile(
            graph_module, backend=self.inner, mode=self.mode, options=options, dynamic=True
        )
        return compiled


def _check_layerwise(stored: Stored) -> None:
    """Refuse what does more than put two layers in place of one: graphs come one by one here."""
    unlike = [f"{width.name} ({width.kind})" for width in stored.plan.widths]
    unlike += [layer.name for layer in stored.plan.layers if layer.rank is None]
    if unlike:
        raise OptionError(
            f"the plan changes more than ranks, at {', '.join(unlike[:5])}: read it with balf_fx.load, and compile "
            "what that returns; or make it with widths=False and refit=False"
        )


def parse_options(given: Mapping[str, Any]) -> BackendOptions:
    """Check what the user wrote.

    Raises:
        OptionError: names what is wrong and lists the options that there are.
    """
    names = [field.name for field in dataclasses.fields(BackendOptions)]
    unknown = sorted(set(given) - set(names))
    try:
        if unknown:
            raise OptionError(f"there is no option {', '.join(map(repr, unknown))}")
        return BackendOptions(**given)
    except OptionError as error:
        raise OptionError(
            f'{error}. The options of torch.compile(backend="balf", options={{...}}) are: {", ".join(names)}'
        ) from None


def _inner_compiler(inner: str | Compiler, mode: str | None, options: Mapping[str, Any] | None) -> Compiler:
    from torch._dynamo.backends.registry import lookup_backend  # imports every backend of torch: only when needed
    from torch._dynamo.exc import InvalidBackend

    if inner == "balf" or not (isinstance(inner, str) or callable(inner)):
        raise OptionError(f"inner is the name of another backend or a callable, not {inner!r}")
    if inner == "inductor":
        wrapped: Compiler = torch._TorchCompileInductorWrapper(mode, None if options is None else dict(options), None)
        return wrapped
    try:
        backend: Any = lookup_backend(inner)
    except InvalidBackend as error:
        raise OptionError(f"inner: {error}") from None
    given = {"mode": mode, "options": options}
    return partial(backend, **{name: value for name, value in given.items() if value is not None})
