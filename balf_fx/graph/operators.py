"""Classifies the operations of calls, for all kinds of graphs."""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

aten = torch.ops.aten

_TRANSPOSES = ("t", "transpose", "numpy_T", "mT")
_IDENTITY_MODULES = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_IDENTITY_CALLS = (
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
    *("feature_dropout", "feature_alpha_dropout"),
)


_BUILTIN = {
    **dict.fromkeys(
        ("dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_alpha_dropout"),
        ("input", "p", "train"),
    ),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
    "rrelu": ("input", "lower", "upper", "training"),
    "rrelu_": ("input", "lower", "upper", "training"),
}


AUGMENTED = {
    getattr(operator, f"i{name}"): getattr(operator, name if name not in ("and", "or") else f"{name}_")
    for name in (
        "add",
        "and",
        "floordiv",
        "lshift",
        "matmul",
        "mod",
        "mul",
        "or",
        "pow",
        "rshift",
        "sub",
        "truediv",
        "xor",
    )
}
"""Augmented assignments, each with the operator that returns a new value."""


def changes_in_place(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may change the values that it reads."""
    if node.op == "call_module":
        return bool(getattr(graph_module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = str(getattr(node.target, "__name__", ""))
    augmented = node.target in AUGMENTED or node.target is operator.setitem
    return augmented or name.endswith("_") or has_inplace_flag(node) or "out" in node.kwargs


def set_inplace_flag(node: fx.Node, in_place: bool) -> None:
    """Set the argument `inplace` of a call, which has one."""
    names = argument_names(node.target)
    position = names.index("inplace") if "inplace" in names else len(node.args)
    if position < len(node.args):
        node.update_arg(position, in_place)
    else:
        node.update_kwarg("inplace", in_place)


def has_inplace_flag(node: fx.Node) -> bool:
    """Whether a call's argument `inplace` is true."""
    return bool(arguments(node).get("inplace", False))


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a function's call by name, as far as the names are known and they are given."""
    return {**dict(zip(argument_names(node.target), node.args, strict=False)), **node.kwargs}


@functools.lru_cache(maxsize=1024)
def argument_names(function: Any) -> tuple[str, ...]:
    """The names of a function's positional arguments; empty for builtin functions other than those of dropout."""
    if isinstance(function, torch._ops.OpOverload):
        return tuple(argument.name for argument in function._schema.arguments)
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return _BUILTIN.get(getattr(function, "__name__", ""), ())


def trains(node: fx.Node) -> bool:
    """Whether a call runs in training mode, in which its output differs from that in deployment.

    This is active dropout, also that of attention, and BatchNorm and InstanceNorm with the statistics of the batch in
    place of those that they keep.
    """
    if node.op != "call_function":
        return False
    name, given = operation(node) or str(getattr(node.target, "__name__", "")), arguments(node)
    if "_norm" in name and given.get("running_mean") is None:  # both modes compute the same
        return False
    if name == "instance_norm":
        return given.get("use_input_stats", True) is True
    flags = [given[flag] for flag in ("training", "train") if flag in given]
    active = any(flag is True for flag in flags) if flags else "dropout_p" in given
    rates = [given[rate] for rate in ("p", "dropout", "dropout_p") if rate in given]
    return active and (not rates or rates[0] != 0)


def is_opaque_call(node: fx.Node) -> bool:
    """Whether a node calls a function that is not one of torch or Python, and may do anything.

    The classes that torch takes apart and puts together again, such as the outputs of transformers, only hold values.
    """
    if node.op != "call_function" or node.target in pytree.SUPPORTED_NODES:
        return False
    owner = str(getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    known = isinstance(node.target, torch._ops.OpOverload) or owner in ("torch", "_operator", "builtins", "math")
    return not known


_SYNONYMS = {
    **{"multiply": "mul", "divide": "div", "true_divide": "div", "truediv": "div", "subtract": "sub", "clip": "clamp"},
    **{"swapaxes": "transpose", "swapdims": "transpose", "moveaxis": "movedim"},
    **{"concat": "cat", "concatenate": "cat", "absolute": "abs", "negative": "neg"},
}


def operation(node: fx.Node) -> str:
    """The name of a call's operation, the same for a function, a method and an operator, in place or not.

    Names for the same operation are one name.
    """
    name = _name(node)
    return _SYNONYMS.get(name, name)


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    if node.op != "call_function":
        return ""
    name = node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""
    owner = str(getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    name = name or str(getattr(node.target, "__name__", ""))
    return name.rstrip("_") if owner in ("torch", "_operator", "builtins") else ""


def is_convolution(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a convolution, transposed or not."""
    if node.op == "call_module":
        return isinstance(graph_module.get_submodule(str(node.target)), _ConvNd)
    return operation(node).startswith("conv")


def is_identity(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node of a model in evaluation mode returns its first argument unchanged."""
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))) in _IDENTITY_MODULES
    stochastic_depth = getattr(node.target, "__name__", "") == "stochastic_depth"  # of torchvision
    return stochastic_depth or operation(node) in _IDENTITY_CALLS


def makes_alike(node: fx.Node) -> bool:
    """Whether a node makes a new value of a given size that only has the type and the device of another one."""
    return operation(node) in ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")


def reads_metadata(node: fx.Node) -> bool:
    """Whether a node only reads the shape or the type of a value."""
    if makes_alike(node):
        return True
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")


def value_readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a node's values, and not only its shape or dtype."""
    return [user for user in node.users if not reads_metadata(user)]


def is_transposition(node: fx.Node) -> bool:
    """Whether a node only transposes a matrix."""
    if node.op not in ("call_function", "call_method"):
        return False
    return operation(node) in _TRANSPOSES or (node.target is getattr and node.args[1] in ("T", "mT"))
