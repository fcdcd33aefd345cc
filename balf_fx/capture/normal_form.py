"""Captures a module as an `fx.GraphModule` in normal form, from which the passes start.

The graph is checked against the model on the example batch, and every node is annotated with its FLOPs on it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from balf_fx.calibration.batches import MODEL_ERRORS, Forward, forward_for
from balf_fx.capture.arguments import Call, record_call
from balf_fx.capture.checks import check_evaluation_mode, check_functional_training, check_weights, same_outputs
from balf_fx.capture.contexts import cast_explicitly, check_transforms, inline_contexts
from balf_fx.capture.exporting import export
from balf_fx.capture.functional import make_functional
from balf_fx.capture.models import (
    copy_model,
    cuda_devices,
    fold_parametrizations,
    plain_model,
    unchanged_parameters,
    without_expert_loops,
    without_questions_about_masks,
)
from balf_fx.capture.positions import restore_positions
from balf_fx.capture.samples import find_samples
from balf_fx.capture.single import assert_several
from balf_fx.capture.tracing import trace
from balf_fx.errors import CaptureError, OptionError
from balf_fx.graph.annotation import Origin, annotation, record_graph
from balf_fx.graph.edits import drop_dead_code
from balf_fx.graph.flops import profile
from balf_fx.graph.layers import read_site
from balf_fx.graph.layouts import read_sizes, views_to_reshapes
from balf_fx.graph.parameters import count_parameters, get_tensor
from balf_fx.graph.site import Reason, Refusal, Site
from balf_fx.passes import DecomposeAttention, FoldConstants, UnifyProducts

Method = Literal["auto", "symbolic_trace", "export"]


_OPAQUE = (Reason.NOT_LINEAR, Reason.SUBCLASS, Reason.PARAMETRIZED, Reason.HOOKED)  # export may decompose these
_EXPORTABLE = (Tensor, bool, int, float, str, type(None))
_LOGGER = logging.getLogger(__name__)


def capture(
    model: nn.Module, example: Any, forward: Forward | None = None, method: Method = "auto", share: bool = False
) -> fx.GraphModule:
    """Turn a model into a graph, check it on the example batch and count its FLOPs.

    Arguments that the example does not supply, or supplies with something other than tensors, keep that value in the
    graph, guarded by an assertion.

    Args:
        model: any module in evaluation mode; it is not changed.
        example: one batch, see `calibration.batches`.
        forward: a function forward(model, batch), in place of the rules in `calibration.batches`.
        method: "symbolic_trace", "export", or "auto": symbolic tracing first, then torch.export if that fails or leaves
            weights inside calls that it cannot trace. An exported graph asserts the sizes for which it is valid.
        share: whether the graph may have the model's own parameters, not copies (`engine.rewriting.own_memory`).

    Raises:
        ModelError: it is no module, weights are missing or modules are quantized; torchao's quantized weights are
            allowed and kept.
        CalibrationError: the model cannot run the example.
        TrainingModeError: a layer such as BatchNorm or Dropout is in training mode.
        CaptureError: the model cannot be captured, or its graph has another output.
    """
    if method not in ("auto", "symbolic_trace", "export"):
        raise OptionError(f"capture must be 'auto', 'symbolic_trace' or 'export', not {method!r}")
    model = plain_model(model)
    check_weights(model)
    check_evaluation_mode(model)
    copied = copy_model(model)
    with torch.random.fork_rng(devices=cuda_devices(model)):
        call = record_call(copied, example, forward or forward_for(model))
    shared = unchanged_parameters(model, copied) if share else []
    del copied  # a large model's takes much memory
    captured = partial(_captured, model, call, shared)
    if method != "auto":
        return captured(method, conditional=True)
    try:
        traced = captured("symbolic_trace")
    except CaptureError as not_traced:
        try:
            return captured("export", conditional=True)
        except CaptureError as not_exported:
            raise CaptureError(
                f"{not_traced}\n{not_exported}\nFor a model that cannot be captured as one graph, use "
                "torch.compile(model, backend='balf')"
            ) from not_exported
    if not _has_opaque_weights(traced):
        return traced
    try:
        exported = captured("export")
    except CaptureError as error:
        _LOGGER.info("some weights stay inside calls that cannot be traced: %s", error)
        return traced
    return max((traced, exported), key=_flops_in_sites)


def _captured(
    model: nn.Module, call: Call, shared: Sequence[Tensor], method: Method, conditional: bool = False
) -> fx.GraphModule:
    """Capture by one method, checked and profiled (`shared`: see `copy_model`; `conditional`: see `export`)."""
    subject = copy_model(model, shared)
    with torch.no_grad():
        fold_parametrizations(subject)
    if method == "symbolic_trace":
        graph_module = trace(subject, call.constants, call.unrolled)
    else:
        _check_exportable(type(model).__name__, call.output)
        without_expert_loops(subject)
        without_questions_about_masks(subject)
        graph_module = export(subject, call.by_position, call.by_keyword, conditional)
    _restore_buffers(graph_module, model)
    if any(module.training for module in model.modules()):
        check_functional_training(graph_module)
    if not model.training:
        graph_module.eval()
    inputs = [call.input(str(node.target)) for node in graph_module.graph.find_nodes(op="placeholder")]
    with torch.random.fork_rng(devices=cuda_devices(model)):
        inline_contexts(graph_module)
        check_transforms(graph_module)
        with _runs_the_example():
            make_functional(graph_module, inputs)
            read_sizes(graph_module.graph)
            if method == "export":  # it leaves out `contiguous` where the value of the example is
                views_to_reshapes(graph_module.graph)
                restore_positions(graph_module)
            graph_module.recompile()
            cast_explicitly(graph_module, inputs, call.autocast)
        _restore_buffers(graph_module, model)
        DecomposeAttention()(graph_module)
        FoldConstants()(graph_module)
        drop_dead_code(graph_module)
        with _runs_the_example():
            output = profile(graph_module, inputs)
            if UnifyProducts()(graph_module).modified:
                output = profile(graph_module, inputs)
            find_samples(graph_module, inputs)
        if method == "export":
            assert_several(graph_module, subject, call)
    _restore_buffers(graph_module, model)
    with _runs_the_example():  # what export leaves of a changed parameter has no values to compare
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
                "not support. Return tensors only: a language model, for instance, returns no cache with "
                "forward=lambda model, batch: model(**batch, use_cache=False)"
            )


@contextmanager
def _runs_the_example() -> Iterator[None]:
    try:
        yield
    except MODEL_ERRORS as error:
        if isinstance(error, CaptureError):
            raise
        raise CaptureError(f"the captured graph cannot run the example batch: {error}") from error


def _has_opaque_weights(graph_module: fx.GraphModule) -> bool:
    """Whether there are weight matrices inside modules or functions that the graph calls as a whole."""
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


def _restore_buffers(copied: nn.Module, model: nn.Module) -> None:
    """Restore the buffers of a copy after a forward pass."""
    originals = dict(model.named_buffers())
    with torch.no_grad():
        for name, buffer in copied.named_buffers():
            if name in originals and originals[name].shape == buffer.shape:
                buffer.copy_(originals[name])


def _check_same_output(expected: Any, actual: Any) -> None:
    """Raise if outputs differ: the graph runs the model's operations in order, so they may only differ by rounding."""
    if not same_outputs(expected, actual):
        raise CaptureError(
            "the output of the captured graph differs from the model's on the example batch: look for hooks on the "
            "model, for control flow that depends on its inputs, or for state that forward changes"
        )
