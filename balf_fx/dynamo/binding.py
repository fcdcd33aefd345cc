"""A graph that Dynamo captured, together with the weights with which it is called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.convert_frame import compile_lock

from balf_fx.capture.contexts import cast_explicitly, inline_contexts
from balf_fx.capture.functional import make_functional
from balf_fx.capture.models import cuda_devices
from balf_fx.capture.samples import find_samples
from balf_fx.dynamo.frames import WeightInput, lift
from balf_fx.dynamo.watch import Watch
from balf_fx.engine.program import Part, layer_originals
from balf_fx.engine.rewriting import held_tensors
from balf_fx.graph.annotation import Origin, annotation, record_graph
from balf_fx.graph.edits import drop_dead_code
from balf_fx.graph.effects import release_effects
from balf_fx.graph.flops import profile
from balf_fx.graph.parameters import get_tensor, put
from balf_fx.passes import DecomposeAttention, FoldConstants, UnifyProducts


class Binding:
    """A graph together with the weights with which it is called.

    Args:
        graph_module: as Dynamo captured it.
        inputs: the graph's inputs that take weights.
        names, weights: the dotted names of these weights, and the weights.
        frame: the code of the frame from which the graph was captured.

    Attributes:
        graph_module: holds the user's tensors, and after the switch those that replace them.
        originals: the user's tensors, by dotted name.
        code: the frame and the weights, the same for graphs for inputs of other shapes.
        calls: how often it has run in calibration.
        rewritten: whether the graph was rewritten by the plan.
        compiled: the compiled graph, which runs after the switch.
        watch: watches all parameters during calibration, and later the user's tensors that the compressed graph no
            longer reads.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        inputs: Sequence[WeightInput],
        names: Sequence[str],
        weights: Sequence[Tensor],
        frame: CodeType | None,
    ) -> None:
        held_weights = zip(inputs, names, weights, strict=True)
        self.graph_module = lift(graph_module, {given.position: (name, weight) for given, name, weight in held_weights})
        held = self.graph_module
        self.originals: dict[str, Tensor] = {**dict(held.named_parameters()), **dict(held.named_buffers())}
        self.code = frame, tuple(map(id, self.originals.values())) or graph_module.code
        self.calls = 0
        self.rewritten = False
        self.compiled: Callable[..., Any] | None = None
        self.watch = Watch({name: held for name, held in self.originals.items() if isinstance(held, nn.Parameter)})

    def part(self, calls: int, args: Sequence[Any], origin: Origin) -> Part:
        """The graph as a part: on aliases that share the user's memory, annotated with its costs on these inputs.

        Args:
            calls: how often one call of the model runs it.
            args: the arguments of one call, without the weights; they are not changed.
        """
        graph_module = fx.GraphModule(self.graph_module, copy.deepcopy(self.graph_module.graph))
        graph_module.meta.update(self.graph_module.meta)
        aliases = _part_from(graph_module)
        inline_contexts(graph_module)
        with compile_lock, torch.random.fork_rng(devices=cuda_devices(graph_module)):
            make_functional(graph_module, args)
            cast_explicitly(graph_module, args)
        DecomposeAttention(copy_weights=False)(graph_module)
        FoldConstants()(graph_module)
        drop_dead_code(graph_module)
        record_graph(graph_module, captured="dynamo", origin=origin)
        with compile_lock, torch.random.fork_rng(devices=cuda_devices(graph_module)):
            profile(graph_module, args)  # under Dynamo's lock: the counter sets the same global of torch
            if UnifyProducts()(graph_module).modified:
                profile(graph_module, args)
            find_samples(graph_module, args)
        return Part(graph_module, calls, self.originals, aliases)

    def finish(self, graph_module: fx.GraphModule, part: Part, watched: Mapping[str, Tensor]) -> None:
        """Run a rewritten graph from now on, with the user's own tensors where they were not replaced.

        Args:
            watched: the tensors on which the graph's new weights depend, but which it does not read.
        """
        held: set[int] = set()
        for name, tensor in list(held_tensors(graph_module)):
            original = part.original(tensor)
            held.add(id(original))
            if original is tensor:
                tensor.requires_grad_(False)  # compressed calls do not require gradients, so neither may the output
            put(graph_module, name, original)
        release_effects(graph_module)
        graph_module.delete_all_unused_submodules()
        graph_module.graph.lint()
        graph_module.recompile()
        # Constants between layers were narrowed or reordered too, so that the graph reads copies of them.
        copied = {
            name: tensor
            for name, tensor in self.originals.items()
            if isinstance(tensor, nn.Parameter) and id(tensor) not in held
        }
        self.graph_module, self.watch, self.rewritten = graph_module, Watch({**copied, **watched}), True


def watched_by(part: Part, replaced: set[str]) -> dict[str, Tensor]:
    """The user's tensors that a normalised graph no longer reads once some layers are replaced.

    Args:
        replaced: the names of the replaced layers.
    """
    found: dict[str, Tensor] = {}
    for name, (nodes, tensors) in layer_originals(part).items():
        made = any(annotation(node).folded or _is_computed(node) for node in nodes)
        if name in replaced or made:
            found |= tensors
    return found


def _is_computed(node: fx.Node) -> bool:
    return any(annotation(source).computed_from for source in node.all_input_nodes)


def _part_from(graph_module: fx.GraphModule) -> dict[int, tuple[Tensor, Tensor]]:
    """Replace the user's tensors in a graph by aliases that share their memory.

    Returns:
        The `Part.aliases`.
    """
    own: dict[int, Tensor] = {}
    aliases: dict[int, tuple[Tensor, Tensor]] = {}
    for path in dict.fromkeys(str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")):
        tensor = get_tensor(graph_module, path)
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) not in own:
            own[id(tensor)] = _own(tensor)
            aliases[id(own[id(tensor)])] = own[id(tensor)], tensor
        put(graph_module, path, own[id(tensor)])
    return aliases


def _own(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return tensor.clone()
    shared = tensor.clone() if tensor.is_inference() else tensor.detach()
    return nn.Parameter(shared, shared.is_floating_point())


@contextmanager
def computing() -> Iterator[None]:
    """Compute with ordinary tensors without gradients, whatever mode the model was called in."""
    with torch.inference_mode(False), torch.no_grad():
        yield
