"""Refine the chosen factors by the influence of each weight (AIR, arXiv 2606.19993)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.calibration.moments import Moments
from balf_fx.calibration.observers import CovarianceObserver, InfluenceObserver, observer_of
from balf_fx.calibration.sample import WeightGradients
from balf_fx.checkpoint.journal import NO_JOURNAL, Journal
from balf_fx.distributed.group import ALONE, Group
from balf_fx.errors import OptionError, PassError
from balf_fx.graph.annotation import Annotation, annotate, annotation
from balf_fx.graph.curves import Solution, Spectrum
from balf_fx.graph.expert_factors import keeping
from balf_fx.graph.parameters import grouped_bias, grouped_weight
from balf_fx.graph.site import Site
from balf_fx.passes.base import Pass
from balf_fx.progress import SILENT, Progress
from balf_fx.ranks.influence import Signal, cholesky_root, error_weights, influence, refined_factors

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refine(Pass):
    """Refine the one-shot factors of the chosen ranks, between Allocate and Factorize.

    The defaults are as published, except for `block`. Statistics are centred where Score's were; the mean of the lost
    output is then added to the bias. A site that no gradient has reached and a transposed convolution keep their
    one-shot factors.

    Attributes:
        signal: the measure of influence, "weight_gradient" or "fisher" (`ranks.influence.influence`).
        delta: the strength of the influence in the weights 1 + delta * influence; with 0 the factors stay the one-shot
            optimum.
        limit: the largest influence, as a multiple of the mean influence of the matrix.
        sweeps: the number of passes over all components, each of which solves for every component again.
        block: the number of components solved for together; 1 as published, larger blocks reach a lower loss in less
            time.
        damping: the damping of the inputs' second moment, as a share of its mean eigenvalue.
        dtype: the dtype of the sweeps.
        group: the processes over which the sites are shared out; their statistics are the same.
        progress: shows the progress over the sites.
        journal: has the sites that were solved before a run was killed.
    """

    signal: Signal = "weight_gradient"
    delta: float = 2.0
    limit: float = 100.0
    sweeps: int = 1
    block: int = 16
    damping: float = 1e-6
    dtype: torch.dtype = torch.float32
    group: Group = field(default=ALONE, repr=False, compare=False)
    progress: Progress = field(default=SILENT, repr=False, compare=False)
    journal: Journal = field(default=NO_JOURNAL, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.signal not in get_args(Signal):
            raise OptionError(f"signal must be one of {', '.join(map(repr, get_args(Signal)))}, not {self.signal!r}")
        if self.delta < 0 or self.limit <= 0 or self.damping <= 0:
            raise OptionError("delta must be at least 0, limit and damping must be above 0")
        if self.sweeps < 1 or self.block < 1:
            raise OptionError("sweeps and block must be whole numbers, 1 or more")

    def requires(self, graph_module: fx.GraphModule) -> None:
        for site, nodes in self.require_sites(graph_module).items():
            mark = annotation(nodes[0])
            if mark.choice is None or mark.curve is None:
                raise PassError(f"Refine: site {site.name!r} has no choice; run Score and Allocate first")
            if mark.influence is None and not site.transposed:
                raise PassError(
                    f"Refine: the weight of site {site.name!r} was not observed; use InsertObservers(influence=True)"
                )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = self.require_sites(graph_module)
        items = list(found.items())
        work = [float(_work(site, annotation(nodes[0]))) for site, nodes in items]

        def refined(item: tuple[Site, list[fx.Node]]) -> Solution | None:
            site, nodes = item
            return self._refined(graph_module, site, annotation(nodes[0]))

        for (_, nodes), solution in zip(items, self.group.shared_out(items, work, refined, self.progress), strict=True):
            for node in nodes if solution is not None else ():
                annotate(node, refit=(solution,))
        return PassResult(graph_module, False)

    def _refined(self, graph_module: fx.GraphModule, site: Site, mark: Annotation) -> Solution | None:
        """The refined factors of a site; None if it keeps what it has."""
        rank = None if mark.choice is None else mark.choice.chosen.rank
        observed = _observed(graph_module, mark)
        if rank is None or mark.curve is None:
            return None
        if isinstance(rank, tuple):
            _LOGGER.info("the parts of %s have separate ranks: it keeps its one-shot factors", site.name)
            return None
        if observed is None:
            reason = "it is a transposed convolution" if site.transposed else "no gradient has reached its weight"
            _LOGGER.info("%s keeps its one-shot factors: %s", site.name, reason)
            return None
        solve = partial(self.solve, graph_module, site, mark.curve.spectrum, rank, *observed)
        solution = self.journal.alone.cached(f"layer {site.name}", solve)
        return keeping(solution, grouped_weight(graph_module, site), mark.curve.kept)

    def solve(
        self,
        graph_module: fx.GraphModule,
        site: Site,
        spectrum: Spectrum,
        rank: int,
        moments: Moments,
        gradients: WeightGradients,
    ) -> Solution:
        """Refine one site.

        Args:
            spectrum: the spectrum of the plain output error, which gives the initial factors.
            moments: the moments of the site's input.
            gradients: the gradients of its weight.
        """
        weight, bias = grouped_weight(graph_module, site), grouped_bias(graph_module, site)
        centred = spectrum.mean is not None
        root = cholesky_root(moments.covariance() if centred else moments.second_moment(), self.damping)
        weights = error_weights(influence(gradients, weight, self.signal), self.delta, self.limit)
        start = spectrum.left[..., :rank]
        left, right = refined_factors(weight, root, weights, start, self.sweeps, self.block, self.dtype)
        if centred:
            bias = _with_lost_mean(bias, weight - left @ right, moments.mean)
        return Solution(left, right, bias)


def _work(site: Site, mark: Annotation) -> int:
    """Floating-point operations of one sweep over the components plus the Cholesky factor of the inputs' moment."""
    rank = None if mark.choice is None else mark.choice.chosen.rank
    if not isinstance(rank, int):
        return 0
    return site.groups * site.in_features * (6 * site.out_features * rank + site.in_features**2 // 3)


def _with_lost_mean(bias: Tensor | None, lost: Tensor, mean: Tensor) -> Tensor:
    """b + D E[x] for the part D [G, O, D] of the weight that is lost, [G, O]."""
    shift = (lost @ mean.unsqueeze(-1)).squeeze(-1)
    return shift if bias is None else bias + shift


def _observed(graph_module: fx.GraphModule, mark: Annotation) -> tuple[Moments, WeightGradients] | None:
    """The moments of a site's input and the gradients of its weight, if both are known."""
    inputs = observer_of(graph_module, mark.observer, CovarianceObserver)
    weight = observer_of(graph_module, mark.influence, InfluenceObserver)
    if inputs is None or weight is None:
        return None
    if inputs.side != "input" or inputs.moments is None or weight.gradients is None:
        return None
    return inputs.moments, weight.gradients
