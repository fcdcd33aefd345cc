"""Evaluate the weights and biases that a graph computes from its parameters, and store the results as parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.graph.annotation import annotate
from balf_fx.graph.constants import NotConstantError, evaluated, expression, sources, unchanged_constants
from balf_fx.graph.edits import erase_unused
from balf_fx.graph.experts import product_weights
from balf_fx.graph.layers import layer_parameters
from balf_fx.graph.operators import is_transposition
from balf_fx.graph.parameters import get_tensor, is_quantized, locate, parameter_users
from balf_fx.passes.base import Pass


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace computed weights and biases of layers by new parameters.

    Standardised and parametrized weights, concatenated biases and the like are constant in deployment. A value is
    folded if it depends on parameters and buffers only, on at least one parameter and on no quantized one, is not
    random, and is not changed in place. The model does not grow: values that are computed from the same tensors are
    folded if together they take no more memory than what nothing else reads of these tensors. The new parameter is
    stored in the layer that holds the first of the old ones, or beside that layer if the graph calls it.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        constants = unchanged_constants(graph_module)
        found: dict[fx.Node, _Folding] = {}
        products = set()
        for node in graph_module.graph.nodes:
            weights = product_weights(node)
            for weight in weights:
                folding = _folding(graph_module, "weight", weight, constants)
                if folding is not None and folding.value.dim() == 3:
                    found[weight] = folding
            if any(weight in found or _is_stack(graph_module, weight) for weight in weights):
                products.add(node)  # what transposes or selects these matrices stays
        products |= constants  # products within the computation of a weight are no layers
        layers = (node for node in graph_module.graph.nodes if node not in products)
        operands = [value for node in layers for value in layer_parameters(node).items()]
        for role, node in dict.fromkeys((role, _behind_transpositions(value)) for role, value in operands):
            folding = None if node in found else _folding(graph_module, role, node, constants)
            if folding is not None:
                found[node] = folding
        paths: list[tuple[_Folding, str]] = []
        for folding in _not_growing(graph_module, list(found.values())):
            path = next((path for other, path in paths if folding.equals(other)), None)
            paths.append((folding, _fold(graph_module, folding, path)))
        return PassResult(graph_module, bool(paths))


@dataclass(frozen=True, eq=False)
class _Folding:
    """A constant node that can be replaced by a parameter.

    Attributes:
        role: what it is to a layer, "weight" or "bias".
        paths: of the attributes from which it is computed, in order of use.
        tensors: these attributes.
    """

    role: str
    node: fx.Node
    value: Tensor
    paths: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    def equals(self, other: _Folding) -> bool:
        """Whether both can be the same parameter, as where a layer that computes its weight is called twice."""
        alike = self.role == other.role and set(map(id, self.tensors)) == set(map(id, other.tensors))
        return alike and self.value.dtype == other.value.dtype and torch.equal(self.value, other.value)


def _is_constant(node: fx.Node, constants: set[fx.Node]) -> bool:
    """Whether a node computes its value from constants only."""
    return node.op != "get_attr" and constants.issuperset(expression(node))


def _is_stack(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node reads a stack of matrices."""
    value = get_tensor(graph_module, str(node.target)) if node.op == "get_attr" else None
    return isinstance(value, Tensor) and value.dim() == 3


def _behind_transpositions(node: fx.Node) -> fx.Node:
    """The node before any transpositions: a site can read a transposed weight, so these need no folding."""
    while is_transposition(node):
        node = node.all_input_nodes[0]
    return node


def _folding(graph_module: fx.GraphModule, role: str, node: fx.Node, constants: set[fx.Node]) -> _Folding | None:
    """What can be folded at a node; None for any other node."""
    if not _is_constant(node, constants):
        return None
    paths = tuple(str(source.target) for source in sources(node))
    tensors = tuple(get_tensor(graph_module, path) for path in paths)
    if not any(isinstance(tensor, nn.Parameter) for tensor in tensors) or any(map(is_quantized, tensors)):
        return None
    try:
        value = evaluated(graph_module, node)
    except NotConstantError:
        return None
    return _Folding(role, node, value, paths, tensors) if value.is_floating_point() else None


def _not_growing(graph_module: fx.GraphModule, foldings: Sequence[_Folding]) -> list[_Folding]:
    """The foldings that, together with those that share their tensors, take no more memory than is freed."""
    groups: list[list[_Folding]] = []
    for folding in foldings:
        own = set(map(id, folding.tensors))
        joined = [group for group in groups if any(not own.isdisjoint(map(id, each.tensors)) for each in group)]
        merged = [*(each for group in joined for each in group), folding]
        groups = [*(group for group in groups if group not in joined), merged]
    users = parameter_users(graph_module)
    chosen = [folding for group in groups if _stored(group) <= _freed(group, users) for folding in group]
    return [folding for folding in foldings if folding in chosen]


def _stored(group: Sequence[_Folding]) -> int:
    """The number of elements of the new parameters."""
    firsts = [each for i, each in enumerate(group) if not any(map(each.equals, group[:i]))]
    return sum(folding.value.numel() for folding in firsts)


def _freed(group: Sequence[_Folding], users: Mapping[int, set[fx.Node]]) -> int:
    """The number of elements of the tensors that nothing reads any longer."""
    ends = {folding.node for folding in group}

    @cache
    def is_lost(node: fx.Node) -> bool:
        return node in ends or (bool(node.users) and node in inside and all(map(is_lost, node.users)))

    inside = set[fx.Node]().union(*(expression(folding.node) for folding in group))
    tensors = {id(tensor): tensor for folding in group for tensor in folding.tensors}
    return sum(tensor.numel() for identity, tensor in tensors.items() if all(map(is_lost, users[identity])))


def _fold(graph_module: fx.GraphModule, folding: _Folding, path: str | None) -> str:
    """Replace a node by a new parameter, or by the one at a path, and return its path."""
    node = folding.node
    with graph_module.graph.inserting_before(node):
        fetched = graph_module.graph.create_node("get_attr", "")  # named below, once the old names are free
    first = next(i for i, tensor in enumerate(folding.tensors) if isinstance(tensor, nn.Parameter))
    owner_path = _owner(graph_module, _layer_path(folding.paths[first]))
    node.replace_all_uses_with(fetched)
    erase_unused(graph_module, node)
    if path is None:
        owner = graph_module.get_submodule(owner_path)
        name = folding.role if not hasattr(owner, folding.role) else f"{folding.role}_folded"
        while hasattr(owner, name):
            name += "_"
        trains = any(tensor.requires_grad for tensor in folding.tensors)
        owner.register_parameter(name, nn.Parameter(folding.value.clone(), trains))
        path = f"{owner_path}.{name}" if owner_path else name
    annotate(fetched, computed_from=folding.tensors)
    fetched.target = path
    return path


def _owner(graph_module: fx.GraphModule, path: str) -> str:
    """The path of the module that holds a folded parameter of the layer at this path.

    A module that is called as a whole may be replaced as a whole, so the parameter is stored beside it.
    """
    modules = [str(node.target) for node in graph_module.graph.find_nodes(op="call_module")]
    called = next((each for each in modules if f"{path}.".startswith(f"{each}.")), None)
    if called is None:
        return path
    parent, name = locate(graph_module, f"{called}_folded")
    while hasattr(parent, name) and type(getattr(parent, name)) is not nn.Module:
        name += "_"
    if not hasattr(parent, name):
        parent.add_module(name, nn.Module())
    above = called.rpartition(".")[0]
    return f"{above}.{name}" if above else name


def _layer_path(path: str) -> str:
    """The path of a parameter's layer; a parameter stored by torch.nn.utils.parametrize belongs to the layer above."""
    parts = path.split(".")[:-1]
    return ".".join(parts[: parts.index("parametrizations")] if "parametrizations" in parts else parts)
