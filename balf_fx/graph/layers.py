"""Reads a node as y = W x + b, for all kinds of graphs.

Symbolic tracing yields `call_module`, functional calls yield `call_function` with weights from `get_attr`, and
`torch.export` yields ATen operators. All of them become one `Site`, or a `Refusal` with the reason.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from balf_fx.graph.annotation import annotation, sites
from balf_fx.graph.experts import ExpertProduct, leads_to_experts, read_experts
from balf_fx.graph.operators import aten, is_transposition
from balf_fx.graph.parameters import FLOATS, get_tensor, is_hooked, is_quantized
from balf_fx.graph.site import ConvGeometry, Kind, Reason, Refusal, Site

_MODULES: dict[type[nn.Module], Kind] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}


_LINEAR = ("input", "weight", "bias")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_PRODUCT = ("input", "weight")  # x @ W: the weight is stored inputs first
_ADDMM = ("bias", "input", "weight")
_CALLS: dict[Any, tuple[Kind, tuple[str, ...]]] = {
    F.linear: ("linear", _LINEAR),
    aten.linear.default: ("linear", _LINEAR),
    F.conv1d: ("conv1d", _CONV),
    F.conv2d: ("conv2d", _CONV),
    F.conv3d: ("conv3d", _CONV),
    aten.conv1d.default: ("conv1d", _CONV),
    aten.conv2d.default: ("conv2d", _CONV),
    aten.conv3d.default: ("conv3d", _CONV),
    aten.conv1d.padding: ("conv1d", _CONV),
    aten.conv2d.padding: ("conv2d", _CONV),
    aten.conv3d.padding: ("conv3d", _CONV),
    F.conv_transpose1d: ("conv_transpose1d", _CONV_TRANSPOSE),
    F.conv_transpose2d: ("conv_transpose2d", _CONV_TRANSPOSE),
    F.conv_transpose3d: ("conv_transpose3d", _CONV_TRANSPOSE),
    aten.conv_transpose1d.default: ("conv_transpose1d", _CONV_TRANSPOSE),
    aten.conv_transpose2d.input: ("conv_transpose2d", _CONV_TRANSPOSE),
    aten.conv_transpose3d.input: ("conv_transpose3d", _CONV_TRANSPOSE),
    torch.matmul: ("linear", _PRODUCT),
    torch.mm: ("linear", _PRODUCT),
    operator.matmul: ("linear", _PRODUCT),
    aten.matmul.default: ("linear", _PRODUCT),
    aten.mm.default: ("linear", _PRODUCT),
    "matmul": ("linear", _PRODUCT),
    "mm": ("linear", _PRODUCT),
    torch.addmm: ("linear", _ADDMM),
    aten.addmm.default: ("linear", _ADDMM),
}


_EINSUMS = (torch.einsum, torch.functional.einsum, aten.einsum.default)
_GROUPED_ALIGNMENT = 16  # bytes
_WEIGHTS = ("weight", "bias")


@dataclass(frozen=True)
class _Constant:
    """A parameter that a node reads: its dotted path, and whether it is transposed before."""

    path: str
    transposed: bool


def read_site(graph_module: fx.GraphModule, node: fx.Node) -> Site | Refusal | None:
    """The node's site, or the reason why it is not one; None if the node has no parameters."""
    layer = read_layer(graph_module, node)
    if not isinstance(layer, Site):
        return layer
    dtype = get_tensor(graph_module, layer.weight).dtype
    if dtype not in FLOATS:
        return Refusal(layer.name, layer.kind, Reason.DTYPE, str(dtype).removeprefix("torch."))
    if layer.break_even < 1:
        reason = Reason.TOO_SMALL
        if layer.groups > 1 and 1 in (layer.out_features, layer.in_features):
            reason = Reason.DEPTHWISE if layer.out_features == 1 else Reason.SINGLE_INPUT
        return Refusal(layer.name, layer.kind, reason, f"O x D x groups = {layer.shape_in_words}")
    return layer


def read_layer(graph_module: fx.GraphModule, node: fx.Node) -> Site | Refusal | None:
    """Like `read_site`, but also returns layers that are not sites because no rank saves anything."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return None
    found = _read_module(graph_module, node) if node.op == "call_module" else _read_call(graph_module, node)
    samples = annotation(node).samples
    return dataclasses.replace(found, samples=samples) if samples and isinstance(found, Site) else found


def layers_of(graph_module: fx.GraphModule) -> dict[str, tuple[Site, list[fx.Node]]]:
    """Every layer by its name, whether a site or not, with the nodes that apply it."""
    found = {site.name: (site, nodes) for site, nodes in sites(graph_module).items()}
    for node in graph_module.graph.nodes:  # layers that are not sites may have been refitted or narrowed
        site = read_layer(graph_module, node)
        if annotation(node).site is None and isinstance(site, Site):
            found[site.name] = (site, [node])
    return found


def site_input(node: fx.Node) -> fx.Node:
    """The node whose value a site reads."""
    product = read_experts(node)
    if product is not None:
        return product.input
    value = node.args[0] if node.op == "call_module" and node.args else _bind(node).get("input")
    if not isinstance(value, fx.Node):
        raise TypeError(f"the input of {node.name} is not a node but {value!r}")
    return value


def _read_module(graph_module: fx.GraphModule, node: fx.Node) -> Site | Refusal | None:
    name = str(node.target)
    module: Any = graph_module.get_submodule(name)
    kind = _MODULES.get(type(module))
    if kind is None:
        if next(module.parameters(), None) is None:
            return None
        refused = Reason.NOT_LINEAR
        if isinstance(module, tuple(_MODULES)):
            refused = Reason.PARAMETRIZED if hasattr(module, "parametrizations") else Reason.SUBCLASS
        return Refusal(name, type(module).__name__, refused)
    if is_hooked(module):
        return Refusal(name, kind, Reason.HOOKED)
    if "weight" not in module._parameters or len(node.all_input_nodes) != 1:
        return Refusal(name, kind, Reason.COMPUTED)
    bias = None if module._parameters["bias"] is None else f"{name}.bias"
    if kind == "linear":
        return _layer(graph_module, name, kind, (f"{name}.weight", bias))
    transposed = kind.startswith("conv_transpose")
    conv = ConvGeometry(
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=_padding(module.padding, module.kernel_size, module.dilation),
        dilation=module.dilation,
        padding_mode=module.padding_mode,
        output_padding=module.output_padding if transposed else None,
    )
    return _layer(graph_module, name, kind, (f"{name}.weight", bias), module.groups, conv, inputs_first=transposed)


def _read_experts(graph_module: fx.GraphModule, product: ExpertProduct) -> Site | Refusal:
    path = str(product.source.target)
    weight: Tensor = get_tensor(graph_module, path)
    name = _site_path(graph_module, path, None)
    if is_quantized(weight):
        return Refusal(name, "experts", Reason.QUANTIZED, type(weight.data).__name__)
    outputs, inputs = weight.shape[1:] if not product.inputs_first else (weight.shape[2], weight.shape[1])
    step = max(_GROUPED_ALIGNMENT // weight.element_size(), 1) if product.rows.by == "ends" else 1
    site = Site(name, "experts", path, None, len(weight), outputs, inputs, inputs_first=product.inputs_first)
    return dataclasses.replace(site, rank_step=step)


def _read_call(graph_module: fx.GraphModule, node: fx.Node) -> Site | Refusal | None:
    product = read_experts(node)
    if product is not None and isinstance(get_tensor(graph_module, str(product.source.target)), nn.Parameter):
        return _read_experts(graph_module, product)
    if leads_to_experts(node):
        return None
    held = [constant.path for source in node.all_input_nodes if (constant := _constant(graph_module, source))]
    function = str(getattr(node.target, "__name__", node.target))
    arguments = _bind(node)
    if not held and arguments and not arguments["product"]:  # a layer whose weight comes from other nodes
        return Refusal(node.name, function, Reason.COMPUTED)
    if not held or is_transposition(node):
        return None
    constant = _constant(graph_module, arguments.get("weight"))
    name = constant.path.removesuffix(".weight") if constant is not None else held[0]
    if "input" not in arguments or _constant(graph_module, arguments["input"]) is not None:
        return Refusal(held[0], function, Reason.NOT_LINEAR)
    kind: Kind = arguments["kind"]
    bias = _constant(graph_module, arguments.get("bias"))
    if constant is None or (bias is None) != (arguments.get("bias") is None):
        return Refusal(name, function, Reason.COMPUTED)
    weight = get_tensor(graph_module, constant.path)
    bias_path = None if bias is None else bias.path
    if kind == "linear":
        if weight.dim() != 2 or (bias is not None and get_tensor(graph_module, bias.path).dim() != 1):
            return Refusal(name, function, Reason.NOT_LINEAR, "weight or bias of another rank")
        inputs_first = bool(arguments["inputs_first"]) != constant.transposed
        return _layer(graph_module, None, kind, (constant.path, bias_path), inputs_first=inputs_first)
    settings = {key: arguments.get(key) for key in ("stride", "padding", "dilation", "output_padding", "groups")}
    if constant.transposed or any(isinstance(item, fx.Node) for item in _flat(settings.values())):
        return Refusal(name, function, Reason.COMPUTED)
    conv = _geometry(tuple(weight.shape[2:]), kind, settings)
    groups = settings["groups"] or 1
    transposed = kind.startswith("conv_transpose")
    return _layer(graph_module, None, kind, (constant.path, bias_path), groups, conv, inputs_first=transposed)


def takes_bias(node: fx.Node) -> bool:
    """Whether a layer's call has an argument for a bias: products of matrices have none."""
    return node.op == "call_module" or "bias" in _CALLS.get(node.target, ("", ()))[1]


def argument_position(node: fx.Node, name: str) -> int:
    """The position of a functional layer's argument among its positional ones."""
    return _CALLS[node.target][1].index(name)


def layer_parameters(node: fx.Node) -> dict[str, fx.Node]:
    """The nodes of the arguments "weight" and "bias" of a functional layer or a product."""
    bound = _bind(node) if node.op in ("call_function", "call_method") else {}
    return {role: value for role in _WEIGHTS if isinstance(value := bound.get(role), fx.Node)}


def _bind(node: fx.Node) -> dict[str, Any]:
    """A call's arguments under common names; empty if the call is not a linear map.

    Also holds the call's `kind`, whether its weight is stored `inputs_first`, and whether it is a `product` of any two
    values rather than a layer.
    """
    if node.op == "call_module":
        return {"input": node.kwargs.get("input")}
    if node.target in _EINSUMS:
        return _bind_einsum(node)
    kind, names = _CALLS.get(node.target, ("linear", ()))
    if not names or len(node.args) > len(names) or not set(node.kwargs) <= set(names):
        return {}
    bound = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    product = names in (_PRODUCT, _ADDMM)
    return {**bound, "kind": kind, "inputs_first": product, "product": product}


def _bind_einsum(node: fx.Node) -> dict[str, Any]:
    """The arguments of a linear layer written as an einsum, `...i,oi->...o` and its transposed forms."""
    equation, *operands = node.args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    sides = str(equation).replace(" ", "").split("->")
    terms = sides[0].split(",")
    if len(sides) != 2 or len(terms) != 2 or len(operands) != 2:
        return {}
    for (x, w), (value, weight) in zip((terms, terms[::-1]), (operands, operands[::-1]), strict=True):
        contracted, kept = x[-1:], sides[1][-1:]
        if sorted(w) == sorted(contracted + kept) and sides[1] == x[:-1] + kept and kept not in x:
            first = w[0] == contracted
            return {"input": value, "weight": weight, "kind": "linear", "inputs_first": first, "product": True}
    return {}


def _constant(graph_module: fx.GraphModule, value: Any) -> _Constant | None:
    """The parameter that a node reads, directly or through transpositions."""
    transposed = False
    while isinstance(value, fx.Node) and is_transposition(value):
        value, transposed = value.args[0], not transposed
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    path = str(value.target)
    return _Constant(path, transposed) if isinstance(get_tensor(graph_module, path), nn.Parameter) else None


def _layer(
    graph_module: fx.GraphModule,
    name: str | None,
    kind: Kind,
    paths: tuple[str, str | None],
    groups: int = 1,
    conv: ConvGeometry | None = None,
    inputs_first: bool = False,
) -> Site | Refusal:
    """Read a layer whose weight and bias are at these paths."""
    weight_path, bias_path = paths
    weight: Tensor = get_tensor(graph_module, weight_path)
    name = name or _site_path(graph_module, weight_path, bias_path)
    if is_quantized(weight):
        return Refusal(name, kind, Reason.QUANTIZED, type(weight.data).__name__)
    if inputs_first:
        outputs, inputs = weight.shape[1], weight.shape[0] // groups * math.prod(weight.shape[2:])
    else:
        outputs, inputs = weight.shape[0] // groups, math.prod(weight.shape[1:])
    return Site(name, kind, weight_path, bias_path, groups, outputs, inputs, conv, inputs_first)


def _site_path(graph_module: fx.GraphModule, weight_path: str, bias_path: str | None) -> str:
    """The path for the factors of a functional site: that of the module if it only holds the weight and the bias that
    the site reads, else that of the weight."""
    owner_path, _, name = weight_path.rpartition(".")
    if not owner_path or name != "weight":
        return weight_path
    owner = graph_module.get_submodule(owner_path)
    held = {*dict(owner.named_parameters()), *dict(owner.named_buffers())}
    return owner_path if {f"{owner_path}.{tensor}" for tensor in held} <= {weight_path, bias_path} else weight_path


def _geometry(kernel: tuple[int, ...], kind: Kind, settings: dict[str, Any]) -> ConvGeometry:
    """The geometry of a functional call, whose arguments may be missing, single numbers or lists."""
    per_dimension = {
        key: _per_dimension(settings[key], len(kernel), default)
        for key, default in (("stride", 1), ("dilation", 1), ("output_padding", 0))
    }
    padding = settings["padding"]
    padding = padding if isinstance(padding, str) else _per_dimension(padding, len(kernel), 0)
    return ConvGeometry(
        kernel_size=kernel,
        stride=per_dimension["stride"],
        padding=_padding(padding, kernel, per_dimension["dilation"]),
        dilation=per_dimension["dilation"],
        padding_mode="zeros",
        output_padding=per_dimension["output_padding"] if kind.startswith("conv_transpose") else None,
    )


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(before, after) per dimension; with 'same', an odd total has the extra one after, as in nn.Conv."""
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((amount, amount) for amount in padding)


def _per_dimension(value: Any, dimensions: int, default: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (default if value is None else value,)
    return values * dimensions if len(values) == 1 else values


def _flat(values: Sequence[Any] | Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value
