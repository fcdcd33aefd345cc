"""Capture by symbolic tracing: forward runs once on proxies, and modules of torch.nn are not traced into."""

from __future__ import annotations

import inspect
import keyword
import linecache
import operator
import os
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict

from balf_fx.calibration.batches import MODEL_ERRORS, holds_tensor
from balf_fx.capture.names import rename_illegal
from balf_fx.errors import CaptureError
from balf_fx.graph.operators import AUGMENTED

_OWN_PATHS = tuple(
    f"{folder}{os.sep}"  # torchvision lies beside torch, and its code is the user's
    for folder in (Path(torch.__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2] / "passes")
)


def trace(model: nn.Module, constants: Mapping[str, Any], unrolled: Mapping[str, Sequence[str]]) -> fx.GraphModule:
    """Trace a model symbolically.

    Args:
        model: its modules become those of the graph, under other names where a GraphModule cannot have theirs.
        constants: arguments of forward with a fixed value, which is asserted in the graph.
        unrolled: for each starred parameter of forward, the names of its items, which become inputs.

    Raises:
        CaptureError: the model cannot be traced; names the line.
    """
    tracer = _Tracer(constants, unrolled)
    before = _state(model)
    _take_replaced_forward(model)
    try:
        graph = tracer.trace(model)
    except MODEL_ERRORS as error:  # TraceError is a ValueError
        raise CaptureError(
            f"{type(model).__name__} cannot be traced symbolically: {user_line(error)}{error}. Move data-dependent "
            "control flow out of the traced module, for instance into a function wrapped with torch.fx.wrap"
        ) from error
    if _state(model) != before:  # they are no proxies, so that the graph would hold their values as constants
        raise CaptureError(
            f"{type(model).__name__} cannot be traced symbolically: buffers are state that forward changes"
        )
    rename_illegal(model, graph)
    return fx.GraphModule(model, plain(graph), type(model).__name__)


def _take_replaced_forward(model: nn.Module) -> None:
    """Let the class have a forward that was replaced on the instance, since FX traces that of the class."""
    replaced = vars(model).get("forward")
    if replaced is None:
        return
    if getattr(replaced, "__self__", None) is not model:
        raise CaptureError(
            f"{type(model).__name__} cannot be traced symbolically: its forward was replaced on the instance by "
            "something else than a method. Replace it by types.MethodType(function, model), or define it in a class"
        )
    model.__class__ = type(type(model).__name__, (type(model),), {"forward": replaced.__func__})
    del model.forward


def _state(model: nn.Module) -> list[tuple[str, int, int]]:
    """The identity and the version of every buffer, in place of which forward may have put a proxy."""
    counted = (
        (name, buffer, type(buffer) is Tensor and not buffer.is_inference()) for name, buffer in model.named_buffers()
    )
    return [(name, id(buffer), buffer._version if counts else 0) for name, buffer, counts in counted]


def plain(graph: fx.Graph) -> fx.Graph:
    """A copy that can be pickled: without a tracer, and without type annotations that are strings."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    optional = False
    for node in copied.nodes:
        if node.op == "placeholder" and optional and not node.args:  # Python wants a default behind another default
            node.args = (None,)
        optional |= node.op == "placeholder" and bool(node.args)
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


def arguments_of(kind: Any, fields: dict[Any, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments with which a class of dictionaries makes one of these fields; None if a plain one has to do."""
    if kind in (dict, immutable_dict):
        return None
    if all(isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key) for key in fields):
        return (), fields
    pairs = [*fields.items()]
    made_from_pairs: dict[Any, tuple[Any, ...]] = {OrderedDict: (pairs,), defaultdict: (None, pairs)}
    return (made_from_pairs[kind], {}) if kind in made_from_pairs else None


class _Proxy(fx.Proxy):
    """A proxy that also records changes of its items and augmented assignments, which change tensors in place."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _recorded(function: Any) -> Any:
    def assign(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return assign


for _function in AUGMENTED:
    setattr(_Proxy, f"__{_function.__name__}__", _recorded(_function))


class _Tracer(fx.Tracer):
    """Symbolic tracing with constant values for some arguments of forward, and a fixed number of starred ones."""

    def __init__(self, constants: Mapping[str, Any], unrolled: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.constants, self.unrolled = constants, unrolled

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> tuple[Any, list[Any]]:
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        return function, [self._specialise(argument) for argument in arguments]

    def _specialise(self, argument: Any) -> Any:
        if not isinstance(argument, fx.Proxy):
            return argument
        node = argument.node
        name = str(node.target)
        if name.startswith("*"):
            names = self.unrolled[name.lstrip("*")]
            with self.graph.inserting_before(node if name.startswith("**") else self._first_by_keyword(node)):
                items = {item: self.create_proxy("placeholder", item, (), {}) for item in names}
            self.graph.erase_node(node)
            specialised = {item: self._specialise(proxy) for item, proxy in items.items()}
            return specialised if name.startswith("**") else tuple(specialised.values())
        if name not in self.constants:
            return argument
        value = self.constants[name]
        if holds_tensor(value):  # a default, which no code could name: any other value is refused
            node.args, guarded = (None,), None
        else:
            guarded = value
        guard_constant(self.graph, node, guarded)
        return value

    def create_arg(self, a: Any) -> Any:
        """A dictionary of another class, such as the outputs of transformers, is built by a call of its class."""
        if not isinstance(a, dict) or type(a) is dict:
            return super().create_arg(a)
        fields = {key: self.create_arg(value) for key, value in a.items()}
        arguments = arguments_of(type(a), fields)
        if arguments is None:
            return fields
        node = self.create_node("call_function", type(a), *arguments)
        node.meta["is_wrapped"] = True  # FX must not trace into it when it traces the code again, as unpickling does
        return node

    def _first_by_keyword(self, starred: fx.Node) -> fx.Node:
        """The first input that can only be given by keyword, and so comes behind the items of `*args`."""
        parameters = inspect.signature(self.root.forward).parameters.values()
        names = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
        inputs = self.graph.find_nodes(op="placeholder")
        return next((node for node in inputs if node.target in names), starred)
