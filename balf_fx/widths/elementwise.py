"""Operations that treat each feature of a value separately."""

from __future__ import annotations

import re
from typing import Any

from torch import fx, nn

from balf_fx.graph.annotation import annotation
from balf_fx.graph.operators import is_identity, operation
from balf_fx.graph.parameters import called_module

_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softsign),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.RReLU),
)


_ELEMENTWISE_NAMES = (
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "sigmoid"),
    *("tanh", "hardtanh", "hardsigmoid", "hardswish", "softsign", "clamp", "exp", "abs", "sqrt", "rsqrt"),
    *("square", "neg", "erf", "contiguous", "clone", "float", "to", "type_as", "detach", "pow", "log", "log1p"),
    *("expm1", "sin", "cos", "reciprocal", "sign", "log_sigmoid", "logsigmoid", "clamp_min", "clamp_max"),
    *("hardshrink", "softshrink", "tanhshrink", "threshold", "relu1", "maximum", "minimum", "rsub", "_to_copy"),
    *("add", "sub", "mul", "div", "iadd", "isub", "imul", "itruediv", "where", "masked_fill", "lerp"),
    *("addcmul", "addcdiv", "exp2"),
    *("gt", "ge", "lt", "le", "eq", "ne", "logical_and", "logical_or", "logical_not"),
)


_SPATIAL_MODULES = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d),
    *(nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d, nn.LPPool1d, nn.LPPool2d),
)


_SPATIAL_NAMES = (
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "interpolate"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"),
    *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
)


_SEPARATE_MODULES = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


_SEPARATE_NAMES = ("batch_norm", "instance_norm", "prelu")


_REDUCTIONS = ("mean", "sum", "amax", "amin", "std", "var")


_PADDINGS = ("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")


def passes_on(graph_module: fx.GraphModule, node: fx.Node, axis: int) -> bool:
    """Whether a node that does more than to move values treats each feature on an axis of its value separately."""
    return (
        is_elementwise(graph_module, node)
        or _is_spatial(graph_module, node, axis)
        or is_separate(graph_module, node, axis)
    )


def is_elementwise(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node treats each element of its broadcast operands separately."""
    if is_identity(graph_module, node):
        return True
    if node.op == "call_module":
        return type(called_module(graph_module, node)) in _MODULES
    return operation(node) in _ELEMENTWISE_NAMES and "out" not in node.kwargs


def is_separate(graph_module: fx.GraphModule, node: fx.Node, axis: int) -> bool:
    """Whether a node treats each feature on an axis separately, with parameters that have an entry for each of them."""
    if axis != 1:
        return False
    if node.op != "call_module":
        return operation(node) in _SEPARATE_NAMES
    module = called_module(graph_module, node)
    rank = len(annotation(node).shape or ())
    unbatched = isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d) and (
        rank < 2 + _spatial_axes(type(module).__name__, rank)
    )
    return type(module) in _SEPARATE_MODULES and not unbatched


def normalised_groups(graph_module: fx.GraphModule, node: fx.Node, axis: int) -> int | None:
    """The number of groups of features on an axis that a node normalises, as GroupNorm does; None for other nodes."""
    if axis != 1:
        return None
    if node.op == "call_module":
        module = called_module(graph_module, node)
        return module.num_groups if type(module) is nn.GroupNorm else None
    groups: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("num_groups")
    return groups if operation(node) == "group_norm" and isinstance(groups, int) else None


def is_glu(graph_module: fx.GraphModule, node: fx.Node, axis: int) -> bool:
    """Whether a node multiplies one half of an axis by the sigmoid of the other."""
    if node.op == "call_module":
        module = called_module(graph_module, node)
        dim: Any = module.dim if isinstance(module, nn.GLU) else None
    else:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
        dim = dim if operation(node) == "glu" else None
    rank = len(annotation(node).shape or ())
    return isinstance(dim, int) and dim % rank == axis


def is_normalisation(graph_module: fx.GraphModule, node: fx.Node, axis: int) -> bool:
    """Whether a node normalises its last axis, which is this one, as a whole: its features may change their order."""
    if axis != len(annotation(node).shape or ()) - 1:
        return False
    if node.op == "call_module":
        module = called_module(graph_module, node)
        alone = len(graph_module.graph.find_nodes(op="call_module", target=str(node.target))) == 1
        return isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1 and alone
    shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
    return operation(node) in ("layer_norm", "rms_norm") and isinstance(shape, list | tuple) and len(shape) == 1


def is_reduction(node: fx.Node, axis: int) -> bool:
    """Whether a node sums an axis up, on which its value then has one entry for all features."""
    found = reduced_from(node) or ()
    alone = axis < len(found) and found == tuple(None if own == axis else own for own in range(len(found)))
    return operation(node) in ("mean", "sum", "var") and alone


def reduced_from(node: fx.Node) -> tuple[int | None, ...] | None:
    """For each axis of a value that is reduced from another one, its axis there; None for one that is reduced to 1.

    Returns None for other nodes, and for reductions of all axes.
    """
    if operation(node) not in _REDUCTIONS:
        return None
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
    listed: Any = dims if isinstance(dims, list | tuple) else [dims]
    source, own = (annotation(each).shape for each in (node.all_input_nodes[0], node))
    if source is None or own is None or not listed or not all(isinstance(dim, int) for dim in listed):
        return None
    reduced = {dim % len(source) for dim in listed}
    if len(own) == len(source):
        return tuple(None if axis in reduced else axis for axis in range(len(source)))
    return tuple(axis for axis in range(len(source)) if axis not in reduced)


def is_concatenation(node: fx.Node, axis: int) -> bool:
    """Whether a node concatenates values on another axis than this one."""
    return _concatenates_on(node) not in (None, axis)


def joins(node: fx.Node, axis: int) -> bool:
    """Whether a node concatenates values on this axis."""
    return _concatenates_on(node) == axis


def _concatenates_on(node: fx.Node) -> int | None:
    """The axis on which a node concatenates values; None for other nodes."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    rank = len(annotation(node).shape or ())
    return dim % rank if operation(node) == "cat" and isinstance(dim, int) else None


def table_of(graph_module: fx.GraphModule, node: fx.Node, axis: int) -> str | None:
    """The path of the weight [N, features] of an embedding whose features are on this axis; None for other nodes."""
    if axis != len(annotation(node).shape or ()) - 1:
        return None
    if node.op == "call_module":
        module = called_module(graph_module, node)
        return f"{node.target}.weight" if type(module) is nn.Embedding and module.max_norm is None else None
    plain = operation(node) == "embedding" and node.kwargs.get("max_norm") is None
    sources = [source for source in node.all_input_nodes if source.op == "get_attr"]
    return str(sources[0].target) if plain and len(sources) == 1 else None


def _is_spatial(graph_module: fx.GraphModule, node: fx.Node, axis: int) -> bool:
    """Whether a node pools, resizes or pads other axes than this one."""
    rank = len(annotation(node).shape or ())
    if node.op == "call_module":
        kind = type(called_module(graph_module, node))
        return kind in _SPATIAL_MODULES and axis < rank - _spatial_axes(kind.__name__, rank)
    name = operation(node)
    if name in _PADDINGS:
        amounts = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", node.kwargs.get("padding"))
        last = 2 * (rank - 1 - axis)  # amounts begin with the last axis
        return isinstance(amounts, list | tuple) and tuple(amounts[last : last + 2]) in ((), (0, 0))
    return name in _SPATIAL_NAMES and axis < rank - _spatial_axes(name, rank)


def _spatial_axes(name: str, rank: int) -> int:
    """The number of spatial axes, the last ones, of an operation such as "max_pool2d"; all but two for any number."""
    found = re.search(r"(\d)d$", name)
    return int(found[1]) if found else rank - 2
