"""Decompose multi-head attention into linear projections around `scaled_dot_product_attention`."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.proxy import GraphAppendingTracer
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from balf_fx.graph.annotation import annotation, carried_meta
from balf_fx.graph.attention import KERNELS, Attention, attend, encoder_layer, query_key_value, self_attention
from balf_fx.graph.parameters import get_tensor, is_hooked, put
from balf_fx.passes.base import Pass

_INPUTS = ("query", "key", "value")
_PARTS = ("q", "k", "v")
_MASKS = ("key_padding_mask", "attn_mask")
_FLAGS = (
    "num_heads",
    "add_zero_attn",
    "dropout_p",
    "training",
    "need_weights",
    "average_attn_weights",
    "is_causal",
    "use_separate_proj_weight",
)


_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Replace nn.MultiheadAttention and `F.multi_head_attention_forward` by operations that other passes support.

    A module at `name` is replaced by a container of plain nn.Linear modules: `name.in_proj` (E -> 3E) where query, key
    and value are one node in every call, else `name.q_proj`, `name.k_proj` and `name.v_proj`; and `name.out_proj`.
    A function's projections become `F.linear`. Attention weights are computed only where the graph reads them.

    These are left unchanged: attention with active dropout, with hooks, parametrized or subclassed modules, modules
    whose parameters something else uses, flags computed in the graph, `static_k` and `static_v`, a mask that may be
    None at run time, and `is_causal` without a mask (an error, except on the module's fast path, which ignores it).

    The output of a query whose keys are all masked is undefined. The module returns NaN or zero, depending on its code
    path. The decomposed attention returns what `scaled_dot_product_attention` returns, or NaN where the weights are
    read.

    The fused kernels that PyTorch uses without gradients, and that Dynamo captures, are decomposed too: those of
    self-attention and of encoder layers, without masks.

    Attributes:
        copy_weights: whether packed weights that are applied to different inputs are copied, a third for each; False
            leaves such functions unchanged, so that every parameter of the graph remains a parameter of the model.
    """

    copy_weights: bool = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        uses = _parameter_uses(graph_module)
        modified = False
        for module, nodes in _module_calls(graph_module).items():
            supported = all(_is_supported(_module_arguments(module, node)) for node in nodes)
            if supported and _is_plain(module, uses, len(nodes)):
                _replace_module(graph_module, module, nodes)
                modified = True
        for node in graph_module.graph.find_nodes(op="call_function", target=F.multi_head_attention_forward):
            call = _bind(F.multi_head_attention_forward, node)
            packed = _is_self_attention(call) and not call["use_separate_proj_weight"]
            if _is_supported(call) and (packed or self.copy_weights):
                _replace_function(graph_module, node, call, uses)
                modified = True
        for node in [node for node in graph_module.graph.nodes if node.target in KERNELS]:
            modified |= _replace_kernel(node)
        return PassResult(graph_module, modified)


def _module_calls(graph_module: fx.GraphModule) -> dict[nn.MultiheadAttention, list[fx.Node]]:
    calls: dict[nn.MultiheadAttention, list[fx.Node]] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        module = graph_module.get_submodule(str(node.target))
        if type(module) is nn.MultiheadAttention:
            calls.setdefault(module, []).append(node)
    return calls


def _parameter_uses(graph_module: fx.GraphModule) -> Counter[int]:
    """How often nodes use each tensor, by identity."""
    uses: Counter[int] = Counter()
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            uses.update({id(parameter) for parameter in graph_module.get_submodule(node.target).parameters()})
        elif node.op == "get_attr":
            uses[id(get_tensor(graph_module, node.target))] += max(len(node.users), 1)
    return uses


def _is_plain(module: nn.MultiheadAttention, uses: Counter[int], calls: int) -> bool:
    """Whether the graph only calls the module, and a call runs only the module's own forward."""
    out = module.out_proj
    return (
        type(out) in (NonDynamicallyQuantizableLinear, nn.Linear)
        and "weight" in out._parameters  # and not a weight that pruning or weight normalisation computes
        and not is_hooked(module)
        and all(uses[id(parameter)] == calls for parameter in module.parameters())
    )


def _bind(function: Callable[..., Any], node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by parameter name, defaults included."""
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _module_arguments(module: nn.MultiheadAttention, node: fx.Node) -> dict[str, Any]:
    """The call's arguments as those of `F.multi_head_attention_forward`, without the parameters."""
    constants = {name: getattr(module, name) for name in ("num_heads", "add_zero_attn", "training")}
    return {**_bind(module.forward, node), **constants, "dropout_p": module.dropout}


def _is_supported(call: dict[str, Any]) -> bool:
    if any(isinstance(call.get(flag), fx.Node) for flag in _FLAGS) or any(_may_be_none(call[name]) for name in _MASKS):
        return False
    if call.get("static_k") is not None or call.get("static_v") is not None:
        return False
    if call["is_causal"] and call["attn_mask"] is None:
        return False
    return not (call["training"] and call["dropout_p"] > 0)


def _may_be_none(mask: fx.Node | None) -> bool:
    """Whether the mask is an optional input of the graph that was not given in a recorded example."""
    return mask is not None and mask.op == "placeholder" and mask.args == (None,) and annotation(mask).shape is None


def _replace_module(graph_module: fx.GraphModule, module: nn.MultiheadAttention, nodes: list[fx.Node]) -> None:
    """Replace the attention by plain modules, at every path by which a node calls it."""
    packed = module.in_proj_weight is not None
    fused = packed and all(_is_self_attention(_module_arguments(module, node)) for node in nodes)
    container = _container(module, fused)
    for path in {str(node.target) for node in nodes}:
        put(graph_module, path, container)
    for node in nodes:
        with _in_place_of(node) as tracer:
            arguments = _proxies(tracer, _module_arguments(module, node))
            for name in ("bias_k", "bias_v"):
                held = getattr(module, name) is not None
                arguments[name] = tracer.create_proxy("get_attr", f"{node.target}.{name}", (), {}) if held else None
            inputs = [arguments[name] for name in _INPUTS]
            if fused:
                q, k, v = query_key_value(_linear(tracer, f"{node.target}.in_proj", inputs[0]), -1)
            else:
                parts = zip(_PARTS, inputs, strict=True)
                q, k, v = (_linear(tracer, f"{node.target}.{part}_proj", x) for part, x in parts)
            output, weights = _attend(node, q, k, v, arguments, module.batch_first)
            output = _linear(tracer, f"{node.target}.out_proj", output)
        _rewire(node, output, weights)


def _replace_function(graph_module: fx.GraphModule, node: fx.Node, call: dict[str, Any], uses: Counter[int]) -> None:
    with _in_place_of(node) as tracer:
        arguments = _proxies(tracer, call)
        if _is_self_attention(call) and not call["use_separate_proj_weight"]:
            packed = F.linear(arguments["query"], arguments["in_proj_weight"], arguments["in_proj_bias"])
            q, k, v = query_key_value(packed, -1)
        else:
            weights: Sequence[Any] = [arguments[f"{part}_proj_weight"] for part in _PARTS]
            if not call["use_separate_proj_weight"]:
                weights = _thirds(graph_module, arguments["in_proj_weight"], uses)
            biases = _thirds(graph_module, arguments["in_proj_bias"], uses)
            inputs = [arguments[name] for name in _INPUTS]
            q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        output, shares = _attend(node, q, k, v, arguments, batch_first=False)
        output = F.linear(output, arguments["out_proj_weight"], arguments["out_proj_bias"])
    sources = node.all_input_nodes
    _rewire(node, output, shares)
    _erase_unused(sources)


def _replace_kernel(node: fx.Node) -> bool:
    """Decompose a fused kernel of the module's fast path if it has one input and no mask; return whether it was."""
    call: dict[str, Any] = {**dict(zip(KERNELS[node.target], node.args, strict=False)), **node.kwargs}
    others = [call[name] for name in ("key", "value") if name in call]
    if call.get("mask") is not None or any(other is not call["query"] for other in others):
        return False
    layer = node.target is torch._transformer_encoder_layer_fwd
    with _in_place_of(node) as tracer:
        arguments = _proxies(tracer, call)
        if layer:
            output, shares = encoder_layer(arguments), None
        else:
            weights = call.get("need_weights", True) and _reads_weights(node)
            output, shares = self_attention(
                arguments["query"], arguments, weights=weights, average=call.get("average_attn_weights", True)
            )
    if layer:
        node.replace_all_uses_with(output.node)
        node.graph.erase_node(node)
    else:
        _rewire(node, output, shares)
    return True


def _is_self_attention(call: dict[str, Any]) -> bool:
    return call["query"] is call["key"] is call["value"]


def _proxies(tracer: GraphAppendingTracer, call: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments with a proxy for every node, so that operations on it are recorded in the graph."""
    return {name: tracer.proxy(value) if isinstance(value, fx.Node) else value for name, value in call.items()}


def _linear(tracer: GraphAppendingTracer, path: str, x: Any) -> Any:
    return tracer.create_proxy("call_module", path, (x,), {})


def _attend(node: fx.Node, q: Any, k: Any, v: Any, arguments: dict[str, Any], batch_first: bool) -> tuple[Any, Any]:
    """Record the attention of one call; the weights are None if they were not requested or nothing reads them."""
    need_weights = arguments["need_weights"]
    # Same as in PyTorch: the hint replaces the mask only where nothing else needs the mask itself.
    causal = arguments["is_causal"] and arguments["key_padding_mask"] is None and not need_weights
    same = ("num_heads", "bias_k", "bias_v", "add_zero_attn", "key_padding_mask", "average_attn_weights")
    how = Attention(
        batch_first=batch_first,
        attn_mask=None if causal else arguments["attn_mask"],
        is_causal=causal,
        weights=need_weights and _reads_weights(node),
        **{name: arguments[name] for name in same},
    )
    return attend(q, k, v, how)


def _container(module: Any, fused: bool) -> nn.Module:
    """The parameters of the attention in plain modules; only those that are split are new tensors."""
    container = nn.Module()
    if fused:
        container.in_proj = _linear_module(module.in_proj_weight, module.in_proj_bias)
    else:
        weights = [getattr(module, f"{part}_proj_weight") for part in _PARTS]
        if module.in_proj_weight is not None:
            weights = _cut(module.in_proj_weight)
        biases = [None] * 3 if module.in_proj_bias is None else _cut(module.in_proj_bias)
        for part, weight, bias in zip(_PARTS, weights, biases, strict=True):
            container.add_module(f"{part}_proj", _linear_module(weight, bias))
    container.out_proj = _linear_module(module.out_proj.weight, module.out_proj.bias)
    container.register_parameter("bias_k", module.bias_k)
    container.register_parameter("bias_v", module.bias_v)
    return container.train(module.training)


def _linear_module(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear


def _cut(parameter: Tensor) -> list[nn.Parameter]:
    return [nn.Parameter(part.clone(), parameter.requires_grad) for part in parameter.detach().chunk(3)]


def _thirds(graph_module: fx.GraphModule, packed: Any, uses: Counter[int]) -> Sequence[Any]:
    """Proxies for the query, key and value parts of a packed weight or bias.

    They are separate parameters where possible: the ones that the graph concatenates or, if nothing else uses the
    packed parameter, its parts at `name.q`, `name.k` and `name.v`.
    """
    if packed is None:
        return (None, None, None)
    node, path = packed.node, str(packed.node.target)
    parts = _concatenated(graph_module, node)
    if parts is None and node.op == "get_attr":
        parameter = get_tensor(graph_module, path)
        if isinstance(parameter, nn.Parameter) and uses[id(parameter)] == 1:
            container = nn.Module()
            for name, part in zip(_PARTS, _cut(parameter), strict=True):
                container.register_parameter(name, part)
            put(graph_module, path, container)
            parts = [node.graph.get_attr(f"{path}.{part}") for part in _PARTS]
    return query_key_value(packed, 0) if parts is None else [packed.tracer.proxy(part) for part in parts]


def _concatenated(graph_module: fx.GraphModule, node: fx.Node) -> list[fx.Node] | None:
    """The three attributes of the same shape that the node concatenates, or None."""
    if node.op != "call_function" or node.target not in _CONCATENATIONS:
        return None
    arguments: dict[str, Any] = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    parts = arguments.pop("tensors", None)
    if not isinstance(parts, Sequence) or len(parts) != 3 or arguments not in ({}, {"dim": 0}):
        return None
    if any(part.op != "get_attr" for part in parts):
        return None
    return list(parts) if len({get_tensor(graph_module, part.target).shape for part in parts}) == 1 else None


@contextmanager
def _in_place_of(node: fx.Node) -> Iterator[GraphAppendingTracer]:
    """Yield a tracer that inserts nodes before the node; they inherit its meta except for the entries of values."""
    previous = node.prev
    with node.graph.inserting_before(node):
        yield GraphAppendingTracer(node.graph)
    new = previous.next
    while new is not node:
        new.meta = carried_meta(node)
        new = new.next


def _item(user: fx.Node) -> int | None:
    """The index of the tuple's item that a node reads, or None if it uses the tuple in another way."""
    index = user.args[1] if user.target is operator.getitem else None
    return index if isinstance(index, int) and index in (0, 1) else None


def _reads_weights(node: fx.Node) -> bool:
    items = {user: _item(user) for user in node.users}
    return any(item is None or (item == 1 and user.users) for user, item in items.items())


def _rewire(node: fx.Node, output: Any, weights: Any) -> None:
    """Let the node's users read the output and the weights, as single values or as a tuple, and erase the node."""
    result = (output.node, None if weights is None else weights.node)
    for user in list(node.users):
        item = _item(user)
        if item is None:
            _substitute(user, node, result)
            continue
        for reader in list(user.users):
            _substitute(reader, user, result[item])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _substitute(reader: fx.Node, old: fx.Node, new: Any) -> None:
    reader.args = map_arg(reader.args, lambda node: new if node is old else node)
    reader.kwargs = map_arg(reader.kwargs, lambda node: new if node is old else node)


def _erase_unused(nodes: Sequence[fx.Node]) -> None:
    """Erase nodes that were only arguments of erased ones: attributes, concatenations, sizes."""
    pending = dict.fromkeys(nodes)
    while pending:
        node, _ = pending.popitem()
        if not node.users and (node.op == "get_attr" or node.target in (*_CONCATENATIONS, getattr, operator.getitem)):
            pending.update(dict.fromkeys(node.all_input_nodes))
            node.graph.erase_node(node)
