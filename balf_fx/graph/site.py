"""A site: a node that computes y = W x + b.

Shapes. A site computes, in each of its G groups, y = W x + b with W of shape [O, D]: O outputs and D inputs per
group. For a convolution x is the patch under the kernel, D = C_in / G * prod(kernel_size), and every output pixel
is one *position*; for a linear layer a position is one index of the leading dimensions. In a layer of experts each
expert is a group with positions of its own (`graph.experts`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

from balf_fx.graph.curves import Divided, Form, Rank

Side = Literal["output", "input"]


FreeOrder = Literal["rows", "columns", "none"]
"""The side on which the order of a layer's features is free, since the layers around it take it over."""


MOVE = 128
"""The number of multiplications that must be saved for each value that is moved at a position.

On a CPU, moving a value takes as long as 70 to 90 multiplications of a matrix product."""

_ADDED = 0.25
"""The values whose move takes as long as a pivot of a convolution: it is added to a product, which is slower than a
convolution where it has few outputs (MobileNetV2: 1.1 of the time of pairs on an AMD processor, 1.0 with this)."""


Conv = Literal["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]


Kind = Literal["linear", "experts", Conv]


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
    FIXED = "its module does more than this layer, or shares it, so that no other module can take its place"
    ROUTER = "its output chooses experts, of which gradients know nothing"
    UNSEEN = "no finite calibration value has reached it"


@dataclass(frozen=True)
class Refusal:
    """A node that has parameters but is not a site.

    Attributes:
        name: dotted path of the module or parameter.
        kind: the module's class or the function's name.
        reason: one of `Reason`.
        detail: an additional explanation, or "".
    """

    name: str
    kind: str
    reason: Reason
    detail: str = ""

    @property
    def keeps_weights(self) -> bool:
        """Whether the layer keeps its weights bit for bit, so that it is neither refitted nor made narrower."""
        return self.reason in (Reason.EXCLUDED, Reason.FIXED)

    def __str__(self) -> str:
        return f"{self.reason.value} ({self.detail})" if self.detail else self.reason.value


@dataclass(frozen=True)
class ConvGeometry:
    """The geometry of a convolution, with one entry per spatial dimension.

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

    def output_sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the output of a convolution that is not transposed, for these sizes of the input."""
        axes = zip(sizes, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple(
            (size + sum(padding) - (kernel - 1) * dilation - 1) // stride + 1
            for size, kernel, stride, padding, dilation in axes
        )


@dataclass(frozen=True)
class Site:
    """A node whose weight can be replaced by a product of two thin layers.

    Attributes:
        name: dotted path; the two factors become `name.0` (D -> r) and `name.1` (r -> O).
        weight, bias: dotted paths of the parameters; bias may be None.
        groups, out_features, in_features: G, O and D (per group, see the module's docstring).
        conv: the geometry of a convolution, None for a linear layer.
        inputs_first: whether the weight is stored as [D, O], as in x @ W, or as [C_in, C_out / G, *kernel], as in
            transposed convolutions, for which D = C_in / G * prod(kernel_size) too.
        keeps_weight: whether something else needs the weight too, such as a tied embedding: the factors are stored in
            addition to it.
        parts: the number of equal pieces into which the graph splits the output, as that of a fused query-key-value
            projection; each may have separate factors.
        keeps_rank: whether the user wants its full rank; it may still be refitted and narrowed.
        rank_step: ranks must be multiples of it, since kernels of grouped products need rows of whole 16 bytes.
        multiple_of: the number of which the user wants ranks, over all groups, to be multiples.
        pivots: the order that is free where its low-rank maps are written with their own rows or columns; None for
            pairs of factors only.
        samples: the dimension of the samples in a linear layer's values, 1 for sequences [L, N, F].
        divided: how its kernel is divided between the factors (`ranks.divided`); None where the first has all of it.
        move: the multiplications that such a form must save for each value that it moves at a position; 0 where only
            parameters count.
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
    keeps_rank: bool = False
    rank_step: int = 1
    multiple_of: int = 1
    pivots: FreeOrder | None = None
    move: int = MOVE
    divided: Divided | None = None
    samples: int = field(default=0, compare=False)

    @property
    def transposed(self) -> bool:
        """Whether this is a transposed convolution, whose patches are patches of the output, not of the input."""
        return self.conv is not None and self.conv.output_padding is not None

    @property
    def side(self) -> Side:
        """The side on which statistics cost less, min(O, D)^2 per position.

        If O = D, it is the input if that needs no patches, since sites that read the same value share one observer.
        """
        if self.transposed:
            return "output"
        patches = self.conv is not None and not self.conv.pointwise
        narrow = self.in_features < self.out_features or (self.in_features == self.out_features and not patches)
        return "input" if narrow else "output"

    @cached_property
    def taps(self) -> int:
        """The number of pixels in a patch; 1 for a linear layer."""
        return 1 if self.conv is None else math.prod(self.conv.kernel_size)

    @property
    def taps_read(self) -> float:
        """The share of the taps that meet at an output: all, but for strides of a transposed convolution."""
        return 1.0 if self.conv is None or not self.transposed else 1 / math.prod(self.conv.stride)

    @property
    def divisions(self) -> tuple[Divided, ...]:
        """How its kernel may be divided, so that the first factor's outputs have as many columns as its own."""
        conv = self.conv
        if conv is None or self.kind != "conv2d" or self.side == "input" or self.groups > 1 or self.parts > 1:
            return ()
        zeros = conv.padding_mode == "zeros" and all(before == after for before, after in conv.padding)
        if not zeros or self.taps == 1 or self.keeps_rank or self.keeps_weight:
            return ()
        axes = zip(conv.stride, conv.padding, conv.dilation, conv.kernel_size, strict=True)
        same = [stride == 1 and sum(padding) == apart * (size - 1) for stride, padding, apart, size in axes]
        found: list[Divided] = ["pointwise_first"] if all(same) else []
        return (*found, "separable") if same[1] and min(conv.kernel_size) > 1 else tuple(found)

    @cached_property
    def factor_taps(self) -> tuple[int, int]:
        """The pixels that each of its two factors reads."""
        if self.conv is None or self.divided is None:
            return self.taps, 1
        return (1, self.taps) if self.divided == "pointwise_first" else self.conv.kernel_size  # type: ignore[return-value]

    @cached_property
    def factor_sizes(self) -> tuple[int, int]:
        """The numbers of the second factor and of the first for each component, per group; O and D for a pair."""
        first, second = self.factor_taps
        return self.out_features * second, self.in_features // self.taps * first

    @property
    def factor_convs(self) -> tuple[ConvGeometry, ConvGeometry]:
        """The geometry of the convolutions of a site with a divided kernel."""
        if self.conv is None:
            raise TypeError(f"{self.name} is not a convolution")
        if self.divided == "pointwise_first":
            return ConvGeometry((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), "zeros"), self.conv
        height, width = (
            (self.conv.kernel_size[i], self.conv.stride[i], self.conv.padding[i], self.conv.dilation[i]) for i in (0, 1)
        )
        (h, down, above, spread), (w, along, beside, apart), none = height, width, (0, 0)
        return (
            ConvGeometry((h, 1), (down, 1), (above, none), (spread, 1), "zeros"),
            ConvGeometry((1, w), (1, along), (none, beside), (1, apart), "zeros"),
        )

    @property
    def strips(self) -> Site:
        """The layer that computes what each strip adds to the outputs at each place it has under a divided kernel."""
        (outputs, inputs), (conv, _) = self.factor_sizes, self.factor_convs
        return dataclasses.replace(self, out_features=outputs, in_features=inputs, conv=conv, divided=None)

    @property
    def break_even(self) -> int:
        """The largest rank r with r (O + D) < O D; 0 if there is none or the user wants full rank."""
        if self.keeps_rank:
            return 0
        largest = (self.out_features * self.in_features - 1) // (self.out_features + self.in_features)
        return largest // self.step * self.step

    @property
    def step(self) -> int:
        """The number of which the ranks of each group are multiples."""
        together = 1 if self.has_experts else self.groups
        return math.lcm(self.rank_step, self.multiple_of // math.gcd(self.multiple_of, together))

    @property
    def reads_each_once(self) -> bool:
        """Whether each output is computed from one pixel, with one column for each feature."""
        conv = self.conv
        plain = conv is None or (
            conv.pointwise and not self.transposed and set(conv.stride) == {1} and set(conv.padding) == {(0, 0)}
        )
        return plain and self.groups == 1

    def form(self, rank: Rank) -> Form:
        """How the map of a rank is written: with pivots, if that saves enough for the values that it moves."""
        if self.divided is not None and rank is not None:
            return self.divided
        if self.pivots is None or rank is None:
            return "pair"
        if isinstance(rank, int):
            form, moved = self._cheapest_form
            added = _ADDED * rank if form == "columns" and self.conv is not None else 0
            return form if rank * rank >= self.move * (moved + added) else "pair"
        saved = sum(each * each for each in rank if each is not None)
        return "rows" if saved >= self.move * self._moved_by_rows else "pair"

    @property
    def _moved_by_rows(self) -> int:
        """The values that rows move at a position: they are concatenated, and those out of order are gathered."""
        return self.out_features * (1 if self.pivots == "rows" else 2)

    @cached_property
    def _cheapest_form(self) -> tuple[Form, int]:
        """The form that moves the fewest values where the whole site has one rank, and their number."""
        rows: tuple[Form, int] = ("rows", self._moved_by_rows)
        if not self.reads_each_once:
            return rows
        columns: tuple[Form, int] = ("columns", 0 if self.pivots == "columns" else self.in_features)
        return min(rows, columns, key=lambda item: item[1])

    @property
    def has_experts(self) -> bool:
        """Whether its groups are experts, which have different positions."""
        return self.kind == "experts"

    @property
    def full_rank(self) -> int:
        return min(self.factor_sizes)

    @property
    def numel(self) -> int:
        """The number of entries of the weight."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """O, D and G."""
        return self.out_features, self.in_features, self.groups

    @property
    def shape_in_words(self) -> str:
        """The shape as "O x D x G", for messages."""
        return " x ".join(map(str, self.shape))


def exclusion(name: str, include: Sequence[str] | None, exclude: Sequence[str]) -> str:
    """The reason why the user's glob patterns exclude a layer; "" if they do not."""
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return "matches exclude"
    if include is not None and not any(fnmatchcase(name, pattern) for pattern in include):
        return "matches no include"
    return ""
