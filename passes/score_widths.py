"""Turn statistics into what each size of each width loses."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.linalg import damped_roots, spectrum_from_output
from balf_fx.observers import Gradients, SensitivityObserver
from balf_fx.passes.base import Pass
from balf_fx.passes.score import grouped_bias, grouped_weight
from balf_fx.sites import Site, annotation, graph_record, record_graph
from balf_fx.widths import Width, WidthCurve, conditioned, eliminate

_LOGGER = logging.getLogger(__name__)
_BASIS_DAMPING = 1e-3  # of a metric that is made of damped ones


@dataclass(frozen=True)
class ScoreWidths(Pass):
    """Score every size of every width, where gradients have been observed.

    Errors are measured at the outputs of the layers that read the features, of queries at the queries themselves, in
    the same metric and unit as the ranks of these layers (`Score`), so that the two compare.

    Attributes:
        damping: as in `Score`.
    """

    damping: float = 0.1

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        nodes = {node.name: node for node in graph_module.graph.nodes}
        record = graph_record(graph_module)
        curves = tuple(self._score(graph_module, nodes, width) for width in record.widths)
        record_graph(graph_module, width_curves=curves)
        return PassResult(graph_module, False)

    def _score(self, graph_module: fx.GraphModule, nodes: dict[str, fx.Node], width: Width) -> WidthCurve | None:
        layers = [nodes[name] for name in width.consumers or width.producers[:1]]
        seen = [_Layer.read(graph_module, node, self.damping) for node in layers]
        known = [layer for layer in seen if layer is not None]
        if len(known) < len(layers):
            _LOGGER.info("no gradient has reached the layers around %s: it keeps its width", width.name)
            return None
        if width.kind == "channels":
            return _score_channels(known)
        return _score_values(width, known[0]) if width.kind == "values" else _score_queries(width, known[0], self.damping)


@dataclass(frozen=True)
class _Layer:
    """A layer and what was observed at it.

    Attributes:
        reduced: [m, D], R of W = Q R on the input side, W itself on the output side: errors of S R x are what counts.
        root: S [m, m].
        unit: the loss of an error of 1 in the metric S S.
    """

    site: Site
    observer: SensitivityObserver
    gradients: Gradients
    weight: Tensor
    bias: Tensor | None
    reduced: Tensor
    root: Tensor
    unit: float

    @classmethod
    def read(cls, graph_module: fx.GraphModule, node: fx.Node, damping: float) -> _Layer | None:
        mark = annotation(node)
        observer = None if mark.sensitivity is None else graph_module.get_submodule(mark.sensitivity)
        if mark.site is None or not isinstance(observer, SensitivityObserver):
            return None
        if observer.gradients is None or observer.moments is None:
            return None
        if observer.wants_features and observer.features is None:
            return None
        weight = grouped_weight(graph_module, mark.site)[0]
        bias = grouped_bias(graph_module, mark.site)
        reduced = weight if mark.site.side == "output" else torch.linalg.qr(weight)[1]
        root = damped_roots(observer.gradients.scatter, damping)[0][0]
        unit = 0.5 * observer.gradients.total / observer.gradients.samples / len(root)
        return cls(mark.site, observer, observer.gradients, weight, None if bias is None else bias[0], reduced, root, unit)

    def metric(self) -> Tensor:
        """A [F, F]: what an error in the input's features costs, taps of a kernel as if independent."""
        seen = self.root @ self.reduced  # [m, F * taps]
        taps = 1 if self.site.conv is None else _taps(self.site)
        by_tap = seen.reshape(len(seen), -1, taps).permute(2, 0, 1)
        return (by_tap.mT @ by_tap).sum(0)

    def output_moment(self) -> Tensor:
        """E[y y^T], [O, O] float64, weighted as the observer weighs."""
        moments = self.observer.moments
        if moments is None:
            raise ValueError("an observer that has seen nothing")
        if self.site.side == "output":
            return moments.second_moment()[0]
        mean = self.weight @ moments.mean[0]
        mean = mean if self.bias is None else mean + self.bias
        return self.weight @ moments.covariance()[0] @ self.weight.mT + torch.outer(mean, mean)

    def gradient_block(self, rows: Tensor) -> Tensor:
        """E[g g^T], [F, F], of some rows of the output, in the unit of the site's metric."""
        scatter = self.gradients.scatter[0]
        unit = scatter.diagonal().mean()
        parts, size = self.site.parts, self.site.out_features // self.site.parts
        own = torch.unique(rows // size)
        if self.gradients.parts is not None and len(own) == 1:
            block = self.gradients.parts[int(own)][rows % size][:, rows % size]
        elif self.site.side == "output":
            block = scatter[rows][:, rows]
        else:
            basis = torch.linalg.qr(self.weight)[0][rows]
            block = basis @ scatter @ basis.mT
        del parts
        return block / unit if unit > 0 else torch.zeros_like(block)


def _taps(site: Site) -> int:
    return 1 if site.conv is None else int(torch.Size(site.conv.kernel_size).numel())


def _score_channels(readers: list[_Layer]) -> WidthCurve:
    seen = [layer.observer.features for layer in readers]
    covariances = [conditioned(moments.covariance()[0]) for moments in seen if moments is not None]
    units = [layer.unit / readers[0].unit if readers[0].unit > 0 else 1.0 for layer in readers]
    metrics = [unit * layer.metric() for unit, layer in zip(units, readers, strict=True)]
    order, errors = eliminate(covariances, metrics)
    means = tuple(moments.mean[0] for moments in seen if moments is not None)
    return WidthCurve(tuple(errors), readers[0].unit * errors[0], order, tuple(covariances), means=means)


def _score_values(width: Width, reader: _Layer) -> WidthCurve | None:
    features = reader.observer.features
    if features is None:
        return None
    covariance, seen = features.covariance()[0], reader.root @ reader.reduced
    blocks = torch.arange(width.heads * width.repeat * width.features).reshape(width.heads, width.repeat, -1)
    pooled = torch.stack([sum_of(covariance[rows][:, rows] for rows in head) for head in blocks])
    metrics = torch.stack([sum_of(seen[:, rows].mT @ seen[:, rows] for rows in head) for head in blocks]) / width.repeat
    unit = metrics.diagonal(dim1=-2, dim2=-1).mean(-1)
    return _basis_curve(pooled, damped_roots(metrics, _BASIS_DAMPING), unit, reader.unit, (features.mean[0],))


def _score_queries(width: Width, writer: _Layer, damping: float) -> WidthCurve:
    moment = writer.output_moment()
    heads = torch.tensor(width.rows[0]).reshape(width.heads, width.repeat, width.features)
    pooled = torch.stack([sum_of(moment[rows][:, rows] for rows in head) for head in heads])
    blocks = torch.stack([sum_of(writer.gradient_block(rows) for rows in head) for head in heads]) / width.repeat
    unit = torch.ones(len(blocks), 1, dtype=blocks.dtype)
    return _basis_curve(pooled, damped_roots(blocks, damping, unit), unit[:, 0], writer.unit, ())


def _basis_curve(
    moments: Tensor, roots: tuple[Tensor, Tensor], units: Tensor, loss: float, means: tuple[Tensor, ...]
) -> WidthCurve:
    """The curve of heads that may choose their basis, each head its own, all of one size.

    Args:
        loss: of an error of 1.
    """
    spectrum = spectrum_from_output(moments, None, roots)
    energies = (spectrum.energies * units.unsqueeze(-1)).sum(0)
    tail = [*energies.flip(0).cumsum(0).flip(0).tolist(), 0.0]
    return WidthCurve(tuple(tail), loss * tail[0], left=spectrum.left, right=spectrum.right, means=means)


def sum_of(tensors: object) -> Tensor:
    """The sum of several matrices."""
    return torch.stack(list(tensors)).sum(0)  # type: ignore[call-overload]
