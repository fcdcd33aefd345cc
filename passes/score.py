"""Turn each site's statistics and weight into a spectrum and a distortion / cost curve."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.calibration.coverage import too_few
from balf_fx.calibration.freed import give_back
from balf_fx.calibration.moments import Moments
from balf_fx.calibration.observers import CovarianceObserver, SensitivityObserver, observer_of
from balf_fx.calibration.sample import Gradients, Sample
from balf_fx.distributed.group import ALONE, Group
from balf_fx.errors import NotCalibratedError, OptionError, PassError
from balf_fx.graph.annotation import annotate, annotation, graph_record
from balf_fx.graph.curves import Divided, RankCurve, Spectrum
from balf_fx.graph.experts import read_experts
from balf_fx.graph.flops import flops_and_outputs
from balf_fx.graph.parameters import fingerprint, grouped_bias, grouped_weight
from balf_fx.graph.site import Side, Site
from balf_fx.passes.base import Pass, scored_alike
from balf_fx.progress import SILENT, Progress
from balf_fx.ranks.costs import rank_curve
from balf_fx.ranks.divided import moment_of_strips, strips_of, strips_spectrum
from balf_fx.ranks.spectra import (
    convex_energies,
    damped,
    damped_roots,
    diagonal_blocks,
    held_out_errors,
    in_parts,
    lifted,
    shared_energies,
    spectrum_from_input,
    spectrum_from_output,
    spectrum_from_weight,
    thin_qr,
    thin_triangle,
)

Factors = Literal["sensitivity", "activations", "air", "svd"]


_LOGGER = logging.getLogger(__name__)
_ENOUGH = 4  # positions for each value of a strip; fewer do not show which values matter


@dataclass(frozen=True)
class Observed:
    """The calibration statistics of a site.

    Attributes:
        moments: moments of the site's input or output; None to score the weight alone.
        side: the side of the site at which the moments were taken.
        gradients: gradients at the site's output; None for the plain output error.
        halves: statistics of each half of the samples. The spectrum of one half is evaluated on the other, so that the
            energies are the error that a rank saves on samples that were not used to choose it.
        parts: the moments of each part (`calibration.sample.Sample`).
        kept: the FLOPs of each expert that keeps its matrix, since it has seen too few positions.
    """

    moments: Moments | None
    side: Side
    gradients: Gradients | None = None
    halves: tuple[Sample, ...] = ()
    parts: Moments | None = None
    kept: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Score(Pass):
    """Score every candidate rank of every site.

    Attributes:
        factors: "activations" minimises the output error over the calibration data. "sensitivity" weights that error
            by the gradients of the loss where they are known, and is the same as "activations" elsewhere. "air" is
            "activations" for each site as a whole, which `Refine` then refines. "svd" truncates the weight alone and
            needs no observers.
        centred: whether to use covariances and add the mean of the dropped part to the bias; False uses uncentred
            second moments and leaves the bias unchanged, as BALF (arXiv 2509.25136) does.
        split: whether the parts of a fused projection may have separate factors where that is better.
        damping: the value added to the eigenvalues of the gradients' second moment, as a share of their mean.
        divisions: how the kernel of a convolution may be divided between its factors where that loses less, with
            factors by statistics (`ranks.divided`); or how that of each site is.
        by_time: whether `Time` decides among several, since less is lost for the same time.
        only: the names of the sites to score; None for all.
        group: the processes over which the sites are shared out; their statistics are the same.
        progress: shows the progress over the sites.

    A site whose statistics and options have not changed since its last score is not scored again.
    """

    factors: Factors = "activations"
    centred: bool = True
    split: bool = True
    damping: float = 0.1
    divisions: Collection[Divided] | Mapping[str, Divided | None] = ()
    by_time: bool = False
    only: Collection[str] | None = None
    group: Group = field(default=ALONE, repr=False, compare=False)
    progress: Progress = field(default=SILENT, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.factors not in get_args(Factors):
            raise OptionError(f"factors must be one of {', '.join(map(repr, get_args(Factors)))}, not {self.factors!r}")

    def requires(self, graph_module: fx.GraphModule) -> None:
        for site, nodes in self._sites(graph_module).items():
            if self.factors != "svd":
                self._observed(graph_module, nodes[0], site)
            if self.factors == "air" and annotation(nodes[0]).influence is None and not site.transposed:
                raise NotCalibratedError(
                    f"factors='air' needs the gradients of weights, and that of site {site.name!r} was not observed: "
                    "pass factors='air' to balf_fx.prepare too, or use InsertObservers(influence=True) in your passes"
                )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = self._sites(graph_module)
        blocks = {site: block_entries(graph_module, nodes[0]) for site, nodes in found.items()}
        scored_with, changed = {}, []
        for site, nodes in found.items():
            plain = replace(site, divided=None)
            options = (self.factors, self.centred, self.split, self.damping, self.divisions, self.by_time)
            mark, own = annotation(nodes[0]), self._statistics(graph_module, nodes[0], site)
            scored_with[site] = ((*options, plain, blocks[site], mark.calls), *own)
            if not scored_alike(mark.scored_with, scored_with[site]):
                changed.append(site)

        def curves_of(site: Site) -> list[tuple[Site, RankCurve]]:
            plain, nodes = replace(site, divided=None), found[site]
            seen = self._seen(graph_module, nodes[0], site)
            curve = self.score(graph_module, plain, seen, flops_and_outputs(nodes), blocks[site])
            forms = self._forms(graph_module, nodes, plain, curve, seen)
            give_back(freed=site.numel)
            return forms

        work = [float(site.full_rank) ** 3 * site.groups for site in changed]
        curves = self.group.shared_out(changed, work, curves_of, self.progress)
        for site, (chosen, *others) in zip(changed, curves, strict=True):
            scored = {"scored_with": scored_with[site], "fingerprint": fingerprint(graph_module, site)}
            for node in found[site]:
                annotate(node, site=chosen[0], curve=chosen[1], others=tuple(others), **scored)
        return PassResult(graph_module, False)

    def _sites(self, graph_module: fx.GraphModule) -> dict[Site, list[fx.Node]]:
        """The sites to score."""
        found = self.require_sites(graph_module)
        return {site: nodes for site, nodes in found.items() if self.only is None or site.name in self.only}

    def score(
        self, graph_module: fx.GraphModule, site: Site, seen: Observed, cost: tuple[int, int], blocks: int = 0
    ) -> RankCurve:
        """Score one site.

        Args:
            cost: FLOPs and number of output elements, summed over all uses of the site.
            blocks: as in `ranks.costs.rank_curve`.
        """
        gradients, centred = seen.gradients, self.centred and not site.has_experts
        roots = None if gradients is None else damped_roots(gradients.scatter, self.damping)
        spectrum = _spectrum(graph_module, site, seen, centred, 1, roots)
        parts, half = None, None
        if self.split and site.parts > 1 and not site.keeps_rank and self.factors != "air":
            roots = None if gradients is None else self._parts_roots(graph_module, site, gradients)
            parts = _spectrum(graph_module, site, seen, self.centred, site.parts, roots)
        if gradients is not None and len(seen.halves) == 2:
            weight, bias = grouped_weight(graph_module, site), grouped_bias(graph_module, site)
            held_out = partial(self._held_out, site, weight, bias, seen.halves, gradients.unit)
            unseen, half = held_out(1)
            spectrum, half_parts = replace(spectrum, energies=unseen, fitted=spectrum.energies), None
            if parts is not None and gradients.parts is not None:
                unseen, half_parts = held_out(site.parts)
                parts = replace(parts, energies=unseen, fitted=parts.energies)
        if gradients is not None and not site.has_experts:  # groups matter as much as their gradients are large
            unit = gradients.unit.mean()
            scale = gradients.unit / unit if unit > 0 else 1.0
            spectrum = spectrum.rescaled(lambda energies: energies * scale)
        if site.has_experts and seen.moments is not None:
            count, kept = seen.moments.count, list(seen.kept)
            spectrum = spectrum.rescaled(lambda energies: shared_energies(energies, count, kept))
        curve = rank_curve(site, spectrum, *cost, parts, seen.kept, blocks)
        if gradients is not None:
            curve = replace(curve, loss=gradients.loss(spectrum.energies, site.has_experts))
        if half is None or site.has_experts or not curve.fits_samples:  # half an expert's rows are too few
            return curve
        if site.side == "input":
            half = lifted(half, weight)
            half_parts = half_parts and lifted(half_parts, in_parts(weight, site.parts))
        return replace(curve, half=replace(curve, spectrum=half, parts=half_parts or parts))

    def _forms(
        self, graph_module: fx.GraphModule, nodes: Sequence[fx.Node], site: Site, curve: RankCurve, seen: Observed
    ) -> list[tuple[Site, RankCurve]]:
        """The site and its curve in the form that loses least at half of its FLOPs; in all forms with `by_time`."""
        planned = isinstance(self.divisions, Mapping)
        wanted = (self.divisions.get(site.name),) if isinstance(self.divisions, Mapping) else self.divisions
        observer, forms = observer_of(graph_module, annotation(nodes[0]).strips, CovarianceObserver), [(site, curve)]
        observed = observer is not None and not self.by_time  # perhaps single pixels alone
        for division in site.divisions:
            thin = replace(site, divided=division)
            moments = _of_strips(observer, thin) if division in wanted else None
            if moments is None and observed and division == "separable" and division in wanted:
                raise _unobserved(site)
            if moments is not None and (planned or float(moments.count) >= _ENOUGH * thin.strips.in_features):
                strips = self._strips(graph_module, thin, moments, seen.gradients, curve.energy)
                found = rank_curve(thin, strips, *flops_and_outputs(nodes))
                forms.append((thin, replace(curve, candidates=found.candidates, strips=strips)))
        if planned and forms[-1][0].divided not in wanted:
            raise _unobserved(site)
        if planned:
            return forms[-1:]
        return forms if self.by_time else [min(forms, key=lambda form: form[1].least_at_half("flops"))]

    def _strips(
        self,
        graph_module: fx.GraphModule,
        site: Site,
        moments: Moments,
        gradients: Gradients | None,
        energy: float,
    ) -> Spectrum:
        """The spectrum of a site for strips, with energies scaled to the energy of its output where that is larger.

        Where it is smaller, as with differences of pixels, the strips cancel each other. What a rank loses of them is
        less alike at neighbouring pixels, so that it does not.
        """
        matrix = strips_of(grouped_weight(graph_module, site), site.factor_taps)
        metric, energy_metric = None, None
        if gradients is not None:
            metric, energy_metric = (damped(gradients.scatter, share, gradients.unit) for share in (self.damping, 0.0))
        moment = moments.covariance() if self.centred else moments.second_moment()
        mean = moments.mean if self.centred else None
        found = strips_spectrum(matrix, moment, mean, site.factor_taps[1], metric, energy_metric)
        total, size = float(found.energies.sum()), min(matrix.shape[1:])  # beyond it, nothing is kept
        energies = found.energies[:, :size] * (max(energy / total, 1.0) if total > 0 else 0.0)
        return Spectrum(energies, found.left[..., :size], mean, found.maps(size)[1])

    def _statistics(self, graph_module: fx.GraphModule, node: fx.Node, site: Site) -> tuple[Any, ...]:
        """What `_seen` is made of: the same objects, as long as nothing is added to them."""
        if self.factors == "svd":
            return (None,)
        observer = observer_of(graph_module, annotation(node).sensitivity, SensitivityObserver)
        halves = observer.halves if self.factors == "sensitivity" and observer is not None else ()
        return (self._observed(graph_module, node, site)[0], *halves)

    def _seen(self, graph_module: fx.GraphModule, node: fx.Node, site: Site) -> Observed:
        """The statistics that the chosen factors need."""
        if self.factors == "svd":
            return Observed(None, site.side)
        moments, side = self._observed(graph_module, node, site)
        kept = _kept(node, site, moments)
        sample, halves = self._sensitivity(graph_module, node) if self.factors == "sensitivity" else (None, ())
        if sample is None:
            return Observed(moments, side, kept=kept)
        samples = sample.gradients.samples / max(annotation(node).calls, 1)  # counted in every call
        gradients = replace(sample.gradients, samples=samples)
        return Observed(sample.moments, site.side, gradients, halves, sample.parts, kept)

    def _parts_roots(
        self, graph_module: fx.GraphModule, site: Site, gradients: Gradients
    ) -> tuple[Tensor, Tensor] | None:
        """Roots of the parts' metrics in the unit of the whole site, so that the energies of both are comparable."""
        if gradients.parts is None:
            return None
        own = gradients.parts
        if site.side == "input":
            basis = thin_qr(in_parts(grouped_weight(graph_module, site), site.parts))[0]
            own = basis.mT @ own @ basis
        return damped_roots(own, self.damping, gradients.unit)

    def _held_out(
        self, site: Site, weight: Tensor, bias: Tensor | None, halves: Sequence[Sample], unit: Tensor, parts: int
    ) -> tuple[Tensor, Spectrum]:
        """The energies of each half's spectrum on the other half, averaged; the first one's, on the input side of R x.

        Damping steadies a spectrum where gradients are few. The error is measured without it.
        """
        centred = self.centred and not site.has_experts
        thin: tuple[Tensor | None, Tensor] | None = None
        if site.side == "input":  # where there are no parts, gradients are in the basis Q
            thin = (None, thin_triangle(weight)) if parts == 1 else thin_qr(in_parts(weight, parts))
        seen = [_coordinates(thin, bias, half, centred, parts) for half in halves]
        # Second moments of gradients are sums over samples, and the unit is that of both halves together.
        total = sum(half.gradients.samples for half in halves)
        units = [unit * (half.gradients.samples / total) for half in halves]
        if site.has_experts:  # each with another number of positions in either half
            units = [half.gradients.unit for half in halves]
        spectra, errors = [], []
        for (own, own_unit), (other, other_unit) in itertools.permutations(zip(seen, units, strict=True)):
            spectra.append(spectrum_from_output(*own[:2], damped_roots(own[2], self.damping, own_unit)))
            errors.append(held_out_errors(spectra[-1], *other[:2], damped(other[2], 0.0, other_unit)))
        return convex_energies((errors[0] + errors[1]) / 2), spectra[0]

    def _sensitivity(self, graph_module: fx.GraphModule, node: fx.Node) -> tuple[Sample | None, tuple[Sample, ...]]:
        """The statistics of all samples, and of each half of them."""
        observer = observer_of(graph_module, annotation(node).sensitivity, SensitivityObserver)
        sample = None if observer is None else observer.sample
        if observer is not None and sample is not None:
            return sample, tuple(half for half in observer.halves if half is not None)
        _LOGGER.info("no gradient has reached %s: its factors minimise the plain output error", node.name)
        return None, ()

    def _observed(self, graph_module: fx.GraphModule, node: fx.Node, site: Site) -> tuple[Moments, Side]:
        observer = observer_of(graph_module, annotation(node).observer, CovarianceObserver)
        if observer is None:
            raise PassError(
                f"Score: site {site.name!r} has no observer; run InsertObservers first, or use factors='svd'"
            )
        if observer.moments is None:
            raise NotCalibratedError(
                f"no calibration data has reached site {site.name!r}: call the prepared graph on a few batches first"
            )
        return observer.moments, observer.side


def _unobserved(site: Site) -> NotCalibratedError:
    return NotCalibratedError(
        f"the kernel of site {site.name!r} may be divided, but its strips were not observed: pass separable=True to "
        "balf_fx.prepare, too"
    )


def _of_strips(observer: CovarianceObserver | None, site: Site) -> Moments | None:
    """The moments of the strips that a site reads, also from longer ones; None if they were not observed."""
    own = site.factor_taps[0]
    if observer is None or observer.moments is None or observer.site.taps % own:
        return None
    moments, seen = observer.moments, observer.site.taps // own
    if seen == 1:
        return moments
    mean = moments.mean.reshape(1, -1, seen).mean(-1)
    return Moments(moments.count, mean, moment_of_strips(moments.scatter, (own, seen)))


def block_entries(graph_module: fx.GraphModule, node: fx.Node) -> int:
    """The number of entries in blocks of a layer's weight that a change of basis can turn into the identity."""
    return sum(width.heads * width.features**2 for width in graph_record(graph_module).hosted(node.name))


def _kept(node: fx.Node, site: Site, moments: Moments) -> Mapping[int, int]:
    """The FLOPs of each expert that keeps its matrix."""
    if not isinstance(moments.count, Tensor):
        return {}
    product = read_experts(node)
    loads = product.loads if product is not None and product.loads else (0,) * site.groups
    per_row = (annotation(node).flops or 0) // max(sum(loads), 1)
    return {expert: per_row * loads[expert] for expert in too_few(site, moments.count)}


def _spectrum(
    graph_module: fx.GraphModule,
    site: Site,
    seen: Observed,
    centred: bool,
    parts: int,
    roots: tuple[Tensor, Tensor] | None,
) -> Spectrum:
    """The spectrum of the site as a whole or, with `parts` above 1, of each of its parts."""
    moments = seen.parts if parts > 1 and seen.parts is not None else seen.moments
    if moments is None:
        return spectrum_from_weight(in_parts(grouped_weight(graph_module, site), parts))
    if seen.side == "input":
        moment = moments.covariance() if centred else moments.second_moment()
        mean = moments.mean if centred else None
        return spectrum_from_input(in_parts(grouped_weight(graph_module, site), parts), moment, mean, roots)
    bias = grouped_bias(graph_module, site)
    moment = moments.covariance() if centred else moments.second_moment(bias)
    mean = in_parts(moments.mean if bias is None else moments.mean - bias, parts)
    return spectrum_from_output(diagonal_blocks(moment, parts), mean if centred else None, roots)


def _coordinates(
    thin: tuple[Tensor | None, Tensor] | None, bias: Tensor | None, sample: Sample, centred: bool, parts: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Moment and mean of W x, and E[g g^T].

    Args:
        thin: Q and R of W = Q R where statistics are on the input side: all are in the basis Q; None for Q where the
            gradients already are.
    """
    gradient = sample.gradients.scatter
    if parts > 1 and sample.gradients.parts is not None:
        gradient = sample.gradients.parts
    moments = sample.parts if parts > 1 and sample.parts is not None else sample.moments
    if thin is not None:
        basis, reduced = thin
        gradient = gradient if basis is None else basis.mT @ gradient @ basis
        moment = moments.covariance() if centred else moments.second_moment()
        mean = (reduced @ moments.mean.unsqueeze(-1)).squeeze(-1)
        return reduced @ moment @ reduced.mT, mean if centred else None, gradient
    moment = moments.covariance() if centred else moments.second_moment(bias)
    mean = in_parts(moments.mean if bias is None else moments.mean - bias, parts)
    return diagonal_blocks(moment, parts), mean if centred else None, gradient
