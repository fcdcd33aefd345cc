"""The records that passes leave on a graph, and the one typed accessor of `node.meta`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from balf_fx.graph.allocation import Allocation, Choice
from balf_fx.graph.curves import Rank, RankCurve, Solution
from balf_fx.graph.fingerprint import Fingerprint
from balf_fx.graph.site import Norm, Refusal, Site
from balf_fx.graph.widths import Width, WidthCurve

META_KEY = "balf"
"""The only key that balf_fx writes, in `node.meta` (an `Annotation`) and in `GraphModule.meta` (a `GraphRecord`)."""


VALUE_META = ("val", "example_value", "tensor_meta")
"""Keys of `node.meta` that describe the node's own value: a node that returns another must not inherit them."""


@dataclass(frozen=True)
class Annotation:
    """Everything balf_fx knows of one node, filled in by the passes in turn.

    Attributes:
        flops: counted on the example batch (`costs.profile`).
        shape: of the node's output on the example batch.
        number: the node's output on the example batch, where it is a whole number: a size that is an argument, say.
        computed_from: the tensors of which a parameter is made, by FoldConstants on the node that fetches it.
        folded: the BatchNorms that the node has taken in, in their order, by FoldBatchNorm.
        shared: another graph of the program reads the node's weights too: their shapes and values stay as they are,
            unless they are replaced by the same factors in both.
        site, refusal: by Annotate; at most one of them.
        observer: path of the observer whose statistics serve the site, by InsertObservers.
        sensitivity: path of the observer of its gradients, if there is one.
        influence: path of the observer of its weight's gradients, if there is one.
        curve, scored_with: by Score; scored_with tells a fresh score from a stale one.
        choice: by Allocate.
        refit: by Refine or Refit, what takes the place of the one-shot factors or of a dense layer's weight.
    """

    flops: int | None = None
    shape: tuple[int, ...] | None = None
    number: int | None = None
    computed_from: tuple[torch.Tensor, ...] = ()
    folded: tuple[Norm, ...] = ()
    shared: bool = False
    site: Site | None = None
    refusal: Refusal | None = None
    observer: str | None = None
    sensitivity: str | None = None
    influence: str | None = None
    curve: RankCurve | None = None
    scored_with: tuple[Any, ...] | None = None
    choice: Choice | None = None
    refit: tuple[Solution, ...] | None = None


@dataclass(frozen=True)
class Origin:
    """How a graph was made of a model, so that it can be made again.

    Attributes:
        arguments: of the example call, by `example.describe`: {"positional": ..., "keywords": ...}; None where they
            hold something that has no description.
        fold_batchnorm, include, exclude, dense: as `balf_fx.compile` takes them.
    """

    arguments: Mapping[str, Any] | None = None
    fold_batchnorm: bool = True
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()


@dataclass(frozen=True)
class Replaced:
    """A layer that has given way to others.

    Attributes:
        name: dotted path, before and after.
        rank: None where it is one layer still, refitted or narrower.
        biased: for each part, one where there are none, whether it has a bias.
        fingerprint: of the layer that it was.
    """

    name: str
    rank: Rank
    biased: tuple[bool, ...]
    fingerprint: Fingerprint


@dataclass(frozen=True)
class GraphRecord:
    """What balf_fx knows of a whole graph.

    Attributes:
        flops, params: of the model as the user gave it, before any pass; None where nobody counted.
        captured: how the graph came about, "symbolic_trace" or "export".
        origin: by `prepare`.
        allocation, refusals: by Allocate, kept for the report.
        params_after: parameters of the compressed graph, by Allocate.
        widths: by FindWidths.
        width_curves: by ScoreWidths, one for each width; None where nothing is known of it.
        widths_scored_with: by ScoreWidths, tells fresh curves from stale ones.
        replaced: by Factorize.
    """

    flops: int | None = None
    params: int | None = None
    params_after: int | None = None
    captured: str = "elsewhere"
    origin: Origin = Origin()
    allocation: Allocation | None = None
    refusals: tuple[tuple[Refusal, int | None], ...] = ()
    widths: tuple[Width, ...] = ()
    width_curves: tuple[WidthCurve | None, ...] = ()
    widths_scored_with: tuple[Any, ...] = ()
    replaced: tuple[Replaced, ...] = ()


def annotation(node: fx.Node) -> Annotation:
    """The node's annotation, an empty one where no pass has been."""
    found = node.meta.get(META_KEY)
    return found if isinstance(found, Annotation) else Annotation()


def annotate(node: fx.Node, **changes: Any) -> None:
    """Replace fields of the node's annotation. Records are frozen, so copies of a graph may share them."""
    node.meta[META_KEY] = dataclasses.replace(annotation(node), **changes)


def graph_record(graph_module: fx.GraphModule) -> GraphRecord:
    """The graph's record, an empty one where no pass has been."""
    found = graph_module.meta.get(META_KEY)
    return found if isinstance(found, GraphRecord) else GraphRecord()


def record_graph(graph_module: fx.GraphModule, **changes: Any) -> None:
    """Replace fields of the graph's record."""
    graph_module.meta[META_KEY] = dataclasses.replace(graph_record(graph_module), **changes)


def sites(graph_module: fx.GraphModule) -> dict[Site, list[fx.Node]]:
    """All sites in graph order, each with the nodes that apply it: several where a weight is shared."""
    found: dict[Site, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        site = annotation(node).site
        if site is not None:
            found.setdefault(site, []).append(node)
    return found
