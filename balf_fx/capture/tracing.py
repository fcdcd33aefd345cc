"""Capture by symbolic tracing: forward runs once on proxies, and modules of torch.nn are not traced into."""

from __future__ import annotations

import linecache
import operator
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from balf_fx.calibration.batches import MODEL_ERRORS
from balf_fx.errors import CaptureError

_OWN_PATHS = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[2] / "passes"),
)


def trace(model: nn.Module, constants: Mapping[str, Any]) -> fx.GraphModule:
    """Trace a model symbolically.

    Args:
        model: its modules become those of the graph.
        constants: arguments of forward with a fixed value, which is asserted in the graph.

    Raises:
        CaptureError: the model cannot be traced; names the line.
    """
    tracer = _Tracer(constants)
    try:
        graph = tracer.trace(model)
    except MODEL_ERRORS as error:  # TraceError is a ValueError
        raise CaptureError(
            f"{type(model).__name__} cannot be traced symbolically: {user_line(error)}{error}. Move data-dependent "
            "control flow out of the traced module, for instance into a function wrapped with torch.fx.wrap"
        ) from error
    return fx.GraphModule(tracer.root, plain(graph), type(model).__name__)


def plain(graph: fx.Graph) -> fx.Graph:
    """A copy that can be pickled: without a tracer, and without type annotations that are strings."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in copied.nodes:
        node.type = None if isinstance(node.type, str) else node.type  # annotations are not evaluated in some files
    return copied


def guard_constant(graph: fx.Graph, node: fx.Node, constant: Any) -> None:
    """Assert in the graph that an argument equals its value at capture, if the two can be compared."""
    if constant is None or isinstance(constant, bool | int | float | str):
        same = graph.call_function(operator.eq, (node, constant))  # `is` would be lost when unpickling traces the code
        message = f"{node.target!r} was {constant!r} when the graph was captured and cannot be anything else"
        graph.call_function(torch._assert, (same, message))


def user_line(error: BaseException) -> str:
    """The innermost line of the user's own code in a traceback, as "file:line: `source`: "."""
    # Not extract_tb: it fails on frames without a line, which torch 2.8 produces.
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__) if line]
    own = [place for place in places if not place[0].startswith((*_OWN_PATHS, "<"))]
    return f"{own[-1][0]}:{own[-1][1]}: `{linecache.getline(*own[-1]).strip()}`: " if own else ""


class _Tracer(fx.Tracer):
    """Symbolic tracing with constant values for some arguments of forward."""

    def __init__(self, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.constants = constants

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> tuple[Any, list[Any]]:
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        return function, [self._specialise(argument) for argument in arguments]

    def _specialise(self, argument: Any) -> Any:
        name = str(argument.node.target).lstrip("*") if isinstance(argument, fx.Proxy) else ""
        if name not in self.constants:
            return argument
        if argument.node.target == name:
            guard_constant(self.graph, argument.node, self.constants[name])
        else:  # *args or **kwargs that are empty in the example: no input
            self.graph.erase_node(argument.node)
        return self.constants[name]
