"""Mark every factorizable node as a site, and store with every other node that has parameters the reason why not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from balf_fx.errors import PassError, UnknownSiteError
from balf_fx.passes.base import Pass
from balf_fx.sites import ConvGeometry, Kind, Reason, Refusal, Site, annotate, annotation, get_tensor, is_hooked

_MODULES: dict[type[nn.Module], Kind] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}
_FUNCTIONS: dict[Any, Kind] = {F.linear: "linear", F.conv1d: "conv1d", F.conv2d: "conv2d", F.conv3d: "conv3d"}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_WEIGHTS = ("weight", "bias")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Annotate(Pass):
    """Find the sites.

    Attributes:
        include: glob patterns of site names; None takes every site.
        exclude: glob patterns of site names to leave out.

    Raises:
        UnknownSiteError: a pattern matches no layer that could be a site.
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        uses = _parameter_uses(graph_module)
        found = [(node, _classify(graph_module, node, uses)) for node in graph_module.graph.nodes]
        self._check_patterns([mark.name for _, mark in found if isinstance(mark, Site)])
        for node, mark in found:
            if isinstance(mark, Site):
                mark = self._selected(mark)
            site = mark if isinstance(mark, Site) else None
            refusal = mark if isinstance(mark, Refusal) else None
            annotate(node, site=site, refusal=refusal)
        return PassResult(graph_module, False)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        names = Counter(mark.site.name for mark in map(annotation, graph_module.graph.nodes) if mark.site)
        repeated = [name for name, count in names.items() if count > 1]
        if repeated:
            raise PassError(f"Annotate gave several sites the same name: {', '.join(repeated)}")

    def _selected(self, site: Site) -> Site | Refusal:
        if any(fnmatchcase(site.name, pattern) for pattern in self.exclude):
            return Refusal(site.name, site.kind, Reason.EXCLUDED, "matches exclude")
        if self.include is not None and not any(fnmatchcase(site.name, pattern) for pattern in self.include):
            return Refusal(site.name, site.kind, Reason.EXCLUDED, "matches no include")
        return site

    def _check_patterns(self, names: list[str]) -> None:
        for option, patterns in (("include", self.include or ()), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise UnknownSiteError(
                        f"{option} pattern {pattern!r} matches no site; sites are: {', '.join(names)}"
                    )


def _parameter_uses(graph_module: fx.GraphModule) -> Counter[int]:
    """How many nodes use each tensor, by identity."""
    uses: Counter[int] = Counter()
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            uses.update({id(parameter) for parameter in graph_module.get_submodule(node.target).parameters()})
        elif node.op == "get_attr":
            uses[id(get_tensor(graph_module, node.target))] += len(node.users)
    return uses


def _classify(graph_module: fx.GraphModule, node: fx.Node, uses: Counter[int]) -> Site | Refusal | None:
    """The node's site, or why it is none; None where it has no parameters."""
    if node.op == "call_module":
        return _classify_module(graph_module, node, uses)
    if node.op in ("call_function", "call_method"):
        return _classify_function(graph_module, node, uses)
    return None


def _classify_module(graph_module: fx.GraphModule, node: fx.Node, uses: Counter[int]) -> Site | Refusal | None:
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
    if "weight" not in module._parameters:
        return Refusal(name, kind, Reason.COMPUTED, "weight is not a parameter")
    conv = None
    if not isinstance(module, nn.Linear):
        padding = _padding(module.padding, module.kernel_size, module.dilation)
        conv = ConvGeometry(module.kernel_size, module.stride, padding, module.dilation, module.padding_mode)
    groups = 1 if conv is None else module.groups
    bias = None if module._parameters["bias"] is None else f"{name}.bias"
    return _checked(graph_module, uses, name, kind, f"{name}.weight", bias, groups, conv)


def _classify_function(graph_module: fx.GraphModule, node: fx.Node, uses: Counter[int]) -> Site | Refusal | None:
    attributes = [source for source in node.all_input_nodes if source.op == "get_attr"]
    parameters = [a for a in attributes if isinstance(get_tensor(graph_module, str(a.target)), nn.Parameter)]
    kind = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
    function = str(getattr(node.target, "__name__", node.target))
    if kind is None:
        path = str(parameters[0].target) if parameters else ""
        return Refusal(path, function, Reason.NOT_LINEAR) if parameters else None
    arguments: dict[str, Any] = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    weight, bias = (arguments.get(key) for key in _WEIGHTS)
    label = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else node.name
    name = _site_path(graph_module, label)
    if weight not in parameters or not (bias is None or bias in parameters):
        return Refusal(name, function, Reason.COMPUTED)
    conv, groups = None, 1
    if kind != "linear":
        shape = get_tensor(graph_module, label).shape[2:]
        geometry = [arguments.get("stride", 1), arguments.get("padding", 0), arguments.get("dilation", 1)]
        groups = arguments.get("groups", 1)
        if any(isinstance(item, fx.Node) for item in _flat([*geometry, groups])):
            return Refusal(name, function, Reason.COMPUTED)
        stride, dilation = (_per_dimension(geometry[i], len(shape)) for i in (0, 2))
        padding = geometry[1] if isinstance(geometry[1], str) else _per_dimension(geometry[1], len(shape))
        conv = ConvGeometry(tuple(shape), stride, _padding(padding, tuple(shape), dilation), dilation, "zeros")
    bias_path = str(bias.target) if isinstance(bias, fx.Node) else None
    return _checked(graph_module, uses, name, kind, label, bias_path, groups, conv)


def _site_path(graph_module: fx.GraphModule, weight_path: str) -> str:
    """Where the factors of a functional site go: in place of the module that holds nothing but its weight and bias,
    else in place of the weight itself."""
    owner_path, _, name = weight_path.rpartition(".")
    if not owner_path or name != "weight":
        return weight_path
    owner = graph_module.get_submodule(owner_path)
    held = {*dict(owner.named_parameters()), *dict(owner.named_buffers())}
    return owner_path if held <= set(_WEIGHTS) else weight_path


def _checked(
    graph_module: fx.GraphModule,
    uses: Counter[int],
    name: str,
    kind: Kind,
    weight_path: str,
    bias_path: str | None,
    groups: int,
    conv: ConvGeometry | None,
) -> Site | Refusal:
    """The site, unless its tensors or its shape speak against it."""
    weight: Tensor = get_tensor(graph_module, weight_path)
    paths = [path for path in (weight_path, bias_path) if path is not None]
    if any(uses[id(get_tensor(graph_module, path))] > 1 for path in paths):
        return Refusal(name, kind, Reason.SHARED)
    if not weight.is_floating_point() or weight.dtype not in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ):
        return Refusal(name, kind, Reason.DTYPE, str(weight.dtype).removeprefix("torch."))
    outputs, inputs = weight.shape[0] // groups, math.prod(weight.shape[1:])
    site = Site(name, kind, weight_path, bias_path, groups, outputs, inputs, conv)
    if site.break_even < 1:
        reason = Reason.TOO_SMALL
        if groups > 1 and 1 in (outputs, inputs):
            reason = Reason.DEPTHWISE if outputs == 1 else Reason.SINGLE_INPUT
        return Refusal(name, kind, reason, f"O x D x groups = {site.shape}")
    return site


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(before, after) per dimension; 'same' puts the odd one after, as nn.Conv does."""
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((amount, amount) for amount in padding)


def _per_dimension(value: Any, dimensions: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * dimensions if len(values) == 1 else values


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value
