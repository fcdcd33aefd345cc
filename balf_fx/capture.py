"""Module -> `fx.GraphModule` in normal form: what the passes start from.

The graph is checked against the model on the example batch, and every node is annotated with the FLOPs it costs there.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from balf_fx.batches import MODEL_ERRORS, Forward, forward_for, holds_tensor, run_batch
from balf_fx.costs import profile
from balf_fx.errors import CalibrationError, CaptureError, ModelError, OptionError, TrainingModeError
from balf_fx.example import describe
from balf_fx.exported import export
from balf_fx.linear_maps import read_site
from balf_fx.passes import DecomposeAttention, FoldConstants
from balf_fx.sites import (
    Origin,
    Reason,
    Refusal,
    Site,
    annotation,
    count_parameters,
    get_tensor,
    is_quantized,
    record_graph,
)
from balf_fx.symbolic import trace

Method = Literal["auto", "symbolic_trace", "export"]
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torchao.")
_OPAQUE = (Reason.NOT_LINEAR, Reason.SUBCLASS, Reason.PARAMETRIZED, Reason.HOOKED)  # another capture may look inside
_EXPORTABLE = (Tensor, bool, int, float, str, type(None))
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """One call of a model: its arguments by parameter name, how many of them positional, and what came out."""

    supplied: Mapping[str, Any]
    defaults: Mapping[str, Any]
    positional: int
    output: Any

    def value(self, name: str) -> Any:
        """The argument as forward saw it."""
        return self.supplied[name] if name in self.supplied else self.defaults[name]

    def description(self) -> dict[str, Any] | None:
        """The arguments as `Origin` keeps them."""
        names = list(self.supplied)
        positional = describe(tuple(self.supplied[name] for name in names[: self.positional]))
        keywords = describe({name: self.supplied[name] for name in names[self.positional :]})
        return None if positional is None or keywords is None else {"positional": positional, "keywords": keywords}


def capture(model: nn.Module, example: Any, forward: Forward | None = None, method: Method = "auto") -> fx.GraphModule:
    """Turn a copy of the model into a graph, check it on the example batch and count its FLOPs.

    Arguments that the example does not supply, or supplies with something other than tensors, keep that value in the
    graph, guarded by an assertion.

    Args:
        model: any module in evaluation mode; never touched.
        example: one batch, see `batches`.
        forward: `forward(model, batch)`, in place of the rules in `batches`.
        method: "symbolic_trace", "export", or "auto": symbolic tracing first, torch.export where that fails or leaves
            weights inside of calls that it cannot look into. An exported graph asserts the sizes that it is for.

    Raises:
        ModelError: weights are missing, or modules quantized; torchao's quantized weights stay as they are.
        CalibrationError: the model cannot run the example.
        TrainingModeError: a layer such as BatchNorm or Dropout is in training mode.
        CaptureError: the model cannot be captured, or its graph computes something else.
    """
    if method not in ("auto", "symbolic_trace", "export"):
        raise OptionError(f"capture is 'auto', 'symbolic_trace' or 'export', not {method!r}")
    check_weights(model)
    check_evaluation_mode(model)
    with torch.random.fork_rng(devices=cuda_devices(model)):
        call = record_call(copy_model(model), example, forward or forward_for(model))
    if method != "auto":
        return _captured(model, call, method)
    try:
        traced = _captured(model, call, "symbolic_trace")
    except CaptureError as not_traced:
        try:
            return _captured(model, call, "export")
        except CaptureError as not_exported:
            raise CaptureError(
                f"{not_traced}\n{not_exported}\nUse torch.compile(model, backend='balf') for a model that runs only "
                "piece by piece"
            ) from not_exported
    if not _has_opaque_weights(traced):
        return traced
    try:
        exported = _captured(model, call, "export")
    except CaptureError as error:
        _LOGGER.info("weights stay inside of calls that tracing cannot look into: %s", error)
        return traced
    return max((traced, exported), key=_flops_in_sites)


def _captured(model: nn.Module, call: Call, method: Method) -> fx.GraphModule:
    """One way of capture, checked and profiled."""
    subject = copy_model(model)
    if method == "symbolic_trace":
        constants = {name: value for name, value in call.supplied.items() if not holds_tensor(value)}
        graph_module = trace(subject, {**constants, **call.defaults})
    else:
        _check_exportable(type(model).__name__, call.output)
        names = list(call.supplied)[: call.positional]
        keywords = {name: value for name, value in call.supplied.items() if name not in names}
        graph_module = export(subject, [call.supplied[name] for name in names], keywords, names)
    _restore_buffers(graph_module, model)
    if any(module.training for module in model.modules()):
        _check_functional_training(graph_module)
    if not model.training:
        graph_module.eval()
    DecomposeAttention()(graph_module)
    FoldConstants()(graph_module)
    inputs = [call.value(str(node.target)) for node in graph_module.graph.find_nodes(op="placeholder")]
    with torch.random.fork_rng(devices=cuda_devices(model)):
        output = _profiled(graph_module, inputs)
    _restore_buffers(graph_module, model)
    _check_same_output(call.output, output)
    graph_module.graph.lint()
    origin = Origin(arguments=call.description())
    record_graph(graph_module, params=count_parameters(model), captured=method, origin=origin)
    return graph_module


def _check_exportable(class_name: str, output: Any) -> None:
    for leaf in pytree.tree_leaves(output):
        if not isinstance(leaf, _EXPORTABLE):
            raise CaptureError(
                f"{class_name} cannot be exported: an output is of type {type(leaf).__name__}, which torch.export does "
                "not know. Have it return tensors: a language model, for instance, returns no cache with "
                "forward=lambda model, batch: model(**batch, use_cache=False)"
            )


def _profiled(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
    try:
        return profile(graph_module, inputs)
    except MODEL_ERRORS as error:
        raise CaptureError(f"the captured graph cannot run the example batch: {error}") from error


def _has_opaque_weights(graph_module: fx.GraphModule) -> bool:
    """Whether matrices hide inside of modules or functions that the graph calls as a whole."""
    for node in graph_module.graph.nodes:
        mark = read_site(graph_module, node)
        if isinstance(mark, Refusal) and mark.reason in _OPAQUE and _is_opaque(graph_module, node):
            return True
    return False


def _is_opaque(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        held: Iterable[Any] = module.parameters()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return False
    else:
        if str(getattr(node.target, "__module__", "torch")).partition(".")[0] in ("torch", "_operator", "math"):
            return False
        attributes = [source for source in node.all_input_nodes if source.op == "get_attr"]
        held = [get_tensor(graph_module, str(source.target)) for source in attributes]
    return any(isinstance(tensor, Tensor) and tensor.dim() >= 2 for tensor in held)


def _flops_in_sites(graph_module: fx.GraphModule) -> int:
    nodes = graph_module.graph.nodes
    return sum(annotation(node).flops or 0 for node in nodes if isinstance(read_site(graph_module, node), Site))


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy; tensors that hooks compute and leave on a module, as `torch.nn.utils.weight_norm` does, as well.

    Raises:
        ModelError: some other part of the model cannot be copied.
    """
    held = (value for module in model.modules() for value in vars(module).values())
    computed = {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}
    try:
        return copy.deepcopy(model, computed)
    except MODEL_ERRORS as error:
        raise ModelError(f"{type(model).__name__} cannot be copied with copy.deepcopy: {error}") from error


def cuda_devices(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that the model lives on, whose random state is to be kept."""
    tensors: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    return sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})


def record_call(model: nn.Module, batch: Any, forward: Forward) -> Call:
    """Run one batch and note how `forward` called the model."""
    calls: list[Call] = []
    signature = inspect.signature(model.forward)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        supplied = dict(bound.arguments)
        bound.apply_defaults()
        defaults = {name: value for name, value in bound.arguments.items() if name not in supplied}
        calls.append(Call(supplied, defaults, len(args), output))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        run_batch(model, batch, forward, index=0)
    finally:
        handle.remove()
    if not calls:
        raise CalibrationError("forward(model, batch) did not call the model it was given")
    return calls[0]


def check_weights(model: nn.Module) -> None:
    """Refuse models whose weights are not there, or no longer what they stand for.

    Raises:
        ModelError: names the first module concerned.
    """
    for name, module in model.named_modules():
        label = f"{name or 'the model'} ({type(module).__name__})"
        if type(module).__module__.startswith(_QUANTIZED):
            raise ModelError(f"{label} is quantized: compress the float model first, then quantize the result")
        for parameter in module.parameters(recurse=False):
            if nn.parameter.is_lazy(parameter):
                raise ModelError(f"{label} is lazy and has no weights yet: run one batch through the model first")
            if parameter.device.type == "meta":
                raise ModelError(f"{label} lies on the meta device: load its weights first")
            if type(parameter.data) is not Tensor and not is_quantized(parameter):
                raise ModelError(
                    f"{label} holds a {type(parameter.data).__name__} in place of a plain tensor: compress the model "
                    "with plain weights first"
                )


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
