"""All that balf_fx knows of TorchDynamo: graphs whose weights are inputs, and who asked for a compilation.

Dynamo hands a backend a graph of functional calls that takes the model's parameters and buffers as inputs. `lift` turns
these into attributes, the very same tensors, so that the graph is what the passes know from `torch.export`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator

from balf_fx.graph.annotation import annotate

_REGISTRIES = ("_modules", "_parameters", "_buffers", "__closure__", "cell_contents", "__dict__", "_orig_mod")


_ROOTS = ("self", "fn")  # the module in its own methods, and in the function that torch puts around its own modules


_WRAPPED = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable")  # the latter in torch 2.8


_RESERVED = frozenset(dir(fx.GraphModule)) | {"meta", "training"}


_TRAINING: dict[Any, int] = {nn.functional.dropout: 2, nn.functional.batch_norm: 5}
_INSTANCE_NORM = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats")


@dataclass(frozen=True)
class WeightInput:
    """An input of a graph that takes a parameter or buffer: its position, and the weight's dotted name."""

    position: int
    name: str


@dataclass(frozen=True)
class Request:
    """Who asked for the compilation that is going on.

    Attributes:
        owner: the object that `torch.compile` made for one call of it, or None outside of Dynamo.
        frame: the code of the Python frame that is compiled, the same for recompilations of it; Dynamo's own number
            of it is another one where several threads compile it at once.
        module: the module whose method the frame runs, or None.
    """

    owner: object | None
    frame: CodeType | None
    module: nn.Module | None


def current_request() -> Request:
    """The compilation that Dynamo is at, on this thread."""
    try:
        translator: Any = InstructionTranslator.current_tx()
    except AttributeError:  # no frame has ever been translated on this thread
        translator = None
    if translator is None:
        return Request(None, None, None)
    roots = (translator.f_locals.get(name) for name in _ROOTS)
    module = next((root for root in roots if isinstance(root, nn.Module)), None)
    return Request(innermost_backend(translator.output.compiler_fn), translator.f_code, module)


def innermost_backend(backend: Any) -> Any:
    """What was passed to Dynamo, without the wrappers that Dynamo puts around it."""
    for name in _WRAPPED:
        if hasattr(backend, name):
            return innermost_backend(getattr(backend, name))
    return backend


def owner_of(compiled: Any) -> object | None:
    """The object that `torch.compile` made for this compiled module or function; None where it is not compiled."""
    held = [getattr(compiled, "dynamo_ctx", None)]
    function = getattr(compiled, "_compiled_call_impl", None) or compiled  # module.compile() leaves a function there
    held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    for item in held:
        found: object = innermost_backend(getattr(item, "callback", item))
        if isinstance(found, torch._TorchCompileWrapper):
            return found
    return None


def weight_inputs(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[WeightInput, ...]:
    """The inputs that take parameters, or buffers of modules; tensor subclasses, as quantization leaves them, do not
    count."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    found = []
    for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        source = _source_name(node)
        buffer = type(value) is Tensor and "._buffers[" in source
        if buffer or (isinstance(value, nn.Parameter) and type(value.data) is Tensor):
            found.append(WeightInput(position, weight_name(source or node.name)))
    return tuple(found)


def _source_name(node: fx.Node) -> str:
    """Where Dynamo found an input, as a Python expression; "" where it does not say."""
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method until torch 2.9, a property since


def weight_name(source: str) -> str:
    """The dotted name of a weight: `L['self']._modules['head']._parameters['weight']` is "head.weight"."""
    words = [word for word in re.findall(r"\w+", source.replace("__closure__[0]", "")) if word not in _REGISTRIES]
    scoped = words[1:] if words[:1] in (["L"], ["G"]) else words
    path = scoped[1:] if scoped[0] in _ROOTS and len(scoped) > 1 else scoped
    return legal_path(".".join(path))


def legal_path(path: str) -> str:
    """The path in a GraphModule for what has this one in a model: some names are taken there."""
    first, dot, rest = path.partition(".")
    return f"{first}_{dot}{rest}" if first in _RESERVED else path


def lift(graph_module: fx.GraphModule, weights: Mapping[int, tuple[str, Tensor]]) -> fx.GraphModule:
    """A copy of the graph that holds its weights.

    Args:
        graph_module: left as it is.
        weights: by the position of the input that takes it, a weight's dotted name and the weight itself.

    Returns:
        A graph that takes the remaining inputs, in their order. Nodes are annotated with the shapes that Dynamo saw.
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
        node.meta.pop("grapharg", None)  # Dynamo's own, and it holds the inputs
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
    """Whether an input of the graph has a size, or is a number, that Dynamo left open."""
    values = [node.meta.get("example_value") for node in graph_module.graph.find_nodes(op="placeholder")]
    sizes = [size for value in values for size in (value.shape if isinstance(value, Tensor) else (value,))]
    return any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes)


def is_training(graph_module: fx.GraphModule) -> bool:
    """Whether a layer runs as in training: dropout, or BatchNorm with the statistics of the batch."""
    return any(node.op == "call_function" and _trains(node) for node in graph_module.graph.nodes)


def _trains(node: fx.Node) -> bool:
    if node.target is nn.functional.instance_norm:  # without running statistics it does the same in both modes
        bound = {**dict(zip(_INSTANCE_NORM, node.args, strict=False)), **node.kwargs}
        return bound.get("running_mean") is not None and bound.get("use_input_stats", True) is True
    position = _TRAINING.get(node.target)
    if position is None:
        return node.kwargs.get("training") is True
    return (node.args[position] if len(node.args) > position else node.kwargs.get("training")) is True
