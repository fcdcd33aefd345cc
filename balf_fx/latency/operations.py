"""The stock operations that a site runs at a rank."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from balf_fx.graph.curves import DIVIDED, Form, Rank
from balf_fx.graph.site import Conv, ConvGeometry, Site

Kind = Literal["linear", Conv, "cat", "gather", "add"]

_AXIS = 1  # of the features of a value

Family = tuple[Kind, tuple[int, ...], bool, torch.dtype]
"""Operations that run the same kernels: the kind, the size of the kernel, whether there are groups, and the type."""


@dataclass(frozen=True)
class Operation:
    """An operation on values of any number of features, at given positions.

    Attributes:
        kind: a layer; or "cat" of two values, "gather" of features, or "add" of two values.
        positions: (rows,), or (samples, *sizes) for convolutions and moves of their values.
        groups: of a layer; features are counted for each of them.
        conv: the geometry of a convolution.
        channels_last: whether values are stored with their features last.
        bias: whether a linear layer adds one.
    """

    kind: Kind
    positions: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    groups: int = 1
    conv: ConvGeometry | None = None
    channels_last: bool = False
    bias: bool = True

    @property
    def key(self) -> str:
        """Identifies the operation on one machine."""
        own = (self.kind, self.positions, str(self.dtype), self.groups, self.conv, self.channels_last)
        return repr(own if self.bias else (*own, "no bias"))

    @property
    def family(self) -> Family:
        """The family of the operation."""
        return self.kind, () if self.conv is None else self.conv.kernel_size, self.groups > 1, self.dtype

    def task(self, inputs: int, outputs: int) -> Callable[[], Tensor]:
        """The operation on values of these sizes; for "cat" and "add", `inputs` and `outputs` are those of both values.

        Raises:
            RuntimeError: the operation does not run here, for example since there is too little memory.
        """
        value = self._value(inputs)
        if self.kind == "cat":
            return functools.partial(torch.cat, [value, self._value(outputs)], _AXIS)
        if self.kind == "add":
            return functools.partial(torch.add, value, self._value(inputs))
        if self.kind == "gather":
            order = torch.arange(outputs, device=self.device) % inputs
            return functools.partial(torch.index_select, value, _AXIS, order)
        bias = torch.ones(self.groups * outputs, dtype=self.dtype, device=self.device)
        if self.conv is None:
            return functools.partial(F.linear, value, self._ones(outputs, inputs), bias if self.bias else None)
        conv, kernel = self.conv, self.conv.kernel_size
        padding = tuple(before for before, _ in conv.padding)
        if any(before != after for before, after in conv.padding):  # the model pads its input first
            padding = (0,) * len(padding)
            value = F.pad(value, [size for pair in reversed(conv.padding) for size in pair])
        convolve: Any = getattr(F, self.kind)
        if conv.output_padding is None:
            weight = self._ones(self.groups * outputs, inputs, *kernel)
            return functools.partial(convolve, value, weight, bias, conv.stride, padding, conv.dilation, self.groups)
        weight = self._ones(self.groups * inputs, outputs, *kernel)
        added = conv.output_padding
        return functools.partial(convolve, value, weight, bias, conv.stride, padding, added, self.groups, conv.dilation)

    def _value(self, features: int) -> Tensor:
        return self._ones(self.positions[0], self.groups * features, *self.positions[1:])

    def _ones(self, *shape: int) -> Tensor:
        layout = torch.channels_last if self.channels_last and len(shape) == 4 else torch.contiguous_format
        return torch.ones(shape, dtype=self.dtype, device=self.device).contiguous(memory_format=layout)


class Run(NamedTuple):
    """An operation at one size."""

    operation: Operation
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Use:
    """The positions at which a site's layer is used once.

    Attributes:
        before, after: as `Operation.positions`, of its input and of its output.
        apart: whether linear layers of low-rank maps add no bias: a compiler fuses it with what follows
            (`passes.SplitBias`).
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    channels_last: bool = False
    apart: bool = False

    def runs(self, site: Site, rank: Rank) -> Iterator[Run]:
        """The operations of a site at a rank; dense for None."""
        return self.runs_as(site, rank, site.form(rank))

    def runs_as(self, site: Site, rank: Rank, form: Form) -> Iterator[Run]:
        """The same in a given form."""
        outputs, inputs = site.out_features, site.in_features // site.taps
        first = self._first(site)
        if rank is None:
            yield Run(self._layer(site), inputs, outputs)
        elif isinstance(rank, tuple):
            yield from self._parts(site, rank, form == "rows")
        elif form == "columns":
            rows = (math.prod(self.before),)  # also of a convolution, which is computed as a product
            if site.pivots != "columns":
                yield Run(self._moves("gather", rows), inputs, inputs)
            yield Run(self._thin_linear(site, rows), inputs - rank, rank)
            yield Run(self._moves("add", rows), rank, rank)
            yield Run(self._thin_linear(site, rows), rank, outputs)
        elif form in DIVIDED:
            before, after = site.factor_convs
            yield Run(self._operation("conv2d", self.before, 1, before), inputs, rank)
            yield Run(self._operation("conv2d", self.after, 1, after), rank, outputs)
        elif form == "rows":
            yield Run(first, inputs, rank)
            yield Run(self._second(site), rank, outputs - rank)
            yield from self._gathered(site, [rank, outputs - rank])
        else:
            yield Run(first, inputs, rank)
            yield Run(self._second(site), rank, outputs)

    def _parts(self, site: Site, ranks: tuple[int | None, ...], rows: bool) -> Iterator[Run]:
        each, inputs = site.out_features // site.parts, site.in_features // site.taps
        yield Run(self._first(site), inputs, sum(rank or 0 for rank in ranks))
        for rank in ranks:
            left = each - (rank or 0) if rows else each
            yield Run(self._first(site) if rank is None else self._second(site), inputs if rank is None else rank, left)
        if rows:
            yield from self._gathered(site, [site.out_features // 2] * 2)
        else:
            yield Run(self._moves("cat", self.after), site.out_features // 2, site.out_features // 2)

    def _gathered(self, site: Site, sizes: list[int]) -> Iterator[Run]:
        """The concatenation of pivots and other rows, and what brings them into order."""
        first, second = (site.groups * size for size in sizes)
        yield Run(self._moves("cat", self.after), first, second)
        if site.pivots != "rows":
            yield Run(self._moves("gather", self.after), first + second, first + second)

    def layers(self, site: Site) -> tuple[Operation, Operation]:
        """The layer itself, which computes the values of the rank, and the one that reads these."""
        return self._first(site), self._second(site)

    def _layer(self, site: Site) -> Operation:
        kind: Kind = "linear" if site.kind == "experts" else site.kind
        return self._operation(kind, self.before, site.groups, site.conv)

    def _first(self, site: Site) -> Operation:
        """The layer from inputs to ranks, which has the geometry of the layer itself."""
        return self._layer(site) if site.conv is not None else self._thin_linear(site, self.before)

    def _second(self, site: Site) -> Operation:
        """The layer from ranks to outputs, which reads single pixels."""
        if site.conv is None:
            return self._thin_linear(site, self.after)
        axes = len(site.conv.kernel_size)
        ones, zeros = (1,) * axes, ((0, 0),) * axes
        conv = ConvGeometry(ones, ones, zeros, ones, "zeros")
        kinds: dict[int, Conv] = {1: "conv1d", 2: "conv2d", 3: "conv3d"}
        return self._operation(kinds[axes], self.after, site.groups, conv)

    def _thin_linear(self, site: Site, positions: tuple[int, ...]) -> Operation:
        """A linear layer of a low-rank map; without a bias where `passes.SplitBias` adds that apart."""
        groups = 1 if site.conv is not None else site.groups
        linear = self._operation("linear", positions, groups, None)
        return replace(linear, bias=not self.apart or site.pivots is None)

    def _moves(self, kind: Kind, positions: tuple[int, ...]) -> Operation:
        return self._operation(kind, positions, 1, None)

    def _operation(self, kind: Kind, positions: tuple[int, ...], groups: int, conv: ConvGeometry | None) -> Operation:
        return Operation(kind, positions, self.dtype, self.device, groups, conv, self.channels_last)
