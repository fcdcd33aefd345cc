"""The records that travel between passes, and the one typed accessor of `node.meta`.

Shapes. A site computes, in each of its G groups, y = W x + b with W of shape [O, D]: O outputs and D inputs per
group. For a convolution x is the patch under the kernel, D = C_in / G * prod(kernel_size), and every output pixel
is one *position*; for a linear layer a position is one index of the leading dimensions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from torch import fx, nn

from balf_fx.fingerprint import Fingerprint
from balf_fx.widths import Width, WidthCurve

META_KEY = "balf"
"""The only key that balf_fx writes, in `node.meta` (an `Annotation`) and in `GraphModule.meta` (a `GraphRecord`)."""

VALUE_META = ("val", "example_value", "tensor_meta")
"""Keys of `node.meta` that describe the node's own value: a node that returns another must not inherit them."""

PartRanks = tuple[int | None, ...]
Rank = int | PartRanks | None
"""One rank for all of a site, or one for each of its parts; None is dense."""

Measure = Literal["flops", "params"]
Side = Literal["output", "input"]
Kind = Literal["linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]


class Reason(str, Enum):
    """Why a node with parameters is not a site."""

    NOT_LINEAR = "not a linear or convolution layer"
    SUBCLASS = "a subclass whose forward may differ"
    PARAMETRIZED = "its weight is parametrized"
    HOOKED = "it carries forward or backward hooks"
    SHARED = "its weight or bias is shared"
    COMPUTED = "its weight or geometry is computed in the graph"
    DTYPE = "its weight is not a real floating-point tensor"
    QUANTIZED = "its weight is quantized already"
    DEPTHWISE = "one output channel per group"
    SINGLE_INPUT = "one input value per group"
    TOO_SMALL = "no rank is cheaper than the dense layer"
    EXCLUDED = "excluded by the user"


@dataclass(frozen=True)
class Refusal:
    """A node that has parameters but is no site.

    Attributes:
        name: dotted path of the module or parameter.
        kind: the module's class or the function's name.
        reason: one of `Reason`.
        detail: a further word for the reader, or "".
    """

    name: str
    kind: str
    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value} ({self.detail})" if self.detail else self.reason.value


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution lays its kernel on the input; one entry per spatial dimension.

    `padding` is resolved to (before, after) pairs; `padding_mode` is nn.Conv's own; `output_padding` is None unless the
    convolution is transposed.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    padding_mode: str
    output_padding: tuple[int, ...] | None = None

    @property
    def pointwise(self) -> bool:
        """Whether a patch is a single input pixel."""
        return math.prod(self.kernel_size) == 1


@dataclass(frozen=True)
class Site:
    """A node whose weight a product of two thin layers can stand in for.

    Attributes:
        name: dotted path; the two factors become `name.0` (D -> r) and `name.1` (r -> O).
        weight, bias: dotted paths of the parameters; bias may be None.
        groups, out_features, in_features: G, O and D (per group, see the module's docstring).
        conv: the geometry of a convolution, None for a linear layer.
        inputs_first: the weight is stored [D, O], as in x @ W, or [C_in, C_out / G, *kernel], as in transposed
            convolutions, for which D = C_in / G * prod(kernel_size) all the same.
        keeps_weight: something else, a tied embedding say, needs the weight too: the factors come on top of it.
        parts: the graph takes the outputs apart into this many equal pieces, as with a fused query-key-value
            projection: each may have factors of its own.
    """

    name: str
    kind: Kind
    weight: str
    bias: str | None
    groups: int
    out_features: int
    in_features: int
    conv: ConvGeometry | None = None
    inputs_first: bool = False
    keeps_weight: bool = False
    parts: int = 1

    @property
    def transposed(self) -> bool:
        """Whether this is a transposed convolution, in which an input pixel is no patch."""
        return self.conv is not None and self.conv.output_padding is not None

    @property
    def side(self) -> Side:
        """Where statistics cost least: min(O, D)^2 per position.

        On a tie the input wins where it needs no patches, since sites that read the same value share one observer.
        """
        if self.transposed:
            return "output"
        patches = self.conv is not None and not self.conv.pointwise
        narrow = self.in_features < self.out_features or (self.in_features == self.out_features and not patches)
        return "input" if narrow else "output"

    @property
    def taps(self) -> int:
        """How many pixels a patch has; 1 for a linear layer."""
        return 1 if self.conv is None else math.prod(self.conv.kernel_size)

    @property
    def break_even(self) -> int:
        """The largest rank r with r (O + D) < O D, 0 where there is none."""
        return (self.out_features * self.in_features - 1) // (self.out_features + self.in_features)

    @property
    def full_rank(self) -> int:
        return min(self.out_features, self.in_features)

    @property
    def shape(self) -> str:
        return f"{self.out_features} x {self.in_features} x {self.groups}"


@dataclass(frozen=True)
class Spectrum:
    """What each rank of a site keeps, and the map that keeps it.

    The spectrum of a site's parts has the parts in place of the groups, with O outputs each.

    Attributes:
        energies: [G, m] float64, descending: mean squared output error avoided by each component.
        left: [G, O, m] float64; rank-r factors are A = left[..., :r] and B = right[..., :r, :] W.
        mean: [G, O] float64, the mean of W x over positions, for the bias correction; None where not centred.
        right: [G, m, O] float64, a left inverse of `left`; None for its transpose, where columns are orthonormal.
    """

    energies: torch.Tensor
    left: torch.Tensor
    mean: torch.Tensor | None
    right: torch.Tensor | None = None

    def maps(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """L [G, O, r] and R [G, r, O] with W' = L R W."""
        left = self.left[..., :rank]
        return left, left.mT if self.right is None else self.right[..., :rank, :]

    def only(self, group: int) -> Spectrum:
        """The spectrum of one group, or part."""
        own = slice(group, group + 1)
        mean, right = (None if value is None else value[own] for value in (self.mean, self.right))
        return Spectrum(self.energies[own], self.left[own], mean, right)


@dataclass(frozen=True)
class Candidate:
    """One choice for a site; `distortion` is mean squared output error."""

    rank: Rank
    flops: int
    params: int
    distortion: float

    def cost(self, measure: Measure) -> int:
        return self.flops if measure == "flops" else self.params


@dataclass(frozen=True)
class RankCurve:
    """Distortion and cost of a site as a function of rank.

    Attributes:
        candidates: ranks 1 .. break-even ascending, then ranks of the parts that beat them, ascending, then dense.
        energy: mean squared output of the site (centred or not, as asked), which normalises its distortions.
        output_elements: of all uses of the site together, on which FLOPs depend.
        spectrum: what the factors are made of.
        loss: what the loss rises by, to second order, where the site's output is replaced by its mean; None where no
            gradient is known.
        parts: the spectrum of the site's parts, where these may have factors of their own.
    """

    candidates: tuple[Candidate, ...]
    energy: float
    output_elements: int
    spectrum: Spectrum
    parts: Spectrum | None = None
    loss: float | None = None

    @property
    def dense(self) -> Candidate:
        return self.candidates[-1]

    def normalised(self, distortion: float) -> float:
        """`distortion` as a share of the site's energy; a site of no energy has nothing to lose."""
        return distortion / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True)
class Solution:
    """What a site, or a part of it, computes in the compressed model: left right x + bias.

    Attributes:
        left: [G, O, r], None where it stays dense.
        right: [G, r, D], or [G, O, D] of a dense layer.
        bias: [G, O] or None.
    """

    left: torch.Tensor | None
    right: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class EnergyCurve:
    """The share of a site's energy that ranks keep, at a few of them, for pictures.

    Attributes:
        ranks: ascending, from 0 to the full rank min(O, D); closer to each other where they are small.
        kept: for each of them, in [0, 1], to five digits.
    """

    ranks: tuple[int, ...]
    kept: tuple[float, ...]


@dataclass(frozen=True)
class Choice:
    """What the allocator decided for a site."""

    site: Site
    chosen: Candidate
    dense: Candidate
    energy_kept: float
    spectrum: EnergyCurve | None = None


@dataclass(frozen=True)
class Allocation:
    """The solution of one global budget.

    Attributes:
        method: "budget", "uniform", "energy" or "ranks".
        measure, target: the currency and the fraction asked for; target is None where no budget was given.
        choices: one for each site, in graph order.
        primal: the objective reached, the sum over sites of normalised distortion.
        bound: no allocation within the budget has a smaller objective (None where nothing was optimised).
        sizes: of widths, by their index in the graph's record; those that are not listed keep all features.
        saved_elsewhere: FLOPs and parameters that the sizes save in what is no site.
    """

    method: str
    measure: Measure
    target: float | None
    choices: tuple[Choice, ...]
    primal: float
    bound: float | None
    sizes: Mapping[int, int] = field(default_factory=dict)
    saved_elsewhere: tuple[int, int] = (0, 0)

    @property
    def gap(self) -> float | None:
        """primal - bound: at most this much could be gained by a better allocation."""
        return None if self.bound is None else max(self.primal - self.bound, 0.0)


@dataclass(frozen=True)
class Norm:
    """A BatchNorm by its running statistics: y = (x - mean) / sqrt(variance + eps) * weight + bias.

    All of length C; weight and bias may be None.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

    def scale(self, dtype: torch.dtype) -> torch.Tensor:
        """[C], what it multiplies its input by."""
        scale = (self.variance.to(dtype) + self.eps).rsqrt()
        return scale if self.weight is None else scale * self.weight.detach().to(dtype)

    def affine(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of [C]: what it multiplies its input by, and what it adds then."""
        scale = self.scale(dtype)
        shift = -self.mean.to(dtype) * scale
        return scale, shift if self.bias is None else shift + self.bias.detach().to(dtype)


@dataclass(frozen=True)
class Annotation:
    """Everything balf_fx knows of one node, filled in by the passes in turn.

    Attributes:
        flops: counted on the example batch (`costs.profile`).
        shape: of the node's output on the example batch.
        computed_from: the tensors of which a parameter is made, by FoldConstants on the node that fetches it.
        folded: the BatchNorms that the node has taken in, in their order, by FoldBatchNorm.
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
    computed_from: tuple[torch.Tensor, ...] = ()
    folded: tuple[Norm, ...] = ()
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
        fold_batchnorm, include, exclude: as `balf_fx.compile` takes them.
    """

    arguments: Mapping[str, Any] | None = None
    fold_batchnorm: bool = True
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()


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


def get_tensor(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, usually a parameter."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a weight is one of torchao's tensors, which look like floating-point ones and are not."""
    return type(tensor.data).__module__.partition(".")[0] == "torchao"


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
