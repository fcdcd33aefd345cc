"""The sites, and the experts of a site, that too few values have reached in calibration."""

from __future__ import annotations

import dataclasses

from torch import Tensor, fx

from balf_fx.calibration.observers import CovarianceObserver, observer_of
from balf_fx.graph.annotation import annotation, sites
from balf_fx.graph.experts import read_experts
from balf_fx.graph.site import Reason, Refusal, Site

_FEWEST = 4  # ranks for each position that an expert has seen


def too_few(site: Site, count: Tensor) -> list[int]:
    """The experts that have seen too few positions to choose components by: fewer than a quarter of the full rank.

    Args:
        count: [E], the number of positions of each expert.
    """
    fewest = max(site.full_rank // _FEWEST, 1)
    return [expert for expert, seen in enumerate(count.tolist()) if seen < fewest]


def unseen(graph_module: fx.GraphModule) -> dict[str, Refusal]:
    """The refusals of the sites that too few values have reached, by name."""
    found = {}
    for site, nodes in sites(graph_module).items():
        observer = observer_of(graph_module, annotation(nodes[0]).observer, CovarianceObserver)
        refusal = Refusal(site.name, site.kind, Reason.UNSEEN)
        if observer is None or observer.moments is None:
            found[site.name] = refusal
        elif isinstance(observer.moments.count, Tensor):
            few, product = too_few(site, observer.moments.count), read_experts(nodes[0])
            if len(few) == site.groups or (few and not (product is not None and product.rows.splits)):
                found[site.name] = dataclasses.replace(refusal, detail=f"too few for {len(few)} of its experts")
    return found
