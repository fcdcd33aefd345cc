"""Solve every layer again for the input that it gets in the compressed model.

One-shot factors assume that a layer's input is what it was. Refit walks the graph node by node, with the values of the
original and of the compressed model side by side, over all calibration batches at once; a value is freed when its last
reader has run, so that the walk costs about two forward passes. At each layer y is regressed on the compressed model's
own x' (`regression`): the error made upstream is corrected as far as x' tells of it.

Three things make the target more than y. Where the layer's output is added to another value, the target takes in that
value's error, too: so residual streams are mended at every block. Where ReLU follows, an error below zero is none: the
target is moved there to what the first solution puts out, and the layer solved again. And positions count by the
gradients that the loss has there.

How far to trust the regression is decided on a held-out quarter of each batch: the ridge that has the least error
there is taken, or the layer as it was if that is better.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from balf_fx.linalg import in_parts
from balf_fx.linear_maps import changes_in_place, parameter_users, read_layer, reads_metadata, site_input
from balf_fx.observers import SensitivityObserver, input_columns, output_columns
from balf_fx.passes.base import Pass
from balf_fx.passes.factorize import build, one_shot, run_modules
from balf_fx.passes.observe import OBSERVERS
from balf_fx.passes.score import grouped_bias, grouped_weight
from balf_fx.regression import Joint, error, joint, ridge, truncate
from balf_fx.sites import Rank, Site, Solution, Spectrum, annotate, annotation, get_tensor

aten = torch.ops.aten

_ADDITIONS = (
    operator.add,
    operator.iadd,
    torch.add,
    aten.add.Tensor,
    aten.add_.Tensor,
    "add",
    "add_",
)
_RELUS = (F.relu, torch.relu, torch.relu_, aten.relu.default, aten.relu_.default, "relu", "relu_")
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_HELD_OUT = 0.25

Values = list[dict[fx.Node, Any]]
"""What each batch's values are, by node."""


@dataclass(frozen=True)
class Refit(Pass):
    """Refit the chosen factors and the dense layers between Allocate and Factorize.

    Attributes:
        inputs: of each calibration batch, the values of the graph's placeholders by name.
    """

    inputs: Sequence[Mapping[str, Any]]

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        with torch.no_grad():
            _Walk(graph_module, self.inputs).run()
        return PassResult(graph_module, False)


class _Walk:
    """Two runs of a graph side by side."""

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Mapping[str, Any]]) -> None:
        self.graph_module = graph_module
        self.inputs = inputs
        self.interpreter = fx.Interpreter(graph_module)
        self.original: Values = [{} for _ in inputs]
        self.compressed: Values = [{} for _ in inputs]
        self.users = parameter_users(graph_module)
        self.solved: dict[Site, nn.Module] = {}
        self.last_reads = _last_reads(graph_module.graph)

    def run(self) -> None:
        for node in self.graph_module.graph.nodes:
            if node.op == "output":
                return
            if str(node.target).startswith(f"{OBSERVERS}."):
                continue
            self._evaluate(node)
            for source in self.last_reads[node]:
                for values in (*self.original, *self.compressed):
                    values.pop(source, None)

    def _evaluate(self, node: fx.Node) -> None:
        layer = read_layer(self.graph_module, node)
        mark = annotation(node)
        for index, inputs in enumerate(self.inputs):
            original, compressed = self.original[index], self.compressed[index]
            if node.op == "placeholder":
                original[node] = compressed[node] = inputs[str(node.target)]
                continue
            shared = all(original[source] is compressed[source] for source in node.all_input_nodes)
            if not shared and changes_in_place(self.graph_module, node):
                self._separate(node, original, compressed)
            original[node] = self._value(node, original)
            if layer is None or not isinstance(layer, Site):
                compressed[node] = original[node] if shared else self._value(node, compressed)
        if isinstance(layer, Site):
            self._replace(node, mark.site or layer)

    def _separate(self, node: fx.Node, original: dict[fx.Node, Any], compressed: dict[fx.Node, Any]) -> None:
        """Let neither run change the other's values."""
        for source in node.all_input_nodes:
            if original[source] is compressed[source] and isinstance(original[source], Tensor):
                compressed[source] = original[source].clone()

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args = map_arg(node.args, lambda source: values[source])
        kwargs = map_arg(node.kwargs, lambda source: values[source])
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)

    def _replace(self, node: fx.Node, site: Site) -> None:
        """Solve a layer, and run what takes its place on the compressed model's values."""
        source = site_input(node)
        moved = any(a[source] is not b[source] for a, b in zip(self.original, self.compressed, strict=True))
        chosen = annotation(node).choice
        rank = None if chosen is None else chosen.chosen.rank
        if not moved and rank is None:
            for original, compressed in zip(self.original, self.compressed, strict=True):
                compressed[node] = original[node]
            return
        if site not in self.solved:
            self.solved[site] = build(self.graph_module, site, self._solve(node, site, moved))
        module = self.solved[site]
        for compressed in self.compressed:
            compressed[node] = run_modules(module, compressed[source])

    def _solve(self, node: fx.Node, site: Site, moved: bool) -> tuple[Solution, ...]:
        """The layer's solution for its new input; the one-shot solution where there is no better one."""
        mark = annotation(node)
        rank = None if mark.choice is None else mark.choice.chosen.rank
        if mark.curve is None or mark.site is None:
            weight = grouped_weight(self.graph_module, site)
            prior: tuple[Solution, ...] = (Solution(None, weight, grouped_bias(self.graph_module, site)),)
        else:
            prior = one_shot(self.graph_module, site, mark.curve, rank)
        if not moved or not self._refittable(node, site, rank):
            return prior
        spectra: list[Spectrum | None] = [None]
        if mark.curve is not None:
            parts = mark.curve.parts if isinstance(rank, tuple) else None
            spectra = [mark.curve.spectrum] if parts is None else [parts.only(i) for i in range(site.parts)]
        solution = self._best(node, site, prior, spectra, None)
        if _relu_follows(self.graph_module, node):
            solution = self._best(node, site, prior, spectra, build(self.graph_module, site, solution))
        annotate(node, refit=solution)
        return solution

    def _refittable(self, node: fx.Node, site: Site, rank: Rank) -> bool:
        """Whether the regression can be written down, and nothing else needs the weight that it changes."""
        owned = all(
            self.users[id(get_tensor(self.graph_module, path))] == {node}
            for path in (site.weight, site.bias)
            if path is not None
        )
        transposed = site.conv is not None and site.conv.output_padding is not None
        return owned and not transposed and not (rank is None and site.keeps_weight)

    def _best(
        self,
        node: fx.Node,
        site: Site,
        prior: Sequence[Solution],
        spectra: Sequence[Spectrum | None],
        current: nn.Module | None,
    ) -> tuple[Solution, ...]:
        """The solution of least error on what was held out."""
        train, held_out = self._sums(node, site, len(prior), current)
        weight = in_parts(grouped_weight(self.graph_module, site), len(prior))
        if not held_out.count:  # batches of one or two samples leave none
            return _solutions(train, weight, prior, spectra, 1.0)
        options = [_solutions(train, weight, prior, spectra, strength) for strength in _STRENGTHS]
        errors = [_total_error(held_out, option, spectra) for option in (prior, *options)]
        best = min(range(len(errors)), key=errors.__getitem__)
        if best == 0:
            return tuple(prior)
        return _solutions(train + held_out, weight, prior, spectra, _STRENGTHS[best - 1])

    def _sums(self, node: fx.Node, site: Site, parts: int, current: nn.Module | None) -> tuple[Joint, Joint]:
        """What the regression needs to know of the training share and of the held-out share of all batches."""
        found: list[list[Joint]] = [[], []]
        source, addition = site_input(node), _addition(node)
        for original, compressed in zip(self.original, self.compressed, strict=True):
            target = original[node]
            other = None if addition is None else compressed.get(addition)
            other = other if isinstance(other, Tensor) and other.shape == target.shape else None
            target = target if other is None or addition is None else target + original[addition]
            if current is not None:
                predicted = run_modules(current, compressed[source])
                predicted = predicted if other is None else predicted + other
                target = torch.where(target > 0, target, predicted.clamp_max(0))
            target = target if other is None else target - other
            x, y = input_columns(compressed[source], site), output_columns(target, site)
            if parts > 1:
                y = y.reshape(parts, -1, y.shape[-1])
            samples = max(target.shape[0] if target.dim() > 1 else 1, 1)
            weights = self._weights(node, samples, y.shape[-1])
            cut = round(samples * (1 - _HELD_OUT)) * (y.shape[-1] // samples)
            for share, span in zip(found, (slice(0, cut), slice(cut, None)), strict=True):
                own = None if weights is None else weights[span]
                share.append(joint(x[..., span], y[..., span], own))
        train, held_out = (functools.reduce(operator.add, share) for share in found)
        return train, held_out

    def _weights(self, node: fx.Node, samples: int, positions: int) -> Tensor | None:
        """What each position counts, 1 on average."""
        path = annotation(node).sensitivity
        observer = None if path is None else self.graph_module.get_submodule(path)
        if not isinstance(observer, SensitivityObserver) or observer.positions is None:
            return None
        own = observer.positions
        if len(own) * samples != positions:
            return None
        return (own / own.mean().clamp_min(torch.finfo(own.dtype).tiny)).repeat(samples)


def _solutions(
    seen: Joint, weight: Tensor, prior: Sequence[Solution], spectra: Sequence[Spectrum | None], strength: float
) -> tuple[Solution, ...]:
    """The regression at one strength of the ridge, part by part."""
    full, covariance = ridge(seen, weight, strength)
    groups = len(full) // len(prior)
    found = []
    for index, (part, spectrum) in enumerate(zip(prior, spectra, strict=True)):
        own = slice(index * groups, (index + 1) * groups)
        mean_x = seen.mean_x if len(seen.mean_x) == 1 else seen.mean_x[own]
        if part.left is None or spectrum is None:
            left, right = None, full[own]
        else:
            left, right = truncate(full[own], covariance, spectrum, part.left.shape[-1])
        fitted = right if left is None else left @ right
        bias = seen.mean_y[own] - (fitted @ mean_x.unsqueeze(-1)).squeeze(-1)
        found.append(Solution(left, right, bias))
    return tuple(found)


def _total_error(held_out: Joint, solution: Sequence[Solution], spectra: Sequence[Spectrum | None]) -> float:
    groups = len(held_out.y) // len(solution)
    total = 0.0
    for index, (part, spectrum) in enumerate(zip(solution, spectra, strict=True)):
        own = slice(index * groups, (index + 1) * groups)
        right = None if spectrum is None else spectrum.maps(spectrum.energies.shape[-1])[1]
        bias = torch.zeros_like(held_out.y[own]) if part.bias is None else part.bias
        total += error(held_out.only(own), _map(part), bias, right)
    return total


def _map(part: Solution) -> Tensor:
    return part.right if part.left is None else part.left @ part.right


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a node's values, observers apart."""
    observed = f"{OBSERVERS}."
    return [user for user in node.users if not reads_metadata(user) and not str(user.target).startswith(observed)]


def _addition(node: fx.Node) -> fx.Node | None:
    """The value to which the node's output is added, where that is all that becomes of it."""
    readers = _readers(node)
    if len(readers) != 1 or readers[0].target not in _ADDITIONS or readers[0].kwargs:
        return None
    others = [source for source in readers[0].all_input_nodes if source is not node]
    return others[0] if len(others) == 1 and len(readers[0].args) == 2 else None


def _relu_follows(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ReLU is all that reads the output, or its sum with another value."""
    readers = _readers(node)
    if _addition(node) is not None:
        readers = _readers(readers[0])
    return bool(readers) and all(_is_relu(graph_module, reader) for reader in readers)


def _is_relu(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))) is nn.ReLU
    return node.target in _RELUS


def _last_reads(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The nodes whose values nobody reads after a node, by that node."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for source, node in last.items():
        found[node].append(source)
    return found
