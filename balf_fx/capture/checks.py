"""Checks of a model before it is captured, and of its outputs after that."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from balf_fx.calibration.moments import CHUNK_ELEMENTS
from balf_fx.errors import ModelError, TrainingModeError
from balf_fx.graph.operators import trains
from balf_fx.graph.parameters import FLOATS, is_quantized

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torchao.")
_PATHS = ("StochasticDepth", "DropPath")  # of torchvision, timm and transformers: they drop whole branches
_FLOAT = ("FloatFunctional", "FXFloatFunctional")  # these lie there, too, but compute with plain tensors


def check_weights(model: nn.Module) -> None:
    """Check that all weights of a model are loaded, and are plain tensors.

    Raises:
        ModelError: weights are missing, quantized or of another type; names the first such module.
    """
    for name, module in model.named_modules():
        label = f"{name or 'the model'} ({type(module).__name__})"
        if type(module).__module__.startswith(_QUANTIZED) and type(module).__name__ not in _FLOAT:
            raise ModelError(f"{label} is quantized: compress the float model first, then quantize the result")
        for parameter in module.parameters(recurse=False):
            if nn.parameter.is_lazy(parameter):
                raise ModelError(f"{label} is lazy and has no weights yet: run one batch through the model first")
            if parameter.device.type == "meta":
                raise ModelError(f"{label} is on the meta device: load its weights first, or pass safetensors=")
            if type(parameter.data) is not Tensor and not is_quantized(parameter):
                raise ModelError(
                    f"{label} has a {type(parameter.data).__name__} in place of a plain tensor: compress the model "
                    "with plain weights first"
                )


def check_values(model: nn.Module) -> None:
    """Check that all weights are finite, and small enough that their squares are.

    Raises:
        ModelError: a weight is NaN, infinite or too large; names the first such module.
    """
    for name, module in model.named_modules():
        held = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._NormBase):
            held |= dict(module.named_buffers(recurse=False))
        for key, tensor in held.items():
            largest = _largest(tensor)
            label = f"{key} of {name or 'the model'} ({type(module).__name__})"
            if not math.isfinite(largest):
                raise ModelError(f"{label} contains NaN or infinity: load weights that are finite")
            if largest > torch.finfo(torch.promote_types(tensor.dtype, torch.float32)).max ** 0.5:
                raise ModelError(
                    f"{label} has values of up to {largest:.1g}, whose squares overflow: rescale the model"
                )


def _largest(tensor: Tensor) -> float:
    """The largest magnitude in a tensor; 0 for tensors without plain values."""
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return 0.0
    value = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if value.dtype not in FLOATS or not value.numel() or is_quantized(tensor):
        return 0.0
    low, high = (float(each) for each in value.aminmax())
    return max(-low, high) if low == low else low


def check_evaluation_mode(model: nn.Module) -> None:
    """Check that no module is in training mode whose output depends on it.

    Raises:
        TrainingModeError: one is; names the first.
    """
    for name, module in model.named_modules():
        if module.training and _training_matters(module):
            raise TrainingModeError(
                f"{name or 'the model'} ({type(module).__name__}) is in training mode, in which its output differs "
                "from that in deployment: call model.eval() first"
            )


def _training_matters(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0
    if type(module).__name__.endswith(_PATHS):
        return bool(getattr(module, "p", getattr(module, "drop_prob", 0)))
    return isinstance(module, nn.RReLU)


def check_functional_training(graph_module: fx.GraphModule) -> None:
    """Check that no functional call, such as of dropout, runs in training mode.

    Raises:
        TrainingModeError: one does; names the first.
    """
    for node in graph_module.graph.nodes:
        if trains(node):
            raise TrainingModeError(
                f"{node.name} runs in training mode, in which its output differs from that in deployment: "
                "call model.eval() first"
            )


def same_outputs(want: Any, got: Any) -> bool:
    """Whether nested outputs have the same tensors up to rounding; leaves that are none, a cache say, may differ."""
    return all(_same(*pair) for pair in zip_longest(pytree.tree_leaves(want), pytree.tree_leaves(got)))


def _same(want: Any, got: Any) -> bool:
    if not (isinstance(want, Tensor) and isinstance(got, Tensor)):
        return isinstance(want, Tensor) == isinstance(got, Tensor)
    return want.shape == got.shape and want.dtype == got.dtype and close(want, got)


def close(want: Tensor, got: Tensor) -> bool:
    """Whether two tensors of one shape and dtype differ by no more than rounding does in a deep model."""
    if want.is_complex():
        want, got = torch.view_as_real(want), torch.view_as_real(got)
    if not want.is_floating_point():
        return torch.equal(want, got)
    tolerance = torch.finfo(want.dtype).eps ** 0.5
    parts = (torch.split(each.flatten(), CHUNK_ELEMENTS) for each in (want, got))
    pairs = list(zip(*parts, strict=True))
    found = [finite.abs().max() for one, _ in pairs if (finite := one[torch.isfinite(one)]).numel()]
    scale = float(max(found, default=1.0))
    limits = {"rtol": tolerance, "atol": tolerance * scale}
    return all(torch.allclose(one, other, **limits, equal_nan=True) for one, other in pairs)
