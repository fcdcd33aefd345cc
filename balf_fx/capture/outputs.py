"""The output of an exported graph in the model's own containers."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from balf_fx.capture.tracing import arguments_of
from balf_fx.errors import CaptureError


def nested(graph: fx.Graph, value: Any) -> Any:
    """An output that contains nodes; containers that FX does not support are built by a call of their class.

    Raises:
        CaptureError: it is in a container whose arguments are not known.
    """
    if isinstance(value, dict):
        fields = {key: nested(graph, item) for key, item in value.items()}
        arguments = arguments_of(type(value), fields)
        return fields if arguments is None else _construct(graph, type(value), *arguments)
    if isinstance(value, list | tuple):
        items = [nested(graph, item) for item in value]
        if type(value) in (list, tuple):
            return type(value)(items)
        return _construct(graph, type(value), tuple(items))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return _construct(graph, type(value), (), {name: nested(graph, getattr(value, name)) for name in names})
    if type(value) in pytree.SUPPORTED_NODES:
        raise CaptureError(
            f"an output is of type {type(value).__name__}, which a graph cannot build: return tensors in a list, a "
            "tuple, a dict or a dataclass, or try capture='symbolic_trace'"
        )
    return value


def _construct(
    graph: fx.Graph, container: type, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> fx.Node:
    node = graph.call_function(container, args, kwargs)
    node.meta["is_wrapped"] = True  # FX must not trace into it when it traces the code again, as unpickling does
    return node
