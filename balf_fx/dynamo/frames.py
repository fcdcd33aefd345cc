"""Access to TorchDynamo: graphs whose weights are inputs, and the call of `torch.compile` that caused a compilation.

Dynamo passes a backend a graph of functional calls that takes the model's parameters and buffers as inputs. `lift`
turns these into attributes, the very same tensors, so that the graph has the form of one from `torch.export`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator

from balf_fx.capture.names import legal_path
from balf_fx.graph.annotation import annotate
from balf_fx.graph.operators import trains

_REGISTRIES = ("_modules", "_parameters", "_buffers", "__closure__", "cell_contents", "__dict__", "_orig_mod")
_ROOTS = ("self", "fn")  # the module's name in its own methods, and in the function with which torch wraps its modules
_POSITIONAL = re.compile(r"L\['args'\]\[(\d+)\]")  # the source of a positional argument of a wrapper
_WRAPPED = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable")  # the latter in torch 2.8


@dataclass(frozen=True)
class WeightInput:
    """An input of a graph that takes a parameter or buffer: its position, and the dotted name of the weight."""

    position: int
    name: str


@dataclass(frozen=True)
class Request:
    """The origin of the current compilation.

    Attributes:
        owner: the object that one call of `torch.compile` created, or None outside Dynamo.
        frame: the code of the Python frame that is compiled, the same for all its recompilations. Dynamo's own number
            of the frame differs between threads that compile it at once.
        module: the module whose method the frame runs, or None.
        arguments: the names of the positional arguments that the frame, a wrapper of a module's `forward`, passes on as
            `*args`; empty for other frames.
    """

    owner: object | None
    frame: CodeType | None
    module: nn.Module | None
    arguments: tuple[str, ...] = ()


def current_request() -> Request:
    """Dynamo's current compilation on this thread."""
    try:
        translator: Any = InstructionTranslator.current_tx()
    except AttributeError:  # no frame has been translated on this thread yet
        translator = None
    if translator is None:
        return Request(None, None, None)
    given = translator.f_locals.get("args")
    args = given if isinstance(given, tuple) else ()
    roots = (*(translator.f_locals.get(name) for name in _ROOTS), *args[:1])
    module = next((root for root in roots if isinstance(root, nn.Module)), None)
    owner = innermost_backend(translator.output.compiler_fn)
    return Request(owner, translator.f_code, module, _arguments(module, args) if args else ())


def _arguments(module: nn.Module | None, args: tuple[Any, ...]) -> tuple[str, ...]:
    """The names of the arguments `*args` of a method's wrapper, among which the module itself may be the first."""
    if module is None:
        return ()
    names = tuple(inspect.signature(module.forward).parameters)
    return ("self", *names) if args[0] is module else names


def name_arguments(graph_module: fx.GraphModule, names: Sequence[str]) -> None:
    """Record the names of the arguments that the inputs take which Dynamo knows by their position."""
    for node in graph_module.graph.find_nodes(op="placeholder"):
        found = _POSITIONAL.fullmatch(_source_name(node))
        if found is not None and int(found[1]) < len(names):
            annotate(node, argument=names[int(found[1])])


def innermost_backend(backend: Any) -> Any:
    """The backend that was passed to Dynamo, without Dynamo's wrappers."""
    for name in _WRAPPED:
        if hasattr(backend, name):
            return innermost_backend(getattr(backend, name))
    return backend


def owner_of(compiled: Any) -> object | None:
    """The object that `torch.compile` created for this compiled module or function; None if it is not compiled."""
    held = [getattr(compiled, "dynamo_ctx", None)]
    function = getattr(compiled, "_compiled_call_impl", None) or compiled  # module.compile() leaves a function there
    held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    for item in held:
        found: object = innermost_backend(getattr(item, "callback", item))
        if isinstance(found, torch._TorchCompileWrapper):
            return found
    return None


def weight_inputs(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[WeightInput, ...]:
    """The inputs that take parameters or buffers of modules.

    Tensor subclasses, such as quantized weights, are left out.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    found = []
    for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        source = _source_name(node)
        buffer = type(value) is Tensor and "._buffers[" in source
        if buffer or (isinstance(value, nn.Parameter) and type(value.data) is Tensor):
            found.append(WeightInput(position, weight_name(source or node.name)))
    return tuple(found)


def _source_name(node: fx.Node) -> str:
    """The Python expression by which Dynamo found an input, or "" if Dynamo does not record it."""
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method until torch 2.9, a property since


def weight_name(source: str) -> str:
    """The dotted name of a weight: `L['self']._modules['head']._parameters['weight']` is "head.weight"."""
    words = [word for word in re.findall(r"\w+", source.replace("__closure__[0]", "")) if word not in _REGISTRIES]
    scoped = words[1:] if words[:1] in (["L"], ["G"]) else words
    path = scoped[1:] if scoped[0] in _ROOTS and len(scoped) > 1 else scoped
    return legal_path(".".join(path))


def lift(graph_module: fx.GraphModule, weights: Mapping[int, tuple[str, Tensor]]) -> fx.GraphModule:
    """A copy of the graph that holds its weights.

    Args:
        graph_module: is not changed.
        weights: {position of the input: (dotted name, weight)}.

    Returns:
        A graph that takes the remaining inputs in their order. Nodes are annotated with the shapes that Dynamo
        recorded.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    lifted = fx.GraphModule(graph_module, graph, "Region").eval()
    placeholders = lifted.graph.find_nodes(op="placeholder")
    start = next(node for node in lifted.graph.nodes if node.op != "placeholder")
    with lifted.graph.inserting_before(start):
        for position, (name, weight) in weights.items():
            _hold(lifted, name, weight)
            fetched = lifted.graph.get_attr(name)
            placeholders[position].replace_all_uses_with(fetched)
            fetched.meta.update(placeholders[position].meta)
            lifted.graph.erase_node(placeholders[position])
    for node in lifted.graph.nodes:
        node.meta.pop("grapharg", None)  # used by Dynamo only, and it keeps the inputs alive
        value = node.meta.get("example_value")
        annotate(node, shape=tuple(value.shape) if isinstance(value, Tensor) else None)
    lifted.graph.lint()
    lifted.recompile()
    return lifted


def _hold(module: nn.Module, path: str, weight: Tensor) -> None:
    *owners, name = path.split(".")
    for owner in owners:
        if owner not in module._modules:
            module.add_module(owner, nn.Module())
        module = module.get_submodule(owner)
    if isinstance(weight, nn.Parameter):
        module.register_parameter(name, weight)
    else:
        module.register_buffer(name, weight)


def is_dynamic(graph_module: fx.GraphModule) -> bool:
    """Whether an input of the graph has a symbolic size or is a symbolic number."""
    values = [node.meta.get("example_value") for node in graph_module.graph.find_nodes(op="placeholder")]
    sizes = [size for value in values for size in (value.shape if isinstance(value, Tensor) else (value,))]
    return any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes)


def is_training(graph_module: fx.GraphModule) -> bool:
    """Whether a layer is in training mode: active dropout, or BatchNorm with the statistics of the batch."""
    return any(map(trains, graph_module.graph.nodes))
