"""Small edits of a graph that several passes share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from balf_fx.graph.annotation import annotate
from balf_fx.graph.layers import argument_position, read_layer
from balf_fx.graph.operators import changes_in_place, is_identity, is_opaque_call
from balf_fx.graph.parameters import is_constant, is_hooked, locate
from balf_fx.graph.site import Site


def set_bias(graph_module: fx.GraphModule, node: fx.Node, bias: nn.Parameter) -> None:
    """Add a bias to a layer without one: in its module, or as a new parameter that the call reads."""
    if node.op == "call_module":
        graph_module.get_submodule(str(node.target)).register_parameter("bias", bias)
        return
    layer = read_layer(graph_module, node)
    if not isinstance(layer, Site):
        raise TypeError(f"{node.name} is not a layer")
    owner, _, name = layer.weight.rpartition(".")
    module = graph_module.get_submodule(owner)
    free = "bias" if name == "weight" and not hasattr(module, "bias") else f"{name}_bias"
    module.register_parameter(free, bias)
    with graph_module.graph.inserting_before(node):
        fetched = graph_module.graph.get_attr(f"{owner}.{free}" if owner else free)
    position = argument_position(node, "bias")
    if position < len(node.args):
        node.update_arg(position, fetched)
    else:
        node.update_kwarg("bias", fetched)


def erase_unused(graph_module: fx.GraphModule, node: fx.Node, links: Collection[fx.Node] = ()) -> None:
    """Erase a node without readers, the nodes that only computed a constant for it, and that constant.

    Args:
        links: other nodes that are erased if nothing else reads them.
    """
    pending = {node: None}
    while pending:
        node, _ = pending.popitem()
        if node.users:
            continue
        pending |= {source: None for source in node.all_input_nodes if source in links or is_constant(source)}
        graph_module.graph.erase_node(node)
        if node.op == "get_attr" and not any(_fetches(other, str(node.target)) for other in graph_module.graph.nodes):
            _delete_tensor(graph_module, str(node.target))


def _delete_tensor(graph_module: fx.GraphModule, path: str) -> None:
    module, name = locate(graph_module, path)
    module._parameters.pop(name, None)
    module._buffers.pop(name, None)


def drop_dead_code(graph_module: fx.GraphModule) -> None:
    """Erase the nodes whose values nothing reads, and the modules and tensors that no node reads."""
    readers = {node: list(node.users) for node in graph_module.graph.nodes}
    graph_module.graph.eliminate_dead_code(lambda node: _has_effects(graph_module, node))
    graph_module.delete_all_unused_submodules()
    nodes = list(graph_module.graph.nodes)
    for node in nodes:
        if not set(readers[node]) <= set(node.users):
            annotate(node, discarded=True)
    held = (*graph_module.named_parameters(remove_duplicate=False), *graph_module.named_buffers(remove_duplicate=False))
    for path, _ in held:
        if not any(_fetches(node, path) for node in nodes):
            _delete_tensor(graph_module, path)
    graph_module.recompile()


def _has_effects(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may do more than return a value: assert, draw random numbers, or change a value.

    Functions outside of torch, methods that tensors do not have, and hooks may do anything.
    """
    if node.is_impure(impure_random=_draws(graph_module, node)) or changes_in_place(graph_module, node):
        return True
    if node.op == "call_module":
        return any(map(is_hooked, graph_module.get_submodule(str(node.target)).modules()))
    if node.op == "call_method":
        return str(node.target).endswith("_") or not hasattr(torch.Tensor, str(node.target))
    return is_opaque_call(node)


def _draws(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a random operation draws numbers: those with dropout do not in evaluation mode, or where it is 0."""
    if is_identity(graph_module, node):
        return False
    for name, none in (("train", False), ("dropout_p", 0.0)):  # of recurrent layers, and of attention
        value = _argument(node, name)
        if value is not None:
            return bool(value != none)
    return True


def _argument(node: fx.Node, name: str) -> Any:
    """The argument of a call of an operator, or its default; None where it has no argument of this name."""
    schema = getattr(node.target, "_schema", None)
    for index, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name == name:
            given = node.args[index] if index < len(node.args) else argument.default_value
            return node.kwargs.get(name, given)
    return None


def _fetches(node: fx.Node, path: str) -> bool:
    """Whether a node reads the tensor at a path, itself or through the module that it calls."""
    if node.op == "get_attr":
        return bool(node.target == path)
    return node.op == "call_module" and path.startswith(f"{node.target}.")


MODULE_STACK = "nn_module_stack"
"""The key: {a unique name: (path, class)} from the outermost module to the innermost."""


def module_stack(graph_module: fx.GraphModule, path: str, node: fx.Node, replaced: str) -> dict[str, tuple[str, type]]:
    """The module stack of a call that replaces a node.

    Args:
        path: path of the module that is called, at `replaced` or inside it.
        node: the node that is replaced; the modules around it are those around the call.
        replaced: path of the module or parameter that the node used.
    """
    stack = {key: entry for key, entry in (node.meta.get(MODULE_STACK) or {}).items() if entry[0] != replaced}
    inside = path.removeprefix(replaced).split(".")
    for depth in range(len(inside)):
        name = replaced + ".".join(inside[: depth + 1])
        stack[name] = (name, type(graph_module.get_submodule(name)))
    return stack
