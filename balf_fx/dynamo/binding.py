"""A graph that Dynamo captured, with the weights that it is called with, and what its calls have shown."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.convert_frame import compile_lock
from torch.utils import _pytree as pytree

from balf_fx.calibration.gradients import observe_gradients
from balf_fx.calibration.moments import Moments
from balf_fx.calibration.observers import OBSERVERS, CovarianceObserver, Sample, SensitivityObserver, observer_of
from balf_fx.capture.models import cuda_devices
from balf_fx.dynamo.frames import WeightInput, lift
from balf_fx.dynamo.watch import Watch
from balf_fx.errors import CalibrationError
from balf_fx.graph.annotation import annotation, sites
from balf_fx.graph.flops import profile
from balf_fx.graph.site import ConvGeometry, Refusal, Site
from balf_fx.passes import DecomposeAttention, FoldBatchNorm, FoldConstants
from balf_fx.passes.observe import remove_observers

_LOGGER = logging.getLogger("balf_fx.backend")


_NORM_TENSORS = ("mean", "variance", "weight", "bias")


@dataclass(frozen=True)
class Key:
    """What makes two uses of a weight, in whatever graphs, one site: the same tensors, used in the same way.

    Attributes:
        tensors: ids of weight, bias and the BatchNorms folded into them.
    """

    tensors: tuple[int, ...]
    kind: str
    groups: int
    conv: ConvGeometry | None
    inputs_first: bool


@dataclass(frozen=True)
class Seen:
    """What calls have shown of a site.

    Attributes:
        moments: on the site's side.
        sample, halves: what the gradients told, None and nothing where there were none.
    """

    moments: Moments
    sample: Sample | None = None
    halves: tuple[Sample, ...] = ()

    def merge(self, other: Seen) -> Seen:
        """Both together."""
        samples = [seen.sample for seen in (self, other) if seen.sample is not None]
        sample = samples[0].merge(samples[1]) if len(samples) == 2 else next(iter(samples), None)
        halves = self.halves or other.halves
        if self.halves and other.halves:
            halves = tuple(a.merge(b) for a, b in zip(self.halves, other.halves, strict=True))
        return Seen(self.moments.merge(other.moments), sample, halves)


@dataclass(frozen=True)
class Use:
    """A site in one graph, or in all of them together, with what its calls have shown.

    Attributes:
        graph_module, nodes: of the one graph, or of the first.
        originals: the user's tensors that factors will stand for, by name.
        seen: None where nothing was observed.
        flops, elements: of all calibration calls together.
    """

    key: Key
    site: Site
    graph_module: fx.GraphModule
    nodes: tuple[fx.Node, ...]
    originals: Mapping[str, Tensor]
    seen: Seen | None
    flops: int
    elements: int

    def merge(self, other: Use) -> Use:
        """Both uses of the same weight together."""
        seen = [use.seen for use in (self, other) if use.seen is not None]
        keeps_weight = self.site.keeps_weight or other.site.keeps_weight
        return replace(
            self,
            site=replace(self.site, keeps_weight=keeps_weight),
            seen=seen[0].merge(seen[1]) if len(seen) == 2 else next(iter(seen), None),
            flops=self.flops + other.flops,
            elements=self.elements + other.elements,
        )


class GradientGraph:
    """A copy of a graph with BatchNorm folded, to be run again with gradients.

    Its parameters share the user's memory and its buffers are copies: whatever it does, it changes nothing.

    Args:
        prepare: puts observers into the copy.
    """

    def __init__(self, graph_module: fx.GraphModule, prepare: Callable[[fx.GraphModule], None]) -> None:
        self.graph_module = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
        self.graph_module.meta.update(graph_module.meta)
        _part_from(self.graph_module)
        prepare(self.graph_module)
        self.graph_module.recompile()
        self._differentiable = True

    def observe(self, inputs: Sequence[Any], index: int, generator: torch.Generator) -> None:
        """Run it on inputs of its own; a graph that knows no gradients is run without."""
        with torch.random.fork_rng(devices=cuda_devices(self.graph_module)):
            if self._differentiable:
                try:
                    observe_gradients(self.graph_module, tuple(inputs), _single_output, index, generator)
                    return
                except (CalibrationError, RuntimeError, NotImplementedError) as error:
                    _LOGGER.warning("no gradients, so that factors minimise the plain output error: %s", error)
                    self._differentiable = False
            self.graph_module(*inputs)

    def seen(self) -> Iterator[tuple[str, Seen]]:
        """What was seen at each site, by the name of its weight."""
        for site, moments, node in _observed(self.graph_module):
            observer = observer_of(self.graph_module, annotation(node).sensitivity, SensitivityObserver)
            if observer is not None and observer.sample is not None:
                halves = tuple(half for half in observer.halves if half is not None)
                yield site.weight, Seen(moments, observer.sample, halves if len(halves) == 2 else ())
            else:
                yield site.weight, Seen(moments)


def _part_from(graph_module: fx.GraphModule) -> None:
    """Give a graph that fetches the user's tensors parameters and buffers of its own."""
    own: dict[int, Tensor] = {}
    for path in {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}:
        owner_path, _, name = path.rpartition(".")
        owner = graph_module.get_submodule(owner_path)
        tensor = getattr(owner, name)
        if isinstance(tensor, nn.Parameter):
            shared = tensor.clone() if tensor.is_inference() else tensor.detach()
            setattr(owner, name, own.setdefault(id(tensor), nn.Parameter(shared, shared.is_floating_point())))
        elif isinstance(tensor, Tensor):
            setattr(owner, name, own.setdefault(id(tensor), tensor.clone()))


def _single_output(graph_module: nn.Module, inputs: Any) -> Any:
    """Call a graph from Dynamo, which returns a tuple."""
    outputs = graph_module(*inputs)
    return outputs[0] if len(outputs) == 1 else outputs


def _observed(graph_module: fx.GraphModule) -> Iterator[tuple[Site, Moments, fx.Node]]:
    """The sites that something has been seen of."""
    for site, nodes in sites(graph_module).items():
        observer = observer_of(graph_module, annotation(nodes[0]).observer, CovarianceObserver)
        if observer is not None and observer.moments is not None:
            yield site, observer.moments, nodes[0]


class Binding:
    """A graph together with the weights that it is called with.

    Args:
        inputs: which inputs of the graph take weights.
        names, weights: these weights.
        gradients: puts the observers of a `GradientGraph` into a graph; None for no gradients.

    Attributes:
        graph_module: holds the weights; with observers during calibration, with factors after the switch.
        originals: the user's tensors, by dotted name.
        calls: how often it has run in calibration.
        rewritten: whether factors have been put into the graph.
        compiled: what runs in its place then.
        watch: over all parameters during calibration, later over what factors stand for.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        inputs: Sequence[WeightInput],
        names: Sequence[str],
        weights: Sequence[Tensor],
        gradients: Callable[[fx.GraphModule], None] | None = None,
    ) -> None:
        held_weights = zip(inputs, names, weights, strict=True)
        self.graph_module = lift(graph_module, {given.position: (name, weight) for given, name, weight in held_weights})
        DecomposeAttention(copy_weights=False)(self.graph_module)
        held = self.graph_module
        self.originals: dict[str, Tensor] = {**dict(held.named_parameters()), **dict(held.named_buffers())}
        FoldConstants()(self.graph_module)
        self.calls = 0
        self.rewritten = False
        self.compiled: Callable[..., Any] | None = None
        self.watch = Watch({name: held for name, held in self.originals.items() if isinstance(held, nn.Parameter)})
        self._seen: dict[str, Seen] | None = None
        self._prepare_gradients = gradients
        self._gradient_graph: GradientGraph | None = None

    def observe(self, inputs: Sequence[Any], generator: torch.Generator) -> Any:
        """Run the graph as it is, and take note."""
        if self._prepare_gradients is None:
            return self._run(inputs)
        with computing():  # before the graph may write to its inputs
            kept = [pytree.tree_map_only(Tensor, torch.clone, value) for value in inputs]
        output = self._run(inputs)
        with computing():
            if self._gradient_graph is None:
                self._gradient_graph = GradientGraph(self.graph_module, self._prepare_gradients)
            self._gradient_graph.observe(kept, self.calls - 1, generator)
        return output

    def _run(self, inputs: Sequence[Any]) -> Any:
        if self.calls:
            output = self.graph_module(*inputs)
        else:
            with compile_lock:  # torch notes in a global that a counter is at work, as it does when Dynamo compiles
                output = profile(self.graph_module, inputs)
        self.calls += 1
        return output

    def settle(self, fold_batchnorm: bool) -> None:
        """End calibration: take the observers out, and fold BatchNorm."""
        if self._seen is not None:
            return
        if self._gradient_graph is not None:
            self._seen = dict(self._gradient_graph.seen())
        else:
            self._seen = {site.weight: Seen(moments) for site, moments, _ in _observed(self.graph_module)}
        if hasattr(self.graph_module, OBSERVERS):
            remove_observers(self.graph_module)
        if fold_batchnorm:
            FoldBatchNorm()(self.graph_module)
        self.graph_module.recompile()

    def finish(self, watch: Watch) -> None:
        """Take in that factors stand in the graph now, for what the watch is over."""
        self.graph_module.delete_all_unused_submodules()
        self.graph_module.graph.lint()
        self.graph_module.recompile()
        self.watch, self.rewritten, self._seen, self._gradient_graph = watch, True, {}, None

    @property
    def flops(self) -> int:
        """Of one call, on the arguments of the first."""
        return sum(annotation(node).flops or 0 for node in self.graph_module.graph.nodes)

    @property
    def refusals(self) -> list[tuple[Refusal, int]]:
        """What is no site, with the FLOPs of one call."""
        marks = [annotation(node) for node in self.graph_module.graph.nodes]
        return [(mark.refusal, mark.flops or 0) for mark in marks if mark.refusal is not None]

    def uses(self) -> list[Use]:
        """The graph's sites, with what was observed of them."""
        return [self._use(site, nodes) for site, nodes in sites(self.graph_module).items()]

    def _use(self, site: Site, nodes: list[fx.Node]) -> Use:
        seen = (self._seen or {}).get(site.weight)
        tensors = {name: self.originals.get(name) for name in (site.weight, site.bias) if name is not None}
        for source in nodes[0].all_input_nodes:
            computed = enumerate(annotation(source).computed_from)
            tensors |= {f"{site.name} (source {index} of {source.target})": tensor for index, tensor in computed}
        for norm in annotation(nodes[0]).folded:
            tensors |= {f"{site.name} (BatchNorm {field})": getattr(norm, field) for field in _NORM_TENSORS}
            if seen is not None and self._gradient_graph is None and site.side == "output":
                scale, shift = (value.reshape(site.groups, -1) for value in norm.affine(torch.float64))
                seen = Seen(seen.moments.affine(scale, shift))
        marks = [annotation(node) for node in nodes]
        return Use(
            key=Key(tuple(map(id, tensors.values())), site.kind, site.groups, site.conv, site.inputs_first),
            site=site,
            graph_module=self.graph_module,
            nodes=tuple(nodes),
            originals={name: tensor for name, tensor in tensors.items() if tensor is not None},
            seen=seen,
            flops=self.calls * sum(mark.flops or 0 for mark in marks),
            elements=self.calls * sum(math.prod(mark.shape or (0,)) for mark in marks),
        )


@contextmanager
def computing() -> Iterator[None]:
    """Ordinary tensors, whatever mode the model was called in."""
    with torch.inference_mode(False), torch.no_grad():
        yield
