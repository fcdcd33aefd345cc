"""Find the clusters of a graph: what the sizes of its widths have an effect on, and how much."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from torch import fx, nn

from balf_fx.budget.clusters import Cluster
from balf_fx.budget.members import Member, Share
from balf_fx.graph.annotation import annotation, graph_record
from balf_fx.graph.curves import Cost
from balf_fx.graph.flops import flops_and_outputs
from balf_fx.graph.layers import read_layer
from balf_fx.graph.parameters import get_tensor
from balf_fx.graph.site import Site
from balf_fx.graph.widths import Width, WidthCurve, joint_widths
from balf_fx.ranks.costs import rank_params
from balf_fx.widths.heads import is_attention, requires_equal_heads
from balf_fx.widths.joined import restricted


def find_clusters(graph_module: fx.GraphModule, calls: int = 1) -> list[Cluster]:
    """The clusters of a graph whose widths have been scored, with costs for this number of calls."""
    record = graph_record(graph_module)
    pairs = zip(record.widths, record.width_curves, strict=False)
    known = [(width, curve) for width, curve in pairs if curve is not None]
    nodes = {node.name: node for node in graph_module.graph.nodes}
    groups = joint_widths([width for width, _ in known])
    found = [
        _Builder(graph_module, nodes, [known[i][0] for i in group], [known[i][1] for i in group]).build()
        for group in groups
    ]
    return found if calls == 1 else [cluster.repeated(calls) for cluster in found]


class _Builder:
    """Collects the members and the shares of one cluster.

    Attributes:
        parts: the number of each part of a width, as in `Cluster.parts`.
        written: the shares of features and the rows that each layer outputs, by its name.
        read: the share of features that each layer reads.
        along: the share of features that the groups of each site process.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        nodes: Mapping[str, fx.Node],
        widths: Sequence[Width],
        curves: Sequence[WidthCurve],
    ) -> None:
        self.graph_module, self.nodes, self.widths, self.curves = graph_module, nodes, widths, curves
        self.parts: dict[tuple[int, tuple[int, ...]], int] = {}
        self.written: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.read: dict[str, int] = {}
        self.along: dict[str, int] = {}
        self.shares: list[Share] = []

    def build(self) -> Cluster:
        """The cluster of the widths."""
        for index, width in enumerate(self.widths):
            for name, rows in zip(width.producers, width.rows, strict=True):
                self.written[name].append((self._share(index, width.held_by(name)), len(set(rows))))
            self.read |= {name: self._share(index, width.read_by(name)) for name in width.consumers}
            self.shares += self._along(index)
        self.shares += self._products()
        names = dict.fromkeys((*self.written, *self.read, *self.along))
        members = [member for name in names for member in self._members(name)]
        return Cluster(tuple(self.widths), tuple(self.curves), tuple(members), tuple(self.shares), tuple(self.parts))

    def _share(self, index: int, held: tuple[int, ...] | None) -> int:
        """The number of the share of some of a width's features that is kept; of all for None."""
        order = self.curves[index].order
        if held is None or order is None:
            return index
        counts = restricted(order, range(self.widths[index].features + 1), held)[1]
        return self.parts.setdefault((index, tuple(counts)), len(self.widths) + len(self.parts))

    def _along(self, index: int) -> Iterator[Share]:
        """What becomes cheaper along a width's features."""
        width = self.widths[index]
        for name in width.between:
            node, kept = self.nodes[name], self._share(index, width.held_by(name))
            if annotation(node).site is not None:
                self.along[name] = kept
                continue
            share = _between(self.graph_module, node, kept, width.padded)
            if share is not None:
                yield share
        if graph_record(self.graph_module).nanoseconds is not None:
            yield Share(Cost(latency=_passing(width, self.nodes)), ((index, 1.0),))

    def _products(self) -> Iterator[Share]:
        """The products of heads."""
        products: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for index, width in enumerate(self.widths):
            if width.product is not None and not width.padded:
                products[width.product].append((index, 0.5 if is_attention(self.nodes[width.product]) else 1.0))
        for name, shares in products.items():
            yield Share(_cost(self.nodes[name]), tuple(shares), requires_equal_heads(self.nodes[name]))

    def _members(self, name: str) -> Iterator[Member]:
        """The member of a site; for a layer that factors would not make cheaper, only a share."""
        node, outputs = self.nodes[name], tuple(self.written.get(name, ()))
        site = annotation(node).site
        if site is None:
            layer = read_layer(self.graph_module, node)
            if not isinstance(layer, Site):
                raise TypeError(f"{name} is not a layer")
            shrinks = tuple((index, rows / layer.out_features) for index, rows in outputs)
            self.shares.append(Share(_cost(node, rank_params(layer, None, False)), shrinks))
            return
        pairs = list(zip(self.widths, self.curves, strict=True))
        hosts = graph_record(self.graph_module).hosts
        heads = tuple((index, width.heads) for index, width in enumerate(self.widths) if hosts.get(width.key) == name)
        mixed = any(name in width.producers for width in self.widths if width.product is not None)
        bias = site.bias is not None or any(name in width.consumers and curve.means for width, curve in pairs)
        reads, along = self.read.get(name), self.along.get(name)
        yield Member(site, *flops_and_outputs([node]), outputs, reads, mixed, bias, heads, along)


def _between(graph_module: fx.GraphModule, node: fx.Node, index: int, padded: bool) -> Share | None:
    """What becomes cheaper beside the layers.

    It is None for entries that stay, since the model's code has all features, and for nodes without entries.
    """
    layer = read_layer(graph_module, node)
    if isinstance(layer, Site):
        return Share(_cost(node, rank_params(layer, None, False)), ((index, 1.0),))
    if node.op not in ("get_attr", "call_module"):
        return None
    held = get_tensor(graph_module, str(node.target))
    tensors = held.parameters() if isinstance(held, nn.Module) else [held] if isinstance(held, nn.Parameter) else []
    return None if padded else Share(_cost(node, sum(tensor.numel() for tensor in tensors)), ((index, 1.0),))


def _passing(width: Width, nodes: Mapping[str, fx.Node]) -> int:
    """The nanoseconds of the operations without parameters that a width's features pass on their way."""
    ends = {*width.consumers, width.product}
    counted = {*width.layers, *width.between, width.product}
    ahead = _reached([nodes[name] for name in width.producers], ends, lambda node: node.users)
    behind = _reached([nodes[name] for name in ends if name is not None], set(width.producers), _sources)
    passed = (node for node in ahead & behind if node.name not in counted and annotation(node).site is None)
    return sum(annotation(node).nanoseconds or 0 for node in passed)


def _sources(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def _reached(
    starts: Iterable[fx.Node], ends: Collection[str | None], following: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    """The nodes that are reached from some, but not through `ends`."""
    found: set[fx.Node] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node.name in ends else following(node)
    return found


def _cost(node: fx.Node, params: int = 0) -> Cost:
    """The cost of a node at full size."""
    mark = annotation(node)
    return Cost(mark.flops or 0, params, mark.nanoseconds or 0)
