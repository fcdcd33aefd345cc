"""The effect of the sizes of widths on each layer: the features that it reads, and those that it still outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from balf_fx.graph.annotation import GraphRecord, graph_record
from balf_fx.graph.curves import Solution
from balf_fx.graph.site import Site
from balf_fx.graph.widths import HOSTS, Width, WidthCurve, WidthMaps, places


@dataclass(frozen=True)
class Narrowed:
    """Rows of a layer, and the maps that reduce them.

    Attributes:
        rows: [heads, features], indices of rows.
        maps: [heads, r, features], by which the rows of each head are multiplied; None if none are combined.
        kept: [r], the features that are selected; None if all are, or combinations of them.
    """

    rows: Tensor
    maps: Tensor | None = None
    kept: Tensor | None = None

    def of(self, value: Tensor) -> Tensor:
        """These rows of a value [O, ...], reduced: [heads * r, ...]."""
        rows = value[self.rows if self.kept is None else self.rows[:, self.kept]]
        if self.maps is not None:
            rows = torch.einsum("hrf,hf...->hr...", self.maps.to(value), rows)
        return rows.flatten(0, 1)

    @property
    def size(self) -> int:
        """r, the number of features of each head after the reduction."""
        if self.kept is not None:
            return len(self.kept)
        return self.rows.shape[1] if self.maps is None else self.maps.shape[1]

    @property
    def total(self) -> int:
        """The number of rows after the reduction."""
        return len(self.rows) * self.size


@dataclass(frozen=True)
class Turned:
    """A change of basis of heads.

    Attributes:
        rows: [heads, r], the rows of each head among the layer's reduced outputs.
        maps: [heads, r, r], by which they are multiplied.
    """

    rows: Tensor
    maps: Tensor

    def apply(self, value: Tensor) -> Tensor:
        """Rows [1, O, ...] with those of the heads in their new basis."""
        changed = value.clone()
        changed[0, self.rows] = torch.einsum("hij,hj...->hi...", self.maps.to(value), value[0, self.rows])
        return changed


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
        order: [features], the new order of the features that it reads, as positions among the kept ones; None if they
            stay in their order.
        turned: the changes of basis of the heads that it outputs.
        read_in: [heads, r, r], by which the columns of each head that it reads are multiplied; None for no new basis.
    """

    read: WidthMaps | None = None
    repeat: int = 1
    written: tuple[Narrowed, ...] = ()
    projected: tuple[Narrowed, ...] = ()
    order: Tensor | None = None
    turned: tuple[Turned, ...] = ()
    read_in: Tensor | None = None

    @property
    def rewires(self) -> bool:
        """Whether the values around the layer change in size or order."""
        return self.read is not None or bool(self.written)

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
        heads, size, _ = self.read.right.shape
        return dataclasses.replace(site, in_features=heads * self.repeat * size * site.taps)

    def outputs(self, site: Site) -> Site:
        """The site with its reduced outputs."""
        fewer = sum(own.rows.numel() - own.total for own in self.written)
        if site.groups > 1:  # whole groups of a convolution, which process the features
            return dataclasses.replace(site, groups=site.groups - fewer // site.out_features)
        return dataclasses.replace(site, out_features=site.out_features - fewer, parts=1 if fewer else site.parts)

    def narrow_inputs(self, solution: Solution, site: Site) -> Solution:
        """The layer's solution for the input R h in place of h."""
        if self.read is None:
            return solution
        left = _over_heads(self.read.left, self.repeat)
        by_tap = solution.right.reshape(*solution.right.shape[:-1], -1, _taps(solution, site))
        right = torch.einsum("gofk,fr->gork", by_tap, left).flatten(-2)
        if self.read.mean is None:
            return dataclasses.replace(solution, right=right)
        seen = _over_heads(self.read.right, self.repeat) @ self.read.mean
        lost = torch.einsum("gofk,f->go", by_tap, self.read.mean - left @ seen)
        lost = lost if solution.left is None else (solution.left @ lost.unsqueeze(-1)).squeeze(-1)
        if solution.divided:
            lost = lost.reshape(1, site.out_features, -1).sum(-1)
        bias = lost if solution.bias is None else solution.bias + lost
        return dataclasses.replace(solution, right=right, bias=bias)

    def order_inputs(self, solution: Solution, site: Site) -> Solution:
        """The layer's solution for the kept features in their new order."""
        if self.order is None:
            return solution
        by_tap = solution.right.reshape(*solution.right.shape[:-1], -1, _taps(solution, site))[..., self.order, :]
        return dataclasses.replace(solution, right=by_tap.flatten(-2))

    def narrow_outputs(self, solution: Solution) -> Solution:
        """The layer's solution with reduced outputs: the kept rows in their order, then the rows of heads."""
        if not self.written:
            return solution
        bias = None if solution.bias is None else self._written_rows(solution.bias)
        if solution.left is None:
            return Solution(None, self._written_rows(solution.right), bias)
        left, right, rank = solution.left, solution.right, solution.left.shape[-1]
        if solution.divided:
            outputs = sum(own.rows.numel() for own in self.written)
            left = self._written_rows(left.reshape(1, outputs, -1)).reshape(1, -1, rank)
        else:
            left = self._written_rows(left)
            right = right if len(right) == 1 else right[self._written_groups(solution.left)]
        return dataclasses.replace(solution, left=left, right=right, bias=bias)

    def turn(self, solution: Solution) -> Solution:
        """The layer's solution, with reduced inputs and outputs, in the new bases of heads on both sides."""
        left, right, bias = solution.left, solution.right, solution.bias
        if self.read_in is not None:
            heads = right.unflatten(-1, (len(self.read_in), -1))  # type: ignore[no-untyped-call]
            right = torch.einsum("gohr,hrs->gohs", heads, self.read_in.to(right)).flatten(-2)
        for own in self.turned:
            left, right = (None, own.apply(right)) if left is None else (own.apply(left), right)
            bias = None if bias is None else own.apply(bias)
        return dataclasses.replace(solution, left=left, right=right, bias=bias)

    def rows_of(self, rows: Tensor) -> Tensor:
        """The places [heads, r] of rows [heads, features] among the reduced outputs."""
        start = 0
        for own in self.written:
            if torch.equal(own.rows, rows):
                return torch.arange(start, start + own.total, device="cpu").reshape(len(rows), -1)
            start += own.total
        return rows

    def _written_rows(self, value: Tensor) -> Tensor:
        """The kept rows of [1, O, ...], or of [G, O, ...], whose groups stay or go as wholes."""
        groups, outputs = value.shape[:2]
        rows = torch.cat([own.of(value.flatten(0, 1)) for own in self.written])
        return rows.reshape(*(1, -1) if groups == 1 else (-1, outputs), *value.shape[2:])

    def _written_groups(self, value: Tensor) -> Tensor:
        """The numbers of the groups that are kept of [G, O, ...]."""
        numbers = torch.arange(len(value), device="cpu").unsqueeze(1)
        return self._written_rows(numbers.expand(value.shape[:2]))[:, 0]

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


def _taps(solution: Solution, site: Site) -> int:
    """The pixels that a solution's right factor reads."""
    return solution.taps[0] if solution.divided else site.taps


def _over_heads(maps: Tensor, repeat: int) -> Tensor:
    """[heads, a, b] as one block-diagonal matrix, with each head repeated `repeat` times."""
    blocks: Tensor = torch.block_diag(*maps.repeat_interleave(repeat, 0))  # type: ignore[no-untyped-call]
    return blocks


def find_cuts(graph_module: fx.GraphModule) -> Mapping[str, Cut]:
    """The cut of every layer that is narrowed or reordered on one side or both, by the name of its node."""
    record = graph_record(graph_module)
    if record.allocation is None:
        return {}
    changed = tuple(changed_widths(record))
    found: dict[str, Cut] = {}
    for name in dict.fromkeys(name for own in changed for name in own.width.producers):
        found[name] = _written(record, name, {own.width.key: own for own in changed})
    for own in changed:
        width = own.width
        for reader, name in enumerate(width.consumers):
            read = None if own.curve is None else own.curve.maps(own.size, reader, width.read_by(name))
            cut = found.get(name, Cut())
            found[name] = dataclasses.replace(cut, read=read, repeat=width.repeat, order=own.order)
        for name in width.between:
            features = torch.arange(len(width.held_by(name) or range(width.features)), device="cpu")
            found[name] = Cut(written=(own.narrowed(features.unsqueeze(0), name),))
        for name in width.fused:
            found[name] = Cut(written=found[width.fused_layer].written)
    for width in record.widths:
        if width.key in record.bases:
            _turn(found, width, record.bases[width.key])
    return found


def _turn(found: dict[str, Cut], width: Width, basis: Tensor) -> None:
    """Add a new basis of a width's heads to the cuts of its layers.

    Args:
        basis: C [heads, r, r] (`ranks.bases`).
    """
    inverse = torch.linalg.inv(basis)
    for position, name in enumerate(width.producers):
        queries = width.kind == "queries" and position == 0
        maps = basis.mT.repeat_interleave(width.repeat, 0) if queries else inverse
        cut = found.get(name, Cut())
        rows = cut.rows_of(torch.tensor(width.rows[position], device="cpu").reshape(len(maps), -1))
        found[name] = dataclasses.replace(cut, turned=(*cut.turned, Turned(rows, maps)))
    for name in width.consumers:
        read_in = basis.repeat_interleave(width.repeat, 0)
        found[name] = dataclasses.replace(found.get(name, Cut()), read_in=read_in)


def hosted_rows(graph_module: fx.GraphModule, name: str, cut: Cut) -> tuple[Tensor, ...]:
    """The rows [heads, r], among its reduced outputs, of each set of heads that gets identity blocks in a layer."""
    return tuple(
        cut.rows_of(torch.tensor(width.rows[HOSTS[width.kind]], device="cpu").reshape(width.heads, -1))
        for width in graph_record(graph_module).hosted(name)
    )


@dataclass(frozen=True)
class Changed:
    """A width that is narrowed or reordered.

    Attributes:
        curve: None if it keeps its size.
        maps: for heads; None if they keep their size.
        kept: the features that are kept, in their new order; None if the maps combine features.
        order: the same as positions among the kept features; None if they stay in their order.
    """

    width: Width
    size: int
    curve: WidthCurve | None
    maps: WidthMaps | None
    kept: Tensor | None
    order: Tensor | None

    def read_places(self, name: str) -> Tensor:
        """The places of the features that a node reads now among those that it read before."""
        if self.kept is not None:
            return places(self.kept, self.width.read_by(name))
        heads = torch.arange(self.width.heads * self.width.repeat, device="cpu").unsqueeze(1) * self.width.features
        return (heads + torch.arange(self.size, device="cpu")).flatten()

    def narrowed(self, rows: Tensor, name: str) -> Narrowed:
        """Rows [heads, features] of a node of the width."""
        kept = None if self.kept is None else places(self.kept, self.width.held_by(name))
        return Narrowed(rows, None if self.maps is None else self.maps.right, kept)


def changed_widths(record: GraphRecord) -> Iterator[Changed]:
    """The widths of a graph that its allocation narrows, or that get a new order."""
    curves = dict(zip((width.key for width in record.widths), record.width_curves, strict=False))
    for width in record.all_widths:
        size, order = record.size_of(width), record.orders.get(width.key)
        curve = curves.get(width.key) if size < width.features else None
        if curve is None and order is None:
            continue
        kept = None if curve is None else curve.kept(size)
        maps = None if curve is None or kept is not None else curve.maps(size)
        positions = None if order is None else torch.argsort(torch.argsort(order))
        yield Changed(width, size, curve, maps, kept if order is None else order, positions)


def _written(record: GraphRecord, name: str, changed: Mapping[str, Changed]) -> Cut:
    """The parts of a layer's output, some of them narrowed or reordered."""
    written: list[Narrowed] = []
    projected: list[Narrowed] = []
    for width in record.all_widths:
        own = changed.get(width.key)
        for position, producer in enumerate(width.producers):
            if producer != name:
                continue
            queries = width.kind == "queries" and position == 0
            repeat = width.repeat if queries else 1
            rows = torch.tensor(width.rows[position], device="cpu").reshape(width.heads * repeat, -1)
            maps = None if own is None else own.maps
            if own is None or maps is None:
                written.append(Narrowed(rows) if own is None else own.narrowed(rows, name))
                continue
            map_ = maps.left.mT if width.kind == "queries" and position == 1 else maps.right
            written.append(Narrowed(rows, map_.repeat_interleave(repeat, 0)))
            if queries:
                projected.append(Narrowed(rows, (maps.left @ maps.right).repeat_interleave(repeat, 0)))
    rests = dict.fromkeys(reader.rows for reader in record.rests.get(name, ()))
    written += [Narrowed(torch.tensor(rows, device="cpu").unsqueeze(0)) for rows in rests]
    return Cut(written=tuple(written), projected=tuple(projected))
