"""The effect of the sizes of widths on each layer: the features that it reads, and those that it still outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from balf_fx.graph.annotation import GraphRecord, graph_record
from balf_fx.graph.curves import Solution
from balf_fx.graph.site import Site
from balf_fx.graph.widths import WidthCurve, WidthMaps


@dataclass(frozen=True)
class Narrowed:
    """Rows of a layer, and the maps that reduce them.

    Attributes:
        rows: [heads, features], indices of rows.
        maps: [heads, r, features], by which the rows of each head are multiplied; None if they stay as they are.
        kept: [r], the features that the maps select; None if they combine features.
    """

    rows: Tensor
    maps: Tensor | None = None
    kept: Tensor | None = None

    def of(self, value: Tensor) -> Tensor:
        """These rows of a value [O, ...], reduced: [heads * r, ...]."""
        rows = value[self.rows if self.kept is None else self.rows[:, self.kept]]
        if self.kept is None and self.maps is not None:
            rows = torch.einsum("hrf,hf...->hr...", self.maps.to(value), rows)
        return rows.flatten(0, 1)

    @property
    def size(self) -> int:
        """r, the number of features of each head after the reduction."""
        return self.rows.shape[1] if self.maps is None else self.maps.shape[1]

    @property
    def total(self) -> int:
        """The number of rows after the reduction."""
        return len(self.rows) * self.size


@dataclass(frozen=True)
class Cut:
    """One layer between narrowed widths.

    Attributes:
        read: the maps of the width that it reads.
        repeat: the number of input heads that share one of these maps.
        written: the rows and maps of each width that it outputs, and then its other rows: the parts of its output, in
            their new order.
        projected: the same with the maps P = L R [heads, features, features], by which `passes.Refit` projects outputs
            onto the kept features while the layer still has its old size.
    """

    read: WidthMaps | None = None
    repeat: int = 1
    written: tuple[Narrowed, ...] = ()
    projected: tuple[Narrowed, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether the layer's output changes even before its rows are removed."""
        return self.read is not None or bool(self.projected)

    def read_features(self, value: Tensor, axis: int) -> Tensor:
        """R h, for features h on an axis of a value."""
        if self.read is None:
            return value
        if self.read.kept is not None:
            return value.index_select(axis, self.read.kept.to(value.device))
        right = self.read.right.to(value).repeat_interleave(self.repeat, 0)
        last = value.movedim(axis, -1)
        heads = last.reshape(*last.shape[:-1], len(right), -1)
        return torch.einsum("...hf,hrf->...hr", heads, right).flatten(-2).movedim(-1, axis)

    def inputs(self, site: Site) -> Site:
        """The site with its reduced inputs."""
        if self.read is None:
            return site
        heads, _, size = self.read.left.shape
        return dataclasses.replace(site, in_features=heads * self.repeat * size * site.taps)

    def outputs(self, site: Site) -> Site:
        """The site with its reduced outputs."""
        fewer = sum(own.rows.numel() - own.total for own in self.written)
        if site.groups > 1:  # a depthwise convolution: a group is a feature
            return dataclasses.replace(site, groups=site.groups - fewer)
        return dataclasses.replace(site, out_features=site.out_features - fewer, parts=1 if fewer else site.parts)

    def narrow_inputs(self, solution: Solution, site: Site) -> Solution:
        """The layer's solution for the input R h in place of h."""
        if self.read is None:
            return solution
        left = _over_heads(self.read.left, self.repeat)
        by_tap = solution.right.reshape(*solution.right.shape[:-1], -1, site.taps)
        right = torch.einsum("gofk,fr->gork", by_tap, left).flatten(-2)
        if self.read.mean is None:
            return dataclasses.replace(solution, right=right)
        seen = _over_heads(self.read.right, self.repeat) @ self.read.mean
        lost = torch.einsum("gofk,f->go", by_tap, self.read.mean - left @ seen)
        lost = lost if solution.left is None else (solution.left @ lost.unsqueeze(-1)).squeeze(-1)
        return Solution(solution.left, right, lost if solution.bias is None else solution.bias + lost)

    def narrow_outputs(self, solution: Solution) -> Solution:
        """The layer's solution with reduced outputs: the kept rows in their order, then the rows of heads."""
        if not self.written:
            return solution
        bias = None if solution.bias is None else self._written_rows(solution.bias)
        if solution.left is None:
            return Solution(None, self._written_rows(solution.right), bias)
        return Solution(self._written_rows(solution.left), solution.right, bias)

    def _written_rows(self, value: Tensor) -> Tensor:
        """The kept rows of [1, O, ...], or of a depthwise convolution's [G, 1, ...]."""
        if len(value) > 1:
            return torch.cat([own.of(value) for own in self.written])
        return torch.cat([own.of(value[0]) for own in self.written]).unsqueeze(0)

    def project(self, solution: Solution) -> Solution:
        """The layer's solution at its old size, with outputs projected onto the smaller space."""
        if not self.projected or solution.left is not None:
            return solution
        right = solution.right.clone()
        bias = None if solution.bias is None else solution.bias.clone()
        for own in self.projected:
            rows = own.rows.flatten()
            right[0][rows] = own.of(right[0])
            if bias is not None:
                bias[0][rows] = own.of(bias[0])
        return Solution(None, right, bias)


def _over_heads(maps: Tensor, repeat: int) -> Tensor:
    """[heads, a, b] as one block-diagonal matrix, with each head repeated `repeat` times."""
    blocks: Tensor = torch.block_diag(*maps.repeat_interleave(repeat, 0))  # type: ignore[no-untyped-call]
    return blocks


def find_cuts(graph_module: fx.GraphModule) -> Mapping[str, Cut]:
    """The cut of every layer that the allocation narrows on one side or both, by the name of its node."""
    record = graph_record(graph_module)
    if record.allocation is None:
        return {}
    sizes = {width.key: record.allocation.sizes.get(width.key, width.features) for width in record.widths}
    curves = dict(zip((width.key for width in record.widths), record.width_curves, strict=False))
    shrunk = [width for width in record.widths if sizes[width.key] < width.features and curves.get(width.key)]
    narrowed = dict.fromkeys(name for width in shrunk for name in width.producers)
    found: dict[str, Cut] = {name: _written(record, name, sizes, curves) for name in narrowed}
    for width in shrunk:
        curve, size = curves[width.key], sizes[width.key]
        if curve is None:
            continue
        for reader, name in enumerate(width.consumers):
            maps = curve.maps(size, reader)
            found[name] = dataclasses.replace(found.get(name, Cut()), read=maps, repeat=width.repeat)
        maps = curve.maps(size)
        for name in width.between:
            rows = torch.arange(width.features).unsqueeze(0)
            found[name] = Cut(written=(Narrowed(rows, maps.right, maps.kept),))
        for name in width.fused:
            found[name] = Cut(written=found[width.fused_layer].written)
    return found


def _written(record: GraphRecord, name: str, sizes: Mapping[str, int], curves: Mapping[str, WidthCurve | None]) -> Cut:
    """The parts of a layer's output, some of them narrowed."""
    written: list[Narrowed] = []
    projected: list[Narrowed] = []
    for width in record.widths:
        curve, size = curves.get(width.key), sizes[width.key]
        maps = curve.maps(size) if curve is not None and size < width.features else None
        for position, producer in enumerate(width.producers):
            if producer != name:
                continue
            queries = width.kind == "queries" and position == 0
            repeat = width.repeat if queries else 1
            rows = torch.tensor(width.rows[position]).reshape(width.heads * repeat, width.features)
            if maps is None:
                written.append(Narrowed(rows))
                continue
            map_ = maps.left.mT if width.kind == "queries" and position == 1 else maps.right
            written.append(Narrowed(rows, map_.repeat_interleave(repeat, 0), maps.kept))
            if queries:
                projected.append(Narrowed(rows, (maps.left @ maps.right).repeat_interleave(repeat, 0)))
    rests = dict.fromkeys(reader.rows for reader in record.rests.get(name, ()))
    written += [Narrowed(torch.tensor(rows).unsqueeze(0)) for rows in rests]
    return Cut(written=tuple(written), projected=tuple(projected))
