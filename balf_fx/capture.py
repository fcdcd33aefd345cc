"""Module -> `fx.GraphModule` in normal form: what the passes start from.

The graph is checked against the model on the example batch, and every node is annotated with the FLOPs it costs there.
"""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from balf_fx.batches import MODEL_ERRORS, Forward, forward_for, run_batch
from balf_fx.costs import profile
from balf_fx.errors import CalibrationError, CaptureError, TrainingModeError
from balf_fx.sites import count_parameters, record_graph

_OWN_PATHS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module, by parameter name, and what came out of it."""

    supplied: Mapping[str, Any]
    defaults: Mapping[str, Any]
    output: Any

    def value(self, name: str) -> Any:
        """The argument as forward saw it."""
        return self.supplied[name] if name in self.supplied else self.defaults[name]


def capture(model: nn.Module, example: Any, forward: Forward | None = None) -> fx.GraphModule:
    """Trace a copy of the model symbolically, check it on the example batch and count its FLOPs.

    Arguments that the example does not supply, or supplies with something other than tensors, keep that value in the
    graph, guarded by an assertion.

    Args:
        model: any module in evaluation mode; never touched.
        example: one batch, see `batches`.
        forward: `forward(model, batch)`, in place of the rules in `batches`.

    Raises:
        CalibrationError: the model cannot run the example.
        TrainingModeError: a layer such as BatchNorm or Dropout is in training mode.
        CaptureError: the model cannot be traced, or its graph computes something else.
    """
    check_evaluation_mode(model)
    forward = forward or forward_for(model)
    subject = copy.deepcopy(model)
    with torch.random.fork_rng(devices=cuda_devices(model)):
        call = record_call(subject, example, forward)
    _restore_buffers(subject, model)
    graph_module = _trace(subject, call)
    _restore_buffers(graph_module, model)
    _check_functional_training(graph_module)
    if not model.training:
        graph_module.eval()
    with torch.random.fork_rng(devices=cuda_devices(model)):
        output = profile(graph_module, [call.value(str(p.target)) for p in _placeholders(graph_module)])
    _restore_buffers(graph_module, model)
    _check_same_output(call.output, output)
    record_graph(graph_module, params=count_parameters(model))
    return graph_module


def cuda_devices(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that the model lives on, whose random state is to be kept."""
    tensors: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    return sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})


def record_call(model: nn.Module, batch: Any, forward: Forward) -> Call:
    """Run one batch and note how `forward` called the model."""
    recorded: list[tuple[inspect.BoundArguments, Any]] = []
    signature = inspect.signature(model.forward)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recorded.append((signature.bind(*args, **kwargs), output))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        run_batch(model, batch, forward, index=0)
    finally:
        handle.remove()
    if not recorded:
        raise CalibrationError("forward(model, batch) did not call the model it was given")
    bound, output = recorded[0]
    supplied = dict(bound.arguments)
    bound.apply_defaults()
    defaults = {name: value for name, value in bound.arguments.items() if name not in supplied}
    return Call(supplied, defaults, output)


class _Tracer(fx.Tracer):
    """Symbolic tracing in which some arguments of forward keep a constant value."""

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
        constant = self.constants[name]
        if argument.node.target != name:  # *args or **kwargs that the example left empty: no such input
            self.graph.erase_node(argument.node)
        elif constant is None or isinstance(constant, bool | int | float | str):
            compare = operator.is_ if constant is None else operator.eq
            same = self.create_proxy("call_function", compare, (argument, constant), {})
            message = f"{name!r} was {constant!r} when the graph was captured and cannot be anything else"
            self.create_proxy("call_function", torch._assert, (same, message), {})
        return constant


def _trace(model: nn.Module, call: Call) -> fx.GraphModule:
    constants = {name: value for name, value in call.supplied.items() if not _holds_tensor(value)}
    tracer = _Tracer({**constants, **call.defaults})
    try:
        graph = tracer.trace(model)
    except MODEL_ERRORS as error:  # TraceError is a ValueError
        raise CaptureError(
            f"{type(model).__name__} cannot be traced symbolically: {_user_line(error)}{error}. Data-dependent control "
            "flow must leave the traced module, for instance into a module of its own wrapped with torch.fx.wrap"
        ) from error
    plain = fx.Graph()  # one that does not name our tracer, so that unpickling the result does not need balf_fx
    plain.output(plain.graph_copy(graph, {}))
    graph_module = fx.GraphModule(tracer.root, plain, type(model).__name__)
    graph_module.graph.lint()
    return graph_module


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _user_line(error: BaseException) -> str:
    """The innermost line of the user's own code in a traceback, as "file:line: `source`: "."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*_OWN_PATHS, "<"))]
    return f"{frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`: " if frames else ""


def _placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    return graph_module.graph.find_nodes(op="placeholder")


def check_evaluation_mode(model: nn.Module) -> None:
    """Refuse modules whose training mode changes what they compute.

    Raises:
        TrainingModeError: names the first one.
    """
    for name, module in model.named_modules():
        if module.training and _training_matters(module):
            raise TrainingModeError(
                f"{name or 'the model'} ({type(module).__name__}) is in training mode, where it computes something "
                "else than in deployment: call model.eval() first"
            )


def _training_matters(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0
    return isinstance(module, nn.RReLU)


def _check_functional_training(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.kwargs.get("training") is True:
            raise TrainingModeError(
                f"{node.name} runs with training=True, where it computes something else than in deployment: "
                "call model.eval() first"
            )


def _restore_buffers(copied: nn.Module, model: nn.Module) -> None:
    """Undo what a forward pass did to the buffers of a copy."""
    originals = dict(model.named_buffers())
    with torch.no_grad():
        for name, buffer in copied.named_buffers():
            if name in originals and originals[name].shape == buffer.shape:
                buffer.copy_(originals[name])


def _check_same_output(expected: Any, actual: Any) -> None:
    """The graph runs the model's own operations in order, so that only non-determinism may tell the two apart."""
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=False)
    for want, got in ((a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)):
        if not (want.shape == got.shape and want.dtype == got.dtype and _close(want, got)):
            raise CaptureError(
                "the captured graph computes something else than the model on the example batch: look for hooks on "
                "the model, for control flow that depends on its inputs, or for state that forward changes"
            )


def _close(want: Tensor, got: Tensor) -> bool:
    if not want.is_floating_point():
        return torch.equal(want, got)
    tolerance = torch.finfo(want.dtype).eps ** 0.5
    finite = want[torch.isfinite(want)].abs()
    scale = float(finite.max()) if finite.numel() else 1.0
    return torch.allclose(want, got, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
