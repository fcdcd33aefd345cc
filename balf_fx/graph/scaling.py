"""The parameters that multiply a value of a graph by a positive factor if they are multiplied by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from balf_fx.graph.annotation import annotation
from balf_fx.graph.layers import read_layer, site_input
from balf_fx.graph.operators import arguments, is_identity, operation, value_readers
from balf_fx.graph.parameters import FLOATS, called_module, get_tensor, is_quantized, parameter_users
from balf_fx.graph.relayouts import is_relayout
from balf_fx.graph.site import Site

_HOMOGENEOUS = (
    *("relu", "leaky_relu", "neg", "mean", "sum", "select", "split", "split_with_sizes", "chunk", "unbind"),
    *("index_select", "float", "to", "type_as", "_to_copy", "clone", "alias", "detach", "permute"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
)
"""Operations f with f(c x) = c f(x) for c > 0, in their first argument."""

_MODULES = (
    *(nn.ReLU, nn.LeakyReLU, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_NORMS = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)
_NORM_CALLS = ("layer_norm", "group_norm", "rms_norm", "batch_norm")
_SUMS = ("add", "sub", "cat")


def scaling_parameters(
    graph_module: fx.GraphModule, value: fx.Node, may_change: Callable[[str], bool]
) -> tuple[str, ...]:
    """The paths of the parameters that scale a value, if all of them are multiplied by one positive factor.

    They are those of the layer that computes it or, where its weight may not change, of the normalisation before it.
    Nothing but the value changes: nothing else reads them, or what they change on the way to it.

    Args:
        may_change: whether the parameter at a path may change.

    Returns:
        The paths; none if there are no such parameters.
    """
    search = _Search(graph_module, may_change)
    search.scaled.add(value)
    for node in reversed(list(graph_module.graph.nodes)):
        if node in search.scaled and not search.visit(node):
            return ()
    readers = [user for node in search.scaled - {value} for user in value_readers(node)]
    readers += [user for user in value_readers(value) if not _returns(user)]
    once = search.scaled.issuperset(readers) and search.scaled.isdisjoint(search.unscaled)
    return tuple(search.paths) if once else ()


def returned_values(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The values that a graph returns, in the order of its outputs, those in containers among them."""
    (output,) = graph_module.graph.find_nodes(op="output")
    found, pending = list[fx.Node](), [output]
    while pending:
        node = pending.pop(0)
        if _returns(node):
            leaves = pytree.tree_leaves((node.args, node.kwargs))
            pending[:0] = [each for each in leaves if isinstance(each, fx.Node)]
        else:
            found.append(node)
    return found


def _returns(node: fx.Node) -> bool:
    """Whether a node only returns values, or puts them into a container, such as the outputs of transformers."""
    return node.op == "output" or (node.op == "call_function" and isinstance(node.target, type))


class _Search:
    """Goes from a value back to parameters.

    Attributes:
        scaled: the nodes whose values are multiplied.
        unscaled: nodes whose values may not be, since what they are multiplied with is scaled.
        paths: the parameters that are.
    """

    def __init__(self, graph_module: fx.GraphModule, may_change: Callable[[str], bool]) -> None:
        self.graph_module, self.may_change = graph_module, may_change
        self.users = parameter_users(graph_module)
        self.scaled: set[fx.Node] = set()
        self.unscaled: set[fx.Node] = set()
        self.paths: dict[str, None] = {}

    def visit(self, node: fx.Node) -> bool:
        """Scale what a node computes its value from; False if nothing does that."""
        layer = read_layer(self.graph_module, node)
        if isinstance(layer, Site):
            return not layer.has_experts and self._scale_layer(node, layer)
        if _is_homogeneous(self.graph_module, node):
            return self._scale_value(node.all_input_nodes[0])
        if operation(node) in _SUMS:
            summands = _summands(node)
            return len(summands) > 1 and all(self._scale_operand(node, summand) for summand in summands)
        if operation(node) in ("mul", "div"):
            return self._scale_factor(node)
        norm = _norm_parameters(self.graph_module, node)
        return bool(norm) and self._scale_map(node, norm, node.all_input_nodes[0])

    def _scale_layer(self, node: fx.Node, layer: Site) -> bool:
        """The weight, unless the layer's input is scaled already, or has to be instead; and the bias."""
        biases = [] if layer.bias is None else [layer.bias]
        source = site_input(node)
        if annotation(node).keeps_weights:
            return not biases and self._scale_value(source)
        if source not in self.scaled and self._scale_map(node, [layer.weight, *biases], source):
            return True
        return self._scale_parameters(node, biases) and self._scale_value(source)

    def _scale_factor(self, node: fx.Node) -> bool:
        """One of two factors: a parameter, as in a normalisation that a model writes out, or else the value."""
        values = [each for each in node.args if isinstance(each, fx.Node)]
        if len(values) == 1:  # the other one is a number
            return node.args[0] is values[0] and self._scale_value(values[0])
        parameters = [each for each in values if each.op == "get_attr"] if operation(node) == "mul" else []
        others = [each for each in values if each not in parameters]
        return len(parameters) == len(others) == 1 and self._scale_map(node, [str(parameters[0].target)], others[0])

    def _scale_operand(self, node: fx.Node, operand: Any) -> bool:
        if not isinstance(operand, fx.Node):
            return False
        if operand.op == "get_attr":
            return self._scale_parameters(node, [str(operand.target)])
        return self._scale_value(operand)

    def _scale_map(self, node: fx.Node, paths: list[str], source: fx.Node) -> bool:
        """Scale what a value is mapped with."""
        if not self._scale_parameters(node, paths):
            return False
        self.unscaled.add(source)
        return True

    def _scale_value(self, node: fx.Node) -> bool:
        self.scaled.add(node)
        return True

    def _scale_parameters(self, node: fx.Node, paths: list[str]) -> bool:
        """Scale parameters that this node alone reads, in all graphs; False, and none is, if one may not change."""
        if annotation(node).shared:
            return False
        for path in paths:
            value = get_tensor(self.graph_module, path)
            plain = isinstance(value, nn.Parameter) and value.dtype in FLOATS and not is_quantized(value)
            if not plain or self.users[id(value)] != {node} or not self.may_change(path):
                return False
        self.paths |= dict.fromkeys(paths)
        return True


def _is_homogeneous(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node's value is multiplied where its first argument is."""
    if is_identity(graph_module, node) or is_relayout(graph_module, node):
        return True
    if node.op == "call_module":
        return type(called_module(graph_module, node)) in _MODULES
    return operation(node) in _HOMOGENEOUS


def _summands(node: fx.Node) -> Sequence[Any]:
    """What a node adds, or puts side by side."""
    given: Any = node.args[0] if operation(node) == "cat" else node.args
    return list(given) if isinstance(given, list | tuple) else []


def _norm_parameters(graph_module: fx.GraphModule, node: fx.Node) -> list[str]:
    """The weight and the bias of a normalisation; empty for others, and where it has no weight."""
    if node.op == "call_module":
        module = called_module(graph_module, node)
        known = type(module) in _NORMS and getattr(module, "weight", None) is not None
        names = [name for name in ("weight", "bias") if known and getattr(module, name, None) is not None]
        return [f"{node.target}.{name}" for name in names]
    given = arguments(node) if operation(node) in _NORM_CALLS else {}
    found = [given.get(name) for name in ("weight", "bias")]
    if not isinstance(found[0], fx.Node):
        return []
    return [str(each.target) for each in found if isinstance(each, fx.Node) and each.op == "get_attr"]


def table_sizes(graph_module: fx.GraphModule) -> list[int]:
    """The number of rows of each embedding that a graph reads."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            found += [module.num_embeddings] if isinstance(module, nn.Embedding) else []
        elif operation(node) == "embedding":
            found += [
                len(get_tensor(graph_module, str(each.target)))
                for each in node.all_input_nodes
                if each.op == "get_attr"
            ]
    return found
