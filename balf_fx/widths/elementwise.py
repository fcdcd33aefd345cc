"""Operations that treat each feature of a value separately."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from balf_fx.graph.annotation import annotation
from balf_fx.graph.operators import operation

_MODULES = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softsign),
)


_ELEMENTWISE_NAMES = (
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "sigmoid"),
    *("tanh", "hardtanh", "hardsigmoid", "hardswish", "softsign", "dropout", "clamp", "exp", "abs", "sqrt", "rsqrt"),
    *("square", "neg", "erf", "contiguous", "clone", "float", "to", "type_as", "detach", "pow", "log", "log1p"),
    *("expm1", "sin", "cos", "reciprocal", "sign", "log_sigmoid", "logsigmoid", "clamp_min", "clamp_max", "clip"),
    *("hardshrink", "softshrink", "tanhshrink", "threshold", "relu1", "maximum", "minimum", "rsub", "_to_copy"),
    *("add", "sub", "mul", "div", "truediv", "iadd", "isub", "imul", "itruediv", "true_divide", "subtract"),
    *("multiply", "divide"),
)


_POOL_MODULES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool1d)


_POOL_NAMES = ("adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d", "_adaptive_avg_pool2d")


def passes_on(graph_module: fx.GraphModule, node: fx.Node, axis: int) -> bool:
    """Whether a node that does more than to move values treats each feature on an axis of its value separately."""
    return is_elementwise(graph_module, node) or _is_pool(graph_module, node, axis) or _is_pad(node, axis)


def is_elementwise(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node treats each element of its broadcast operands separately."""
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))) in _MODULES
    return operation(node) in _ELEMENTWISE_NAMES and "out" not in node.kwargs


def is_glu(graph_module: fx.GraphModule, node: fx.Node, axis: int) -> bool:
    """Whether a node multiplies one half of an axis by the sigmoid of the other."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        dim: Any = module.dim if isinstance(module, nn.GLU) else None
    else:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
        dim = dim if operation(node) == "glu" else None
    rank = len(annotation(node).shape or ())
    return isinstance(dim, int) and dim % rank == axis


def _is_pool(graph_module: fx.GraphModule, node: fx.Node, axis: int) -> bool:
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))) in _POOL_MODULES
    if operation(node) == "mean":
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        listed = dims if isinstance(dims, list | tuple) else [dims]
        rank = len(annotation(node.all_input_nodes[0]).shape or ())
        return all(isinstance(d, int) and d % rank > axis for d in listed) and rank > 0
    return operation(node) in _POOL_NAMES


def _is_pad(node: fx.Node, axis: int) -> bool:
    if node.target is not F.pad:
        return False
    amounts = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
    rank = len(annotation(node).shape or ())
    return isinstance(amounts, list | tuple) and len(amounts) // 2 < rank - axis
