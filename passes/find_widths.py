"""Find the widths: sets of features inside the model whose number may be reduced."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.budget.chains import elimination_order
from balf_fx.graph.annotation import annotation, graph_record, record_graph
from balf_fx.graph.layers import read_layer
from balf_fx.graph.site import Site
from balf_fx.graph.widths import Reader, Width
from balf_fx.passes.base import Pass
from balf_fx.widths.channels import find_channels
from balf_fx.widths.following import feature_axis_of
from balf_fx.widths.heads import find_heads
from balf_fx.widths.layouts import fits, passes
from balf_fx.widths.moves import Moves
from balf_fx.widths.orders import find_orders

_JOINED = 3  # the most widths whose sizes are compared all with all (`budget.chains`)


@dataclass(frozen=True)
class FindWidths(Pass):
    """Record the widths of an annotated and profiled graph (`widths.channels`, `widths.heads`).

    A layer may lie between two widths, like the middle one of a bottleneck, and those may form long chains. Where more
    than a few sizes would have to be compared all with all, the widths that affect the most FLOPs are taken. The other
    rows of a layer that only partly belongs to widths, such as queries and keys behind a rotary embedding, stay as they
    are; if they cannot be separated from those of its widths, it has no widths.
    Further sets of channels, such as those of a residual stream, keep their size, but may change their order. They do
    not where layers go back into the user's model, which may return them.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.require_sites(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        whole = graph_record(graph_module).modules is None
        found = [*find_channels(graph_module), *find_heads(graph_module)]
        if not whole:
            found = [_in_model(graph_module, width) for width in found if fits(graph_module, width)]
        while True:
            chosen = _most_valuable(graph_module, found)
            rests = _find_rests(graph_module, chosen)
            torn = {name for name, readers in rests.items() if readers is None}
            if not torn:
                break
            found = [width for width in found if torn.isdisjoint(width.producers)]
        taken = {name for width in chosen for name in width.producers}
        others = [width for width in find_orders(graph_module) if taken.isdisjoint(width.producers)] if whole else []
        named = tuple(_named(graph_module, [*chosen, *others]))
        record_graph(
            graph_module,
            widths=named[: len(chosen)],
            orderable=named[len(chosen) :],
            rests={name: readers for name, readers in rests.items() if readers},
        )
        return PassResult(graph_module, False)


def _in_model(graph_module: fx.GraphModule, width: Width) -> Width:
    """The width in the user's model, whose code may need all features."""
    return dataclasses.replace(width, padded=not passes(graph_module, width))


def _find_rests(graph_module: fx.GraphModule, widths: Sequence[Width]) -> dict[str, tuple[Reader, ...] | None]:
    """The readers of the rows of each layer that belong to no width; None if they cannot be separated."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    moves = Moves(graph_module)
    found: dict[str, tuple[Reader, ...] | None] = {}
    for name in dict.fromkeys(name for width in widths for name in width.producers):
        layer = read_layer(graph_module, nodes[name])
        own = [width for width in widths if name in width.producers]
        covered = [row for width in own for row in _rows_of(width, name)]
        if len(covered) > len(set(covered)) or not isinstance(layer, Site):
            found[name] = None
        elif len(covered) < layer.out_features * layer.groups:
            found[name] = _rest(moves, nodes, name, own, covered)
    return found


def _rest(
    moves: Moves, nodes: Mapping[str, fx.Node], name: str, widths: Sequence[Width], covered: Sequence[int]
) -> tuple[Reader, ...] | None:
    """The readers of a layer's other rows, which must each be read by some node, and not in two different ways."""
    layer = nodes[name]
    starts = {}
    if len(annotation(layer).shape or ()) > 2:
        starts[layer] = feature_axis_of(layer)
    known = set()
    for width in widths:
        pairs = zip(width.producers, width.operands, strict=False)
        heads = [nodes[operand.source or name] for producer, operand in pairs if producer == name]
        starts |= {node: len(annotation(node).shape or ()) - 1 for node in heads}
        starts |= {nodes[reader.source]: reader.axis for reader in width.readers}
        known |= {nodes[reader.node] for reader in width.readers}
        known |= {nodes[width.product]} if width.product is not None else set()
    found: list[Reader] = []
    for node, axis in starts.items():
        rests = moves.rests(node, axis, covered, known | set(starts))
        if rests is None:
            return None
        found += rests[0]
    rows = [row for part in dict.fromkeys(reader.rows for reader in found) for row in part]
    whole = len(covered) + len(rows) == _output_features(layer)
    return tuple(found) if whole and len(set(rows)) == len(rows) else None


def _output_features(layer: fx.Node) -> int:
    """The number of a layer's output features."""
    return (annotation(layer).shape or ())[feature_axis_of(layer)]


def _rows_of(width: Width, name: str) -> list[int]:
    """All rows of a layer that belong to a width."""
    return [row for producer, rows in zip(width.producers, width.rows, strict=True) for row in rows if producer == name]


def _named(graph_module: fx.GraphModule, found: Sequence[Width]) -> Iterator[Width]:
    """The widths with the names of their layers, and with unique names."""
    layers = {node.name: _layer_name(graph_module, node) for node in graph_module.graph.nodes}
    seen: Counter[str] = Counter()
    for width in found:
        seen[width.key] += 1
        name = width.name if seen[width.key] == 1 else f"{width.name} {seen[width.key]}"
        names = tuple(dict.fromkeys(layers[node] for node in width.layers))
        yield dataclasses.replace(width, name=name, layer_names=names)


def _layer_name(graph_module: fx.GraphModule, node: fx.Node) -> str:
    layer = annotation(node).site or read_layer(graph_module, node)
    return layer.name if isinstance(layer, Site) else node.name


def _most_valuable(graph_module: fx.GraphModule, found: Sequence[Width]) -> list[Width]:
    """Take widths in the order of the FLOPs that they affect, as long as few sizes must be compared all with all."""
    flops = {node.name: annotation(node).flops or 0 for node in graph_module.graph.nodes}
    order = sorted(range(len(found)), key=lambda i: -sum(flops[name] for name in found[i].layers))
    taken: list[int] = []
    for index in order:
        if _together([found[i] for i in (*taken, index)]) <= _JOINED:
            taken.append(index)
    return [found[index] for index in sorted(taken)]


def _together(widths: Sequence[Width]) -> int:
    """The most widths whose sizes are compared all with all."""
    sharing: dict[str, list[int]] = {}
    for index, width in enumerate(widths):
        for name in {*width.layers, width.product or ""} - {""}:
            sharing.setdefault(name, []).append(index)
    return max(1 + len(others) for _, others in elimination_order(sharing.values()))
