"""Moves statistics, curves and solutions to files, from which they are mapped into memory where they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from typing import TypeVar

from torch import Tensor, fx

from balf_fx.calibration.moments import Moments
from balf_fx.calibration.pages import Pages
from balf_fx.calibration.sample import Gradients, Sample
from balf_fx.graph.annotation import annotate, annotation, sites
from balf_fx.graph.curves import RankCurve, Solution, Spectrum
from balf_fx.graph.widths import WidthCurve

_LARGE: Mapping[type, tuple[str, ...]] = {
    Moments: ("scatter",),
    Gradients: ("scatter", "parts"),
    Sample: ("gradients", "moments", "features"),
    Spectrum: ("left", "right"),
    RankCurve: ("spectrum", "parts", "strips", "half"),
    WidthCurve: ("covariances", "left", "right", "half"),
    Solution: ("left", "right"),
}
"""The attributes that are large, or hold what is."""

_T = TypeVar("_T")


def parked(value: _T, pages: Pages) -> _T:
    """Statistics, a curve or a solution with its large tensors in files; the same object if they are there already."""
    if isinstance(value, Tensor):
        return pages.park(value)  # type: ignore[return-value]
    if isinstance(value, tuple):
        return tuple(parked(each, pages) for each in value)  # type: ignore[return-value]
    own = {name: getattr(value, name) for name in _LARGE.get(type(value), ())}
    moved = {name: parked(each, pages) for name, each in own.items()}
    changed = {name: each for name, each in moved.items() if each is not own[name]}
    return dataclasses.replace(value, **changed) if changed else value  # type: ignore[type-var]


def park_curves(graph_module: fx.GraphModule, names: Set[str], pages: Pages) -> None:
    """Move the directions that the ranks of some sites keep."""
    for site, nodes in sites(graph_module).items():
        curve = annotation(nodes[0]).curve
        if site.name in names and curve is not None:
            curve = parked(curve, pages)
            for node in nodes:
                annotate(node, curve=curve)
    pages.release()
