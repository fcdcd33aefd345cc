"""Channels: features that pass from layer to layer through operations that treat each feature separately."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from balf_fx.graph.annotation import annotation
from balf_fx.graph.layers import read_layer, site_input
from balf_fx.graph.operators import operation, reads_metadata
from balf_fx.graph.parameters import owns_weight, parameter_users
from balf_fx.graph.site import Reason, Site
from balf_fx.graph.widths import Width

_LEAST = 8  # the least number of features that is worth reducing


_MOST_LAYERS = 4  # as in a gated block with squeeze-and-excitation; a residual stream has many more


_MODULES = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softsign),
)


_ELEMENTWISE_NAMES = (
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "sigmoid"),
    *("tanh", "hardtanh", "hardsigmoid", "hardswish", "softsign", "dropout", "clamp", "exp", "abs", "sqrt", "rsqrt"),
    *("square", "neg", "erf", "contiguous", "clone", "float", "to", "type_as", "detach", "pow"),
    *("add", "sub", "mul", "div", "truediv", "iadd", "isub", "imul", "itruediv", "true_divide"),
)


_POOL_MODULES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool1d)


_POOL_NAMES = ("adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d", "_adaptive_avg_pool2d")


@dataclass
class _Cone:
    """All nodes whose values contain the features, each with the axis of the features."""

    axes: dict[fx.Node, int] = field(default_factory=dict)
    producers: list[fx.Node] = field(default_factory=list)
    consumers: list[fx.Node] = field(default_factory=list)
    between: list[fx.Node] = field(default_factory=list)


class _UnsupportedError(Exception):
    """An operation in the cone mixes the features, or needs all of them."""


def find_channels(graph_module: fx.GraphModule) -> Iterator[Width]:
    """The widths of kind "channels" in an annotated and profiled graph."""
    finder = _Finder(graph_module)
    seen: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        site = annotation(node).site
        if site is None or not finder.is_layer(node, site):
            continue
        source = site_input(node)
        shape = annotation(source).shape
        if source in seen or shape is None:
            continue
        features = finder.inputs(site)
        try:
            cone = finder.grow(source, _feature_axis(site, shape), features)
        except _UnsupportedError:
            continue
        seen.update(cone.axes)
        consumers = sorted(cone.consumers, key=lambda n: -(annotation(n).flops or 0))
        site_of = [annotation(consumer).site for consumer in consumers]
        if features >= _LEAST and cone.producers and site_of[0] is not None:
            yield Width(
                "channels",
                site_of[0].name,
                features,
                producers=tuple(producer.name for producer in cone.producers),
                consumers=tuple(consumer.name for consumer in consumers),
                rows=tuple(tuple(range(features)) for _ in cone.producers),
                between=tuple(node.name for node in cone.between),
            )


def _feature_axis(site: Site, shape: tuple[int, ...]) -> int:
    return len(shape) - 1 if site.conv is None else len(shape) - 1 - len(site.conv.kernel_size)


class _Finder:
    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.users = parameter_users(graph_module)

    def inputs(self, site: Site) -> int:
        """The number of input features of a layer with one group: the channels for a convolution."""
        return site.in_features // site.taps

    def is_layer(self, node: fx.Node, site: Site) -> bool:
        """Whether rows and columns of a layer may be removed: nothing else reads its weight."""
        mark = annotation(node)
        if mark.refusal is not None and mark.refusal.reason is not Reason.TOO_SMALL:
            return False
        plain = site.groups == 1 and not (site.keeps_weight or site.transposed or site.has_experts)
        return plain and self._owns(node, site)

    def grow(self, source: fx.Node, axis: int, features: int) -> _Cone:
        """All nodes and layers that depend on the number of features at one value."""
        cone = _Cone()
        pending = [(source, axis)]
        while pending:
            node, axis = pending.pop()
            if node in cone.axes:
                if cone.axes[node] != axis:
                    raise _UnsupportedError
                continue
            shape = annotation(node).shape
            if shape is None or not -1 < axis < len(shape) or shape[axis] != features:
                raise _UnsupportedError
            cone.axes[node] = axis
            pending += self._sources(node, axis, features, cone)
            pending += self._users(node, axis, features, cone)
            if len(cone.producers) + len(cone.consumers) > _MOST_LAYERS:
                raise _UnsupportedError
        return cone

    def _sources(self, node: fx.Node, axis: int, features: int, cone: _Cone) -> list[tuple[fx.Node, int]]:
        """The values from which a node gets the features; none for a layer, which computes them."""
        layer = read_layer(self.graph_module, node)
        shape = annotation(node).shape or ()
        if isinstance(layer, Site):
            if _is_depthwise(layer, features) and self._owns(node, layer) and not _is_excluded(node):
                cone.between.append(node)
                return [(site_input(node), axis)]
            if self.is_layer(node, layer) and axis == _feature_axis(layer, shape) and layer.out_features == features:
                cone.producers.append(node)
                return []
            raise _UnsupportedError
        if not self._passes_on(node, axis):
            raise _UnsupportedError
        found: list[tuple[fx.Node, int]] = []
        for source in node.all_input_nodes:
            own = self._source_axis(node, source, axis)
            size = annotation(source).shape
            if own is None or size is None or size[own] == 1:
                continue  # broadcast along the features
            if source.op == "get_attr":
                shared = len(source.users) > 1 or annotation(source).shared
                if shared or size.count(features) != 1 or size[own] != features:
                    raise _UnsupportedError
                cone.between.append(source)
            else:
                found.append((source, own))
        if not found:
            raise _UnsupportedError
        return found

    def _users(self, node: fx.Node, axis: int, features: int, cone: _Cone) -> list[tuple[fx.Node, int]]:
        found = []
        for user in node.users:
            if reads_metadata(user):
                if not _is_harmless(user, axis):
                    raise _UnsupportedError
                continue
            layer = read_layer(self.graph_module, user)
            if isinstance(layer, Site):
                shape = annotation(node).shape or ()
                if site_input(user) is not node:
                    raise _UnsupportedError
                if _is_depthwise(layer, features):
                    found.append((user, axis))
                elif annotation(user).site is not None and self.is_layer(user, layer):
                    if axis != _feature_axis(layer, shape) or self.inputs(layer) != features:
                        raise _UnsupportedError
                    cone.consumers.append(user)
                else:
                    raise _UnsupportedError
                continue
            own = self._user_axis(node, user, axis)
            if own is None:
                raise _UnsupportedError
            found.append((user, own))
        return found

    def _owns(self, node: fx.Node, layer: Site) -> bool:
        return owns_weight(self.graph_module, self.users, node, layer)

    def _passes_on(self, node: fx.Node, axis: int) -> bool:
        """Whether a node treats each feature separately."""
        flattens = axis == 1 and self._is_flatten(node)
        return flattens or self._is_elementwise(node) or self._is_pool(node, axis) or _is_pad(node, axis)

    def _is_elementwise(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.graph_module.get_submodule(str(node.target))) in _MODULES
        return operation(node) in _ELEMENTWISE_NAMES and "out" not in node.kwargs

    def _is_pool(self, node: fx.Node, axis: int) -> bool:
        if node.op == "call_module":
            return type(self.graph_module.get_submodule(str(node.target))) in _POOL_MODULES
        if operation(node) == "mean":
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            listed = dims if isinstance(dims, list | tuple) else [dims]
            rank = len(annotation(node.all_input_nodes[0]).shape or ())
            return all(isinstance(d, int) and d % rank > axis for d in listed) and rank > 0
        return operation(node) in _POOL_NAMES

    def _is_flatten(self, node: fx.Node) -> bool:
        """Whether a node flattens all axes from axis 1 on; the shape shows whether those after axis 1 have size 1."""
        if node.op == "call_module":
            module = self.graph_module.get_submodule(str(node.target))
            return isinstance(module, nn.Flatten) and module.start_dim == 1
        start: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
        return operation(node) == "flatten" and start == 1

    def _source_axis(self, node: fx.Node, source: fx.Node, axis: int) -> int | None:
        """The axis of a node's features on one of its sources; None if the source is broadcast along them."""
        shape, own = annotation(node).shape, annotation(source).shape
        if shape is None or own is None:
            return None
        if not self._is_elementwise(node):
            return axis  # pools and flattening only affect the axes after the features
        from_right = axis - len(shape)
        return len(own) + from_right if len(own) >= -from_right else None

    def _user_axis(self, node: fx.Node, user: fx.Node, axis: int) -> int | None:
        """The axis of a node's features on the value of a user; None if the user mixes them."""
        shape, own = annotation(user).shape, annotation(node).shape
        if shape is None or own is None or not self._passes_on(user, axis):
            return None
        return len(shape) - (len(own) - axis) if self._is_elementwise(user) else axis


def _is_excluded(node: fx.Node) -> bool:
    """Whether the user excluded the layer."""
    refusal = annotation(node).refusal
    return refusal is not None and refusal.reason is Reason.EXCLUDED


def _is_depthwise(layer: Site, features: int) -> bool:
    return layer.conv is not None and layer.groups == features and layer.out_features == 1 and not layer.inputs_first


def _is_pad(node: fx.Node, axis: int) -> bool:
    if node.target is not F.pad:
        return False
    amounts = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
    rank = len(annotation(node).shape or ())
    return isinstance(amounts, list | tuple) and len(amounts) // 2 < rank - axis


def _is_harmless(user: fx.Node, axis: int) -> bool:
    """Whether a reader of a value's shape or type does not depend on the number of features."""
    if user.target is getattr and user.args[1] in ("ndim", "dtype", "device"):
        return True
    if user.op == "call_method" and user.target == "dim":
        return True
    if user.op == "call_method" and len(user.args) > 1:
        rank = len(annotation(user.all_input_nodes[0]).shape or ())
        return isinstance(user.args[1], int) and rank > 0 and user.args[1] % rank != axis
    items = [reader.args[1] if reader.target is operator.getitem else None for reader in user.users]
    return all(isinstance(item, int) and item >= 0 and item != axis for item in items)
