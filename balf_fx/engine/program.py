"""Programs: captured graphs that share one budget, and how a batch runs through them.

In `compile`, a program has one part, the whole model. In `torch.compile(backend="balf")`, it has one part for each
graph that Dynamo captured; a call of the model is then a *trace*, the sequence of steps that ran these parts.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from balf_fx.budget.problem import Totals
from balf_fx.calibration.batches import Forward, graphs_of
from balf_fx.calibration.calls import placeholder_values
from balf_fx.checkpoint.digests import digest_of
from balf_fx.graph.annotation import annotate, annotation, graph_record, sites
from balf_fx.graph.layers import layers_of
from balf_fx.graph.parameters import computed_tensors, count_parameters, get_tensor, put, readers
from balf_fx.graph.site import ConvGeometry, Site


class Link(NamedTuple):
    """An argument that an earlier step returned.

    Attributes:
        leaf: the index of the argument among the step's flattened arguments.
        step, output: the index of the earlier step in the trace, and of the value among its flattened outputs.
    """

    leaf: int
    step: int
    output: int


class Step(NamedTuple):
    """One run of a part.

    Attributes:
        part: the index of the part.
        args: the arguments in the original model.
        links: the arguments that earlier steps returned.
    """

    part: int
    args: tuple[Any, ...]
    links: tuple[Link, ...] = ()


Trace = tuple[Step, ...]
"""One call of a model."""


@dataclass(frozen=True)
class Part:
    """A captured graph.

    Attributes:
        graph_module: modified by the passes; the model's own tensors are unchanged.
        calls: how often one call of the model runs the part (see `per_call`).
        originals: the user's tensors by dotted path, where several parts may share weights.
        aliases: {id of alias: (alias, user's tensor)} for tensors of the graph that replace the user's. The aliases
            are kept alive so that no new tensor has the same id.
    """

    graph_module: fx.GraphModule
    calls: int = 1
    originals: Mapping[str, Tensor] | None = None
    aliases: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def original(self, tensor: Tensor) -> Tensor:
        """The user's tensor of an alias, or the tensor itself."""
        _, original = self.aliases.get(id(tensor), (tensor, tensor))
        return original


@dataclass(frozen=True)
class Program:
    """The parts that share one budget.

    Attributes:
        parts: in the order in which they first run.
        steps: function of the first graph and a batch that returns the batch's trace without running it.
    """

    parts: tuple[Part, ...]
    steps: Callable[[fx.GraphModule, Any], Trace]

    @property
    def graph_modules(self) -> list[fx.GraphModule]:
        return [part.graph_module for part in self.parts]

    @property
    def counted(self) -> list[tuple[fx.GraphModule, int]]:
        """The graphs, each with how often one call of the model runs it."""
        return [(part.graph_module, part.calls) for part in self.parts]

    @property
    def is_traced(self) -> bool:
        """Whether the parts are graphs of one model that may share weights."""
        return self.parts[0].originals is not None

    def with_graphs(self, graph_modules: Sequence[fx.GraphModule]) -> Program:
        """The same program with other graphs."""
        pairs = zip(self.parts, graph_modules, strict=True)
        return replace(self, parts=tuple(replace(part, graph_module=graph) for part, graph in pairs))

    def copy(self) -> Program:
        """A copy with separate graphs on the same tensors and observers: passes on one do not affect the other."""
        return self.with_graphs([copy_graph(graph_module) for graph_module in self.graph_modules])

    @cached_property
    def module(self) -> nn.Module:
        """The module through which `Calibration.forward` runs a batch."""
        return self.graph_modules[0] if len(self.parts) == 1 else nn.ModuleList(self.graph_modules)

    def totals(self) -> Totals:
        """The cost of one call of the whole model."""
        if not self.is_traced:
            record = graph_record(self.graph_modules[0])
            now = count_parameters(self.graph_modules[0]) + record.unused
            return Totals(record.flops or 0, record.params or now, now)
        flops = sum(part.calls * (graph_record(part.graph_module).flops or 0) for part in self.parts)
        given = {name: tensor for part in self.parts for name, tensor in (part.originals or {}).items()}
        params = sum(tensor.numel() for tensor in given.values() if isinstance(tensor, nn.Parameter))
        held = {id(own): own for part in self.parts for own in map(part.original, part.graph_module.parameters())}
        now = sum(parameter.numel() for parameter in held.values())
        return Totals(flops, params, now)

    def trace(self, batch: Any) -> Trace:
        """A batch as a trace; nothing is run."""
        return self.steps(self.graph_modules[0], batch)


def whole_program(graph_module: fx.GraphModule, forward: Forward) -> Program:
    """A whole model as one part, which batches run through as `forward` passes them on."""

    def steps(graph: fx.GraphModule, batch: Any) -> Trace:
        return (Step(0, tuple(placeholder_values(graph, batch, forward).values())),)

    return Program((Part(graph_module),), steps)


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Copy the graph and the modules that it calls; tensors and observers are shared with the original."""
    tensors = (*graph_module.parameters(), *graph_module.buffers())
    observers = [module for module in graph_module.modules() if getattr(module, "_is_impure", False)]
    kept: dict[int, Any] = {id(value): value for value in (*tensors, *observers)}
    layers = {id(module): _copied(module) for module in graph_module.modules() if _is_plain(module)}
    record = graph_record(graph_module)  # it is frozen
    return copy.deepcopy(graph_module, {**computed_tensors(graph_module), id(record): record, **layers, **kept})


def _is_plain(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.") and not module._modules


def _copied(layer: nn.Module) -> nn.Module:
    """A copy that shares its tensors; much faster than `copy.deepcopy`, which walks through a dozen empty tables."""
    copied = layer.__new__(type(layer))
    for name, value in vars(layer).items():
        copied.__dict__[name] = copy.copy(value) if isinstance(value, dict | list | set) else value
    return copied


def run_trace(program: nn.Module, trace: Trace) -> Any:
    """Run the steps of a call, each on the values that the earlier steps return now.

    Returns:
        The outputs of the steps that no other step reads: the value itself if there is one, else a list.
    """
    # Not by calling the graphs, which prints an error of theirs to stderr even where it is expected.
    return run_steps([graph.forward for graph in graphs_of(program)], trace)


def run_steps(graphs: Sequence[Callable[..., Any]], trace: Trace) -> Any:
    """The same with a function for each part."""
    returned: list[list[Any]] = []
    for step in trace:
        output = graphs[step.part](*linked(step, returned))
        returned.append(pytree.tree_leaves(output))
    read = {link.step for step in trace for link in step.links}
    final = [value for index, values in enumerate(returned) if index not in read for value in values]
    return final[0] if len(final) == 1 else final


def linked(step: Step, returned: Sequence[Sequence[Any] | None]) -> tuple[Any, ...]:
    """A step's arguments, with the outputs of earlier steps in place of the original model's values.

    Args:
        returned: the flattened outputs of each step; None where they are not known.
    """
    if not step.links:
        return step.args
    leaves, spec = pytree.tree_flatten(step.args)
    for link in step.links:
        outputs = returned[link.step]
        if outputs is not None:
            leaves[link.leaf] = outputs[link.output]
    arguments: tuple[Any, ...] = pytree.tree_unflatten(leaves, spec)
    return arguments


@dataclass(frozen=True)
class Key:
    """Identifies a site across graphs: uses of the same tensors in the same way have equal keys.

    Attributes:
        tensors: ids of weight, bias and what was folded into them.
        digest: of a computed weight, since several may be computed from the same tensors; None for the user's own.
    """

    tensors: tuple[int, ...]
    digest: str | None
    kind: str
    groups: int
    conv: ConvGeometry | None
    inputs_first: bool


def key_of(part: Part, site: Site, node: fx.Node) -> Key:
    """The key of a site of a part, given one of its nodes."""
    weight: Tensor = get_tensor(part.graph_module, site.weight)
    digest = digest_of(weight) if part.original(weight) is weight else None
    tensors = tuple(map(id, site_originals(part, site, node).values()))
    return Key(tensors, digest, site.kind, site.groups, site.conv, site.inputs_first)


def keys_of(parts: Sequence[Part]) -> dict[Key, str]:
    """The names that `join` gave to the sites of some parts."""
    return {
        key_of(part, site, nodes[0]): site.name for part in parts for site, nodes in sites(part.graph_module).items()
    }


def name_alike(part: Part, known: Mapping[Key, str]) -> None:
    """Give the sites of another graph the names that they have in a program; those that it lacks get unused names."""
    taken = set(known.values())
    for site, nodes in sites(part.graph_module).items():
        key = key_of(part, site, nodes[0])
        name = known[key] if key in known else _free(site.name, taken)
        taken.add(name)
        for node in nodes:
            annotate(node, site=replace(site, name=name))


def site_originals(part: Part, site: Site, node: fx.Node) -> dict[str, Tensor]:
    """The user's tensors that determine a layer, by name: its own, and those that were folded into it."""
    originals = part.originals or {}
    found = {name: originals.get(name) for name in (site.weight, site.bias) if name is not None}
    for source in node.all_input_nodes:
        for index, tensor in enumerate(annotation(source).computed_from):
            found[f"{site.name} (source {index} of {source.target})"] = tensor
    for index, norm in enumerate(annotation(node).folded):
        found |= {f"{site.name} ({name} {index}, folded)": tensor for name, tensor in norm.tensors.items()}
    return {name: part.original(tensor) for name, tensor in found.items() if tensor is not None}


def layer_originals(part: Part) -> dict[str, tuple[list[fx.Node], dict[str, Tensor]]]:
    """Every layer of a part by name: its nodes, and the user's tensors that determine it."""
    layers = layers_of(part.graph_module)
    return {name: (nodes, site_originals(part, site, nodes[0])) for name, (site, nodes) in layers.items()}


def join(parts: Sequence[Part]) -> set[str]:
    """Give sites that use the same weights in the same way one name, and mark the tensors that parts share.

    A weight that another part uses in another way is kept, and the factors are stored next to it.

    Returns:
        The names of the sites that several parts use.
    """
    given = _holders([(part.originals or {}).values() for part in parts])
    shared = {tensor for tensor, found in given.items() if len(found) > 1}
    # After the passes so far, which have computed copies of some:
    holders = _holders([map(part.original, part.graph_module.parameters()) for part in parts])
    uses: dict[Key, set[int]] = {}
    pieces: dict[Key, set[int]] = {}
    keys: dict[tuple[int, str], Key] = {}
    for index, part in enumerate(parts):
        for site, nodes in sites(part.graph_module).items():
            key = key_of(part, site, nodes[0])
            uses.setdefault(key, set()).add(index)
            pieces.setdefault(key, set()).add(site.parts)
            keys[index, site.name] = key
    names: dict[Key, str] = {}
    copies: dict[tuple[Key, str], Tensor] = {}
    joined: set[str] = set()
    for index, part in enumerate(parts):
        _mark_shared(part, shared)
        for site, nodes in sites(part.graph_module).items():
            key = keys[index, site.name]
            held = holders.get(id(part.original(get_tensor(part.graph_module, site.weight))), set())
            name = names.setdefault(key, _free(site.name, set(names.values())))
            if len(uses[key]) > 1:
                joined.add(name)
                _share_copies(part, site, key, copies)
            keeps = site.keeps_weight or held > uses[key]
            separate = site.parts if len(pieces[key]) == 1 else 1  # as where uses in one graph disagree (`Annotate`)
            changed = replace(site, name=name, keeps_weight=keeps, parts=separate)
            for node in nodes:
                annotate(node, site=changed)
    return joined


def count_calls(parts: Sequence[Part]) -> None:
    """Record for each site how often one call of the model runs its layer, in all parts together."""
    found: dict[str, int] = {}
    nodes = [(site.name, part.calls, own) for part in parts for site, own in sites(part.graph_module).items()]
    for name, calls, own in nodes:
        found[name] = found.get(name, 0) + calls * len(own)
    for name, _, own in nodes:
        for node in own:
            annotate(node, calls=found[name])


def _holders(tensors: Sequence[Iterable[Tensor]]) -> dict[int, set[int]]:
    """The parts that hold each tensor, by its id."""
    found: dict[int, set[int]] = {}
    for index, own in enumerate(tensors):
        for tensor in own:
            found.setdefault(id(tensor), set()).add(index)
    return found


def _share_copies(part: Part, site: Site, key: Key, copies: dict[tuple[Key, str], Tensor]) -> None:
    """Give parts that compute the same weight or bias of a layer, each its own, the copy of the first of them."""
    for role, path in (("weight", site.weight), ("bias", site.bias)):
        if path is not None:
            own: Tensor = get_tensor(part.graph_module, path)
            if part.original(own) is own:
                put(part.graph_module, path, copies.setdefault((key, role), own))


def _mark_shared(part: Part, shared: set[int]) -> None:
    """Mark the nodes that read tensors which other parts also read."""
    own = {path for path, tensor in (part.originals or {}).items() if id(tensor) in shared}
    for node in part.graph_module.graph.nodes:
        if node.op == "get_attr":
            mark = annotation(node)
            computed = any(id(part.original(tensor)) in shared for tensor in mark.computed_from)
            if computed or str(node.target) in own:
                for each in (node, *readers(node)):
                    annotate(each, shared=True)
    for node in part.graph_module.graph.nodes:
        folded = [tensor for norm in annotation(node).folded for tensor in norm.tensors.values()]
        if any(id(part.original(tensor)) in shared for tensor in folded):
            annotate(node, shared=True)


def _free(name: str, taken: set[str]) -> str:
    """A name that no other site has."""
    if name not in taken:
        return name
    return next(other for number in range(1, len(taken) + 2) if (other := f"{name}_{number}") not in taken)


def share_observers(parts: Sequence[Part], names: set[str]) -> None:
    """Use one observer for a site in all parts that use it."""
    first: dict[tuple[str, str], nn.Module] = {}
    for part in parts:
        for site, nodes in sites(part.graph_module).items():
            mark = annotation(nodes[0])
            if site.name not in names:
                continue
            for role in ("observer", "sensitivity", "influence"):
                path = getattr(mark, role)
                if path is not None:
                    observer = first.setdefault((site.name, role), part.graph_module.get_submodule(path))
                    part.graph_module.set_submodule(path, observer)


def per_call(calls: Sequence[int], codes: Sequence[Hashable]) -> tuple[list[int], int]:
    """How often one call of the model runs each part, or the fewest calls in which that is a whole number for all.

    Args:
        calls: how often each part has run in the whole calibration.
        codes: what each part runs; parts of the same code are for inputs of other shapes.

    Returns:
        The counts, and the number of calls of the model to which they belong.
    """
    totals: Counter[Hashable] = Counter()
    for code, count in zip(codes, calls, strict=True):
        totals[code] += count
    once = math.gcd(*totals.values()) or 1
    unit = math.gcd(*calls, once)
    return [count // unit for count in calls], once // unit
