"""Records the inputs of a model's graphs in each call, until all graphs are compressed under one budget."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from balf_fx.calibration.batches import Loss
from balf_fx.calibration.weights import WeightsOf
from balf_fx.dynamo.binding import Binding
from balf_fx.engine.program import Link, Step, Trace
from balf_fx.refit.offload import Shelved


@dataclass(frozen=True)
class _Run:
    """One run of a graph in the current call."""

    binding: Binding
    args: tuple[Any, ...]
    links: tuple[Link, ...]
    outputs: list[weakref.ref[Tensor] | None] = field(default_factory=list)


class Recording:
    """Traces of the calls so far.

    Args:
        memory: bytes of inputs that are kept in memory; the rest are kept in temporary files.
    """

    def __init__(self, memory: int) -> None:
        self._calls: Shelved = Shelved(memory)  # traces whose parts are indices into `bindings`
        self._running: list[_Run] = []
        self.bindings: list[Binding] = []

    def begin(self) -> None:
        """Start to record a new call of the model."""
        if self._running:
            self._calls.append(self._trace())
        self._running = []

    def enter(self, binding: Binding, inputs: Sequence[Any]) -> _Run:
        """Store copies of the inputs of a graph that is about to run, since it may write to them."""
        links = tuple(self._links(inputs))
        return _Run(binding, cloned(inputs), links)

    def leave(self, run: _Run, output: Any) -> None:
        """Record the output of a graph that has run."""
        leaves = pytree.tree_leaves(output)
        run.outputs.extend(weakref.ref(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves)
        if run.binding not in self.bindings:
            self.bindings.append(run.binding)
        run.binding.calls += 1
        self._running.append(run)

    def traces(self) -> Sequence[Trace]:
        """The traces of all calls, including the current one."""
        self.begin()
        return self._calls

    def close(self) -> None:
        """Delete all recorded calls."""
        self._calls.close()
        self._running, self.bindings = [], []

    def _links(self, inputs: Sequence[Any]) -> Iterator[Link]:
        """Links for the inputs that are the very tensors that earlier graphs of the call returned."""
        known = {
            id(tensor): (step, output)
            for step, run in enumerate(self._running)
            for output, reference in enumerate(run.outputs)
            if reference is not None and (tensor := reference()) is not None
        }
        for leaf, value in enumerate(inputs):
            if isinstance(value, Tensor) and id(value) in known:
                yield Link(leaf, *known[id(value)])

    def _trace(self) -> Trace:
        return tuple(Step(self.bindings.index(run.binding), run.args, run.links) for run in self._running)


@contextmanager
def confirmed(
    graph_modules: Sequence[fx.GraphModule], traces: Sequence[Trace], memory: int
) -> Iterator[Sequence[Trace]]:
    """The traces without the links that a run of them contradicts, as for a value that was changed in between."""
    if not any(step.links for trace in traces for step in trace):
        yield traces
        return
    checked = Shelved(memory)
    for trace in traces:
        checked.append(_confirmed(graph_modules, trace))
    try:
        yield checked
    finally:
        checked.close()


def _confirmed(graph_modules: Sequence[fx.GraphModule], trace: Trace) -> Trace:
    returned = [pytree.tree_leaves(graph_modules[step.part](*step.args)) for step in trace]
    steps = []
    for step in trace:
        kept = tuple(link for link in step.links if _same(step.args[link.leaf], returned[link.step][link.output]))
        steps.append(step._replace(links=kept))
    return tuple(steps)


def cloned(values: Sequence[Any]) -> tuple[Any, ...]:
    """Copies of the values, which may be written to."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in values)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two values are equal up to rounding: attention is decomposed in one of the two graphs."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = float(one.abs().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


def on_inputs(loss: Loss | None) -> Loss | None:
    """The user's loss, called with the arguments of the model's first graph in place of a trace."""
    if loss is None:
        return None

    def of_inputs(output: Any, trace: Trace) -> Tensor:
        return loss(output, _first_inputs(trace))

    return of_inputs


def weights_of_inputs(weights: WeightsOf) -> WeightsOf:
    """The user's weights, called with the arguments of the model's first graph in place of a trace."""

    def of_inputs(trace: Trace) -> Tensor:
        return weights(_first_inputs(trace))

    return of_inputs


def _first_inputs(trace: Trace) -> Any:
    """The arguments of the first graph, without the sizes that Dynamo adds; the argument itself if there is one."""
    args = tuple(argument for argument in trace[0].args if not isinstance(argument, int | float))
    return args[0] if len(args) == 1 else args
