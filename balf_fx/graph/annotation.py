"""The records that passes store on a graph, and the typed access to `node.meta`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from balf_fx.graph.allocation import Allocation, Choice
from balf_fx.graph.curves import Form, Rank, RankCurve, Solution
from balf_fx.graph.fingerprint import Fingerprint
from balf_fx.graph.norms import Foldable
from balf_fx.graph.site import Refusal, Site
from balf_fx.graph.widths import Reader, Width, WidthCurve

META_KEY = "balf"
"""The only key that balf_fx writes, in `node.meta` (an `Annotation`) and in `GraphModule.meta` (a `GraphRecord`)."""


VALUE_META = ("val", "example_value", "tensor_meta")
"""Keys of `node.meta` that describe the node's value: a node that returns another value must not inherit them."""


@dataclass(frozen=True)
class Pivots:
    """How the map of a site is written with its own rows or columns.

    Attributes:
        orders: for each part [G, O], the order of its rows, pivots first, or [1, D], that of its columns; None for a
            dense part, and where the graph has the features in this order. For blocks, that of the columns.
    """

    form: Form
    orders: tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Annotation:
    """The record of one node, filled in by the passes in turn.

    Attributes:
        flops: FLOPs counted on the example batch (`graph.flops.profile`).
        shape: the shape of the node's output on the example batch.
        samples: the dimension of the samples in the output of a linear layer (`capture.samples`).
        number: the node's output on the example batch if it is a whole number, for example a size.
        loads: the number of rows of each expert on the example batch, where they are assigned to experts.
        argument: the name of the model's argument that an input takes, where the input's own name does not tell it.
        discarded: whether the model's own code reads the node for results that it discards, which no graph computes.
        computed_from: the tensors from which a parameter was computed; set by FoldConstants on the node that reads it.
        overwrites: the operation and the target of the call in the user's model, where it changed its first argument
            in place; set by capture.
        folded: the BatchNorms and scales that were folded into the node, in their order; set by FoldBatchNorm and
            FoldLayerScale.
        shared: whether another graph of the program reads the node's weights too. Their shapes and values do not
            change then, unless both graphs replace them by the same factors.
        site, refusal: set by Annotate; at most one of them.
        calls: how often one call of the model runs the site's layer; set by Annotate, 0 for other layers.
        observer: path of the observer of the site's statistics; set by InsertObservers.
        strips: path of the observer of the strips that the layer reads, if its kernel may be divided.
        sensitivity: path of the observer of its gradients, if there is one.
        influence: path of the observer of its weight's gradients, if there is one.
        curve, scored_with: set by Score; scored_with identifies the statistics and options of the score.
        others: the site and its curve in each other form that a convolution may have (`ranks.divided`), where Time
            chooses among them; set by Score.
        fingerprint: of the layer's weight and bias; set by Score.
        nanoseconds: the time of the node alone; set by Time.
        choice: set by Allocate.
        refit: set by Refine or Refit; replaces the one-shot factors or the weight of a dense layer.
        pivots: set by Pivot where the site's map is written with its own rows or columns.
    """

    flops: int | None = None
    shape: tuple[int, ...] | None = None
    samples: int = 0
    number: int | None = None
    loads: tuple[int, ...] = ()
    argument: str | None = None
    discarded: bool = False
    computed_from: tuple[torch.Tensor, ...] = ()
    overwrites: tuple[str, Any] | None = None
    folded: tuple[Foldable, ...] = ()
    shared: bool = False
    site: Site | None = None
    refusal: Refusal | None = None
    calls: int = 0
    observer: str | None = None
    strips: str | None = None
    sensitivity: str | None = None
    influence: str | None = None
    curve: RankCurve | None = None
    scored_with: tuple[Any, ...] | None = None
    others: tuple[tuple[Site, RankCurve], ...] = ()
    fingerprint: Fingerprint | None = None
    nanoseconds: int | None = None
    choice: Choice | None = None
    refit: tuple[Solution, ...] | None = None
    pivots: Pivots | None = None

    @property
    def keeps_weights(self) -> bool:
        """Whether the node's layer keeps its weights bit for bit, and only runs on the compressed model's values."""
        return self.refusal is not None and self.refusal.keeps_weights


@dataclass(frozen=True)
class Origin:
    """How a graph was captured and normalised, so that this can be repeated.

    Attributes:
        arguments: descriptions of the example call's arguments by `capture.arguments.describe`, as
            {"positional": ..., "keywords": ...}; None if one of them cannot be described.
        fold_batchnorm, include, exclude, dense: as in `balf_fx.compile`.
    """

    arguments: Mapping[str, Any] | None = None
    fold_batchnorm: bool = True
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()


@dataclass(frozen=True)
class Replaced:
    """A layer that was replaced.

    Attributes:
        name: dotted path, before and after.
        rank: the rank of its factors; None for a single layer that was refitted or narrowed.
        biased: whether it has a bias, for each part; one item for a layer without parts.
        fingerprint: the fingerprint of the original layer.
        kept: the experts that keep their matrices.
        form: how its map is written, if it has a rank.
        ordered: whether its rows or columns are brought into order by a gather.
        apart: paths, within it, of the layers whose biases are added in operations of their own; set by SplitBias.
    """

    name: str
    rank: Rank
    biased: tuple[bool, ...]
    fingerprint: Fingerprint
    kept: tuple[int, ...] = ()
    form: Form = "pair"
    ordered: bool = False
    apart: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The place of a layer and of its features in the user's model.

    Attributes:
        path: the path of its module.
        inputs, outputs: the number of features that the model has before and behind it.
        reads: [D], where the model has the features that the layer reads now; None for all of them, in their order.
        writes: [O], where the model expects the features that the layer outputs now; None likewise.
        axis: the axis of the features, counted from the end.
    """

    path: str
    inputs: int
    outputs: int
    reads: torch.Tensor | None
    writes: torch.Tensor | None
    axis: int


@dataclass(frozen=True)
class GraphRecord:
    """The record of a whole graph.

    Attributes:
        flops, params: the cost of the user's model, before any pass; None if not counted.
        captured: how the graph was captured: "symbolic_trace", "export" or "dynamo".
        origin: set by `prepare`.
        allocation, refusals: set by Allocate, for the report.
        params_after: parameters of the compressed graph; set by Allocate.
        nanoseconds: the time of one call; set by Time.
        widths: set by FindWidths.
        rests: for each layer that only partly belongs to widths, the readers of its other rows; set by FindWidths.
        width_curves: one for each width, None if there are no statistics; set by ScoreWidths.
        widths_scored_with: identifies the statistics and options of the curves; set by ScoreWidths.
        orderable: further widths whose features may change their order, but not their number; set by FindWidths.
        orders: the kept features of widths in their new order, by `Width.key`; set by Pivot.
        hosts: the node in which heads of a width may get identity blocks, by `Width.key`; set by FindPivots.
        bases: C [heads, r, r] for widths whose heads get a new basis, by `Width.key`; set by Pivot (`ranks.bases`).
        modules: the stock modules of the user's model by path (`graph.owners`), where layers go back into a copy of it;
            None where the result is a graph.
        parameters: the paths of the parameters that this model holds under one name.
        unused: the number of parameters of such a model that its graph does not have.
        folded: the path of each BatchNorm that was folded into a layer, with the layer's; set by FoldBatchNorm.
        layouts: the places of the layers and their features in the user's model (`widths.layouts`), by `Site.name`.
        constants: the paths of parameters, other than those of layers, that change in the user's model, too: along
            features that become fewer, or by ScaleLogits.
        replaced: set by Factorize, and by ScaleLogits where graphs share layers.
    """

    flops: int | None = None
    params: int | None = None
    params_after: int | None = None
    nanoseconds: int | None = None
    captured: str = "elsewhere"
    origin: Origin = Origin()
    allocation: Allocation | None = None
    refusals: tuple[tuple[Refusal, int | None], ...] = ()
    widths: tuple[Width, ...] = ()
    rests: Mapping[str, tuple[Reader, ...]] = field(default_factory=dict)
    width_curves: tuple[WidthCurve | None, ...] = ()
    widths_scored_with: tuple[Any, ...] = ()
    orderable: tuple[Width, ...] = ()
    orders: Mapping[str, torch.Tensor] = field(default_factory=dict)
    hosts: Mapping[str, str] = field(default_factory=dict)
    bases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    modules: Mapping[str, str] | None = None
    parameters: frozenset[str] = frozenset()
    unused: int = 0
    folded: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    replaced: tuple[Replaced, ...] = ()

    @property
    def all_widths(self) -> tuple[Width, ...]:
        """The widths whose features may become fewer, and those whose features may only change their order."""
        return (*self.widths, *self.orderable)

    def size_of(self, width: Width) -> int:
        """The features of a width that the allocation keeps."""
        return width.features if self.allocation is None else self.allocation.size_of(width)

    def hosted(self, name: str) -> list[Width]:
        """The widths whose heads may get identity blocks in a node."""
        return [width for width in self.widths if self.hosts.get(width.key) == name]


def annotation(node: fx.Node) -> Annotation:
    """The node's annotation; an empty one if no pass has set it."""
    found = node.meta.get(META_KEY)
    return found if isinstance(found, Annotation) else Annotation()


def annotate(node: fx.Node, **changes: Any) -> None:
    """Replace fields of the node's annotation. Records are frozen, so copies of a graph may share them."""
    node.meta[META_KEY] = dataclasses.replace(annotation(node), **changes)


def carried_meta(node: fx.Node, same_value: bool = False) -> dict[str, Any]:
    """The meta that a node hands to one that replaces it, without our own key.

    Args:
        same_value: the new node returns the same kind of value; otherwise what describes the value is dropped.
    """
    dropped = (META_KEY,) if same_value else (META_KEY, *VALUE_META)
    return {key: value for key, value in node.meta.items() if key not in dropped}


def graph_record(graph_module: fx.GraphModule) -> GraphRecord:
    """The graph's record; an empty one if no pass has set it."""
    found = graph_module.meta.get(META_KEY)
    return found if isinstance(found, GraphRecord) else GraphRecord()


def record_graph(graph_module: fx.GraphModule, **changes: Any) -> None:
    """Replace fields of the graph's record."""
    graph_module.meta[META_KEY] = dataclasses.replace(graph_record(graph_module), **changes)


def sites(graph_module: fx.GraphModule) -> dict[Site, list[fx.Node]]:
    """All sites in graph order, each with the nodes that apply it; several if a weight is shared."""
    found: dict[Site, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        site = annotation(node).site
        if site is not None:
            found.setdefault(site, []).append(node)
    return found
