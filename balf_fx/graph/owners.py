"""The modules that compute the layers of a graph, and whether other modules can take their place in the model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Literal

from torch import Tensor, fx, nn

from balf_fx.graph.annotation import graph_record
from balf_fx.graph.edits import MODULE_STACK
from balf_fx.graph.layers import read_layer
from balf_fx.graph.parameters import get_tensor, is_hooked, parameter_users
from balf_fx.graph.site import Site

Kind = Literal["layer", "norm", "table"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS: Mapping[type, Kind] = {
    **dict.fromkeys((nn.Linear, *_CONVS), "layer"),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), "norm"),
}
_LIKE_LINEAR = (  # of libraries that are not imported for it: linear layers in other words
    "timm.layers.linear.Linear",
    "transformers.pytorch_utils.Conv1D",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
)


_WITH_CHILDREN = {"timm.layers.norm_act.BatchNormAct2d": ("drop", "act")}  # norms that then run these


def children_after_norm(norm: nn.Module) -> tuple[str, ...]:
    """The names of the children that a BatchNorm runs on its output."""
    return _WITH_CHILDREN.get(_class_name(norm), ())


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def stock_modules(model: nn.Module) -> dict[str, Kind]:
    """The modules of a model that compute what their class defines, and nothing else, by dotted path.

    Subclasses, the model itself, and modules with hooks, parametrizations or another forward are left out; subclasses
    of embeddings are not, since only their weights are replaced.
    """
    found: dict[str, Kind] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = _KINDS.get(type(module))
        if _class_name(module) in _LIKE_LINEAR:
            kind = "layer"
        if _class_name(module) in _WITH_CHILDREN:
            kind = "norm"
        if isinstance(module, _CONVS) and module.padding_mode != "zeros":
            kind = None  # its forward pads before it convolves
        if isinstance(module, nn.Embedding):
            kind = "table"
        if path and kind is not None and not is_hooked(module):
            found[path] = kind
    return found


def parameters_named_once(model: nn.Module) -> frozenset[str]:
    """The paths of the parameters that a model holds under one name alone, so that others may take their place."""
    named = list(model.named_parameters(remove_duplicate=False))
    names = Counter(id(parameter) for _, parameter in named)
    return frozenset(path for path, parameter in named if names[id(parameter)] == 1)


def owner_of(node: fx.Node) -> str | None:
    """The path of the innermost module whose forward ran the node; None for the model itself, or if it is not known."""
    stack = node.meta.get(MODULE_STACK)
    if not stack:
        return None
    path, _ = list(stack.values())[-1]
    return str(path).partition("@")[0] or None  # torch.export counts the calls of one module


def fixed_layers(graph_module: fx.GraphModule, nodes: Collection[fx.Node]) -> set[fx.Node]:
    """The layers that no module can replace in the model itself; none where the result is a graph.

    A layer can be replaced if one stock module computes all of its uses, and all other readers of its weight, such as
    an embedding that is tied to it, are stock modules, too: they have the weight under a name of their own.
    """
    known = graph_record(graph_module).modules
    if known is None:
        return set()
    users = parameter_users(graph_module)
    by_weight: dict[int, list[fx.Node]] = defaultdict(list)
    biases: dict[int, int | None] = {}
    for node in nodes:
        layer = read_layer(graph_module, node)
        if isinstance(layer, Site):
            weight: Tensor = get_tensor(graph_module, layer.weight)
            by_weight[id(weight)].append(node)
            biases[id(weight)] = None if layer.bias is None else id(get_tensor(graph_module, layer.bias))
    found: set[fx.Node] = set()
    for key, own in by_weight.items():
        paths = {owner_of(node) for node in own}
        others = {owner_of(node) for node in users[key] - set(own)}
        bias = biases[key]
        replaceable = (
            len(paths) == 1
            and all(path is not None and known.get(path) == "layer" for path in paths)
            and all(path is not None and path in known and path not in paths for path in others)
            and (bias is None or users[bias] <= set(own))
        )
        found |= set() if replaceable else set(own)
    return found
