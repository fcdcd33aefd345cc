"""Estimates the work at each node of a refit, so that progress is shown in proportion to time.

All numbers are rough estimates in floating-point operations; only their ratios matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import fx

from balf_fx.graph.annotation import annotation
from balf_fx.graph.curves import Rank
from balf_fx.graph.site import Site
from balf_fx.refit.windows import grid_count, pixel_steps

_ELEMENT = 100  # operations in the time in which an element of a value is read, changed and written
_FACTORS = 5  # Cholesky factors: about four of the training share and one of all samples
_DOUBLE = 2  # operations of single precision in the time of one of double precision

Shape = tuple[int, int, int]
"""The shape of the map that is solved for: groups G, outputs O and columns D."""


def solved_shape(site: Site, rank: Rank, whole: bool) -> Shape:
    """The shape of the map that is solved for, where that is the whole layer or its left factors."""
    if whole:
        return site.groups, site.out_features, site.in_features
    ranks = rank if isinstance(rank, tuple) else (rank,)
    return site.groups, site.out_features, sum(each for each in ranks if each is not None)


def node_work(nodes: Sequence[fx.Node], layers: Mapping[fx.Node, tuple[Site, Shape]], samples: int) -> list[float]:
    """The work at each node: the forward passes of both models, and the regression where a layer is solved.

    Args:
        layers: the layers that are solved, each with the shape of the map that is solved for.
        samples: the number of samples in all batches.
    """
    shapes = [shape for node in nodes if node.op == "placeholder" and (shape := annotation(node).shape)]
    calls = samples / max((shape[0] for shape in shapes), default=1)
    return [_forward(node, calls) + (_layer(node, *layers[node], samples) if node in layers else 0.0) for node in nodes]


def _forward(node: fx.Node, calls: float) -> float:
    mark = annotation(node)
    return 2 * calls * ((mark.flops or 0) + _ELEMENT * math.prod(mark.shape or ()))


def _layer(node: fx.Node, site: Site, shape: Shape, samples: int) -> float:
    output = annotation(node).shape or ()
    sizes = output[2:] if site.conv is not None else output[1:-1]
    steps = pixel_steps(samples, sizes, shape[2]) if site.conv is not None and sizes else (1,) * len(sizes)
    return regression_work(shape, samples * grid_count(sizes, steps))


def regression_work(shape: Shape, positions: int) -> float:
    """The work of the sums over positions and of the linear algebra on them, D^3 / 3 for each Cholesky factor."""
    groups, outputs, inputs = shape
    sums = positions * (inputs**2 + 4 * inputs * outputs + _ELEMENT * (inputs + outputs))
    solving = _FACTORS * _DOUBLE * inputs**2 * (inputs / 3 + 4 * outputs)
    return groups * (sums + solving)
