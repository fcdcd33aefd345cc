"""Parameters of a graph: their paths, their readers, and their matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from balf_fx.graph.annotation import annotation
from balf_fx.graph.experts import leads_to_experts
from balf_fx.graph.fingerprint import Fingerprint
from balf_fx.graph.operators import is_transposition
from balf_fx.graph.site import Site

_LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of weights that are compressed and checked; others, such as float8, are left alone."""


def locate(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds what lies at a dotted path, and its name there."""
    owner, _, name = path.rpartition(".")
    return module.get_submodule(owner), name


def get_tensor(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, usually a parameter."""
    return getattr(*locate(module, path))


def bias_takes_time(weight: Tensor) -> bool:
    """Whether a linear layer takes longer with a bias.

    On a CPU, a product in single or double precision starts from outputs to which the bias was written. The device
    does not count, so that a model becomes the same on each.
    """
    return weight.dtype in (torch.float32, torch.float64)


def put(module: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    """Set the attribute at a dotted path; a module may replace a parameter, or the reverse."""
    owner, name = locate(module, path)
    if hasattr(owner, name) and isinstance(getattr(owner, name), nn.Module) != isinstance(value, nn.Module):
        delattr(owner, name)
    setattr(owner, name, value)


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a weight is a quantized tensor of torchao, which has a floating-point dtype."""
    return type(tensor.data).__module__.partition(".")[0] == "torchao"


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or not vars(module).keys().isdisjoint(("forward", "_conv_forward"))  # replaced on the instance


def called_module(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls; None for one that runs more than its forward, which may do anything."""
    module = graph_module.get_submodule(str(node.target))
    return None if is_hooked(module) else module


def computed_tensors(module: nn.Module) -> dict[int, Tensor]:
    """Detached copies, by id, of what hooks have computed with gradients and stored on modules.

    As the memo of `copy.deepcopy`, which refuses to copy such tensors.
    """
    held = (value for each in module.modules() for value in vars(each).values())
    return {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}


def count_parameters(module: nn.Module) -> int:
    """The number of parameters of a module; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def constant_nodes(graph_module: fx.GraphModule) -> set[fx.Node]:
    """The nodes that depend only on the module's own tensors: `get_attr` nodes and those computed from them."""
    found: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" or (_computes(node) and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def is_constant(node: fx.Node) -> bool:
    """Whether a node is one of the `constant_nodes` of its graph."""
    pending, seen = [node], {node}
    while pending:
        each = pending.pop()
        if each.op == "get_attr":
            continue
        if not _computes(each):
            return False
        new = [source for source in each.all_input_nodes if source not in seen]
        pending += new
        seen.update(new)
    return True


def _computes(node: fx.Node) -> bool:
    """Whether a node computes its value from others alone."""
    return node.op in ("call_function", "call_method") and bool(node.all_input_nodes) and not node.is_impure()


def parameter_users(graph_module: fx.GraphModule) -> dict[int, set[fx.Node]]:
    """The nodes that read each parameter, by its id, directly or through nodes that only transpose it."""
    users: dict[int, set[fx.Node]] = defaultdict(set)
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(node.target)
            for name, parameter in module.named_parameters():
                if type(module) not in _LAYERS or name in ("weight", "bias"):  # not what is only stored in a layer
                    users[id(parameter)].add(node)
        elif node.op == "get_attr":
            users[id(get_tensor(graph_module, node.target))] |= readers(node)
    return users


def owns_weight(graph_module: fx.GraphModule, users: Mapping[int, set[fx.Node]], node: fx.Node, site: Site) -> bool:
    """Whether only this layer reads its weight and its bias, in all graphs of the program.

    Args:
        users: the result of `parameter_users`.
    """
    paths = [path for path in (site.weight, site.bias) if path is not None]
    alone = all(users[id(get_tensor(graph_module, path))] == {node} for path in paths)
    return alone and not annotation(node).shared


def readers(source: fx.Node) -> set[fx.Node]:
    """The nodes that read a value, directly or through nodes that only transpose it or select experts in it."""
    found: set[fx.Node] = set()
    for user in source.users:
        passes_on = is_transposition(user) or leads_to_experts(user)
        found |= (readers(user) if passes_on else set()) or {user}
    return found


def fingerprint(graph_module: fx.GraphModule, site: Site) -> Fingerprint:
    """The fingerprint of the layer's current weight and bias."""
    bias = None if site.bias is None else get_tensor(graph_module, site.bias)
    return Fingerprint.of(get_tensor(graph_module, site.weight), bias)


def weight_matrix(weight: Tensor, groups: int, inputs_first: bool = False) -> Tensor:
    """A linear or convolution weight as float64 [G, O, D].

    Args:
        weight: [G * O, C_in / G, *kernel], or with `inputs_first` [C_in, O, *kernel].
    """
    grouped = weight.detach().to(torch.float64).reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return (grouped.transpose(1, 2) if inputs_first else grouped).flatten(2)


def grouped_weight(graph_module: fx.GraphModule, site: Site) -> Tensor:
    """The site's weight as float64 [G, O, D]."""
    return site_matrix(get_tensor(graph_module, site.weight), site)


def site_matrix(weight: Tensor, site: Site) -> Tensor:
    """A tensor in the shape of the site's weight as float64 [G, O, D]."""
    if site.has_experts:
        weight = weight.detach().to(torch.float64)
        return weight.mT if site.inputs_first else weight
    return weight_matrix(weight, site.groups, site.inputs_first)


def grouped_bias(graph_module: fx.GraphModule, site: Site) -> Tensor | None:
    """The site's bias as float64 [G, O], or None."""
    if site.bias is None:
        return None
    bias: Tensor = get_tensor(graph_module, site.bias)
    return bias.detach().to(torch.float64).reshape(site.groups, -1)
