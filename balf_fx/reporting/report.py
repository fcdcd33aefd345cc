"""The compression of a model, site by site and width by width, as readable tables and as plain data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from balf_fx.graph.allocation import Choice
from balf_fx.graph.certificate import Certificate
from balf_fx.graph.curves import EnergyCurve, Rank
from balf_fx.graph.plan import Plan
from balf_fx.graph.timing import Timing


@dataclass(frozen=True)
class SiteRow:
    """One site.

    Attributes:
        out_features, in_features, groups: the original O, D and G; `flops_after` and `params_after` are for the
            reduced sizes of the widths on both sides.
        rank: None if there are no factors, a tuple for one rank per part.
        energy_kept: the share of the output's energy on the calibration data that the rank keeps; losses of widths are
            in their own rows.
        distortion: the mean squared output error, summed over the site's outputs.
        spectrum: the energy that other ranks keep; None in reports of older models.
        form: how a map with a rank is written, "pair", "rows" or "columns", or "blocks" for a dense one with identity
            blocks (`graph.curves.Form`); "" for others.
        full_rank: the full rank of a site without parts, for a kernel that is divided that of its strips; None for
            min(O, D).
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    groups: int
    rank: Rank
    flops_before: int
    flops_after: int
    params_before: int
    params_after: int
    distortion: float
    energy_kept: float
    spectrum: EnergyCurve | None = None
    form: str = ""
    full_rank: int | None = None

    @property
    def shape(self) -> str:
        """The shape as "O x D x groups", for a table."""
        return f"{self.out_features} x {self.in_features} x {self.groups}"

    @property
    def rank_share(self) -> float:
        """The rank as a share of the full rank, over all parts; 1 if it is dense."""
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        full = min(self.out_features // len(ranks), self.in_features)
        if self.full_rank is not None and not isinstance(self.rank, tuple):
            full = self.full_rank
        return sum(full if rank is None else rank for rank in ranks) / (len(ranks) * full)

    @property
    def rank_in_words(self) -> str:
        """The rank for a table or a label: "16", "16+dense+8" for parts, "dense", "blocks" or "narrower"."""
        if self.form == "blocks":
            return "blocks"
        return "narrower" if self.is_only_narrower else _rank_in_words(self.rank)

    @property
    def is_only_narrower(self) -> bool:
        """Whether it has no factors, but is smaller, since its widths are or since it has identity blocks."""
        cheaper = self.flops_after < self.flops_before or self.params_after < self.params_before
        return self.rank is None and cheaper

    @property
    def factor_layers(self) -> tuple[str, ...]:
        """The names of the layers that replaced the site: `name.0`, and `name.1` or one layer for each part."""
        if self.rank is None:
            return ()
        if isinstance(self.rank, tuple):
            parts = (f"{self.name}.1.{index}" for index, rank in enumerate(self.rank) if rank is not None)
            return (f"{self.name}.0", *parts)
        return (f"{self.name}.0", f"{self.name}.1")


@dataclass(frozen=True)
class WidthRow:
    """One width that was narrowed.

    Attributes:
        name: the name of the layer that reads the width, or that outputs the queries.
        kind: "channels", "queries" or "values", as in `graph.widths.Width`.
        features_before, features_after: the number of features of each head.
        heads: the number of heads; 1 for channels.
        energy_kept: the share of the loss of removing all features that is avoided.
    """

    name: str
    kind: str
    features_before: int
    features_after: int
    heads: int
    energy_kept: float


@dataclass(frozen=True)
class RefusedRow:
    """A node with parameters that is not a site, and why."""

    name: str
    kind: str
    reason: str
    flops: int | None


@dataclass(frozen=True)
class Report:
    """The whole model.

    Attributes:
        method, measure, target: how the budget was given; target is None for explicit ranks and energy thresholds.
        flops_before, flops_after: FLOPs of the whole model on the example batch; None if they were not counted.
        captured: how the graph was captured: "symbolic_trace", "export" or "dynamo".
        flops_in_sites: the share of the original FLOPs in sites.
        flops_refused: the share in layers that are not sites, by reason; the rest is in operations without parameters.
        primal, bound, gap: the value of the objective, a lower bound on it for all allocations, and their difference.
        widths: the widths that were narrowed.
        flops_saved_elsewhere, params_saved_elsewhere: what the widths save outside the sites, as in a depthwise
            convolution or an attention product.
        certificate: what was certified about the model's disagreement or divergence; None for a budget.
        timing: what was measured of its time; None unless the budget was one.
        logit_factor: what the logits were multiplied by.
    """

    sites: tuple[SiteRow, ...]
    refused: tuple[RefusedRow, ...]
    method: str
    measure: str
    target: float | None
    flops_before: int | None
    flops_after: int | None
    params_before: int
    params_after: int
    captured: str
    flops_in_sites: float
    flops_refused: dict[str, float]
    primal: float
    bound: float | None
    gap: float | None
    widths: tuple[WidthRow, ...] = ()
    flops_saved_elsewhere: int = 0
    params_saved_elsewhere: int = 0
    certificate: Certificate | None = None
    timing: Timing | None = None
    logit_factor: float = 1.0

    @classmethod
    def of(cls, plan: Plan) -> Report:
        """The report of a plan."""
        allocation, total = plan.allocation, plan.flops or 1
        forms = {layer.name: layer.form for layer in plan.layers if layer.rank is not None or layer.form == "blocks"}
        refused: dict[str, float] = {}
        for refusal, flops in plan.refusals:
            refused[refusal.reason.value] = refused.get(refusal.reason.value, 0.0) + (flops or 0) / total
        return cls(
            sites=tuple(_row(choice, forms.get(choice.site.name, "")) for choice in allocation.choices),
            refused=tuple(RefusedRow(r.name, r.kind, str(r), flops) for r, flops in plan.refusals),
            method=allocation.method,
            measure=allocation.measure,
            target=allocation.target,
            flops_before=plan.flops,
            flops_after=plan.flops_after,
            params_before=plan.params,
            params_after=plan.params_after,
            captured=plan.captured,
            flops_in_sites=sum(choice.dense.flops for choice in allocation.choices) / total,
            flops_refused=refused,
            primal=allocation.primal,
            bound=allocation.bound,
            gap=allocation.gap,
            widths=tuple(
                WidthRow(width.name, width.kind, width.features, width.size, width.heads, width.energy_kept)
                for width in plan.widths
                if width.is_narrower
            ),
            flops_saved_elsewhere=allocation.saved_elsewhere.flops,
            params_saved_elsewhere=allocation.saved_elsewhere.params,
            certificate=plan.certificate,
            timing=plan.timing,
            logit_factor=plan.logit_factor,
        )

    @property
    def flops_kept(self) -> float | None:
        """flops_after / flops_before."""
        if self.flops_before is None or self.flops_after is None:
            return None
        return self.flops_after / self.flops_before if self.flops_before else 1.0

    @property
    def params_kept(self) -> float:
        """params_after / params_before."""
        return self.params_after / self.params_before if self.params_before else 1.0

    @property
    def factor_layers(self) -> tuple[str, ...]:
        """The names of the layers that replaced factorized sites, for `get_submodule`."""
        return tuple(name for row in self.sites for name in row.factor_layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        rows = [{**asdict(row), "shape": row.shape} for row in self.sites]
        return {**asdict(self), "sites": rows, "flops_kept": self.flops_kept, "params_kept": self.params_kept}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        sites = [
            (
                *(row.name, row.kind, row.shape, row.rank_in_words, row.form),
                *numbers(row.flops_before, row.flops_after),
                f"{row.energy_kept:.4f}",
            )
            for row in self.sites
        ]
        headers = ("site", "kind", "O x D x groups", "rank", "form", "FLOPs before", "FLOPs after", "energy kept")
        tables = [_table(headers, sites, texts=5)]
        if self.widths:
            widths = [
                (row.name, row.kind, *numbers(row.features_before, row.features_after, row.heads))
                for row in self.widths
            ]
            tables.append(_table(("width", "kind", "features before", "features after", "heads"), widths, texts=2))
        if self.refused:
            refused = [(row.name, row.kind, row.reason, *numbers(row.flops)) for row in self.refused]
            tables.append(_table(("not a site", "kind", "reason", "FLOPs"), refused, texts=3))
        return "\n\n".join([*tables, "\n".join(self._totals())])

    def _totals(self) -> list[str]:
        lines = []
        if self.flops_before is not None and self.flops_after is not None:
            lines.append(f"FLOPs   {self.flops_before:,} -> {self.flops_after:,} ({self.flops_kept:.2%} kept)")
            refused = "".join(f", {share:.1%} {why}" for why, share in self.flops_refused.items() if share >= 5e-4)
            lines.append(
                f"        {self.flops_in_sites:.1%} in sites{refused}, the rest is in operations without parameters"
            )
        lines.append(f"params  {self.params_before:,} -> {self.params_after:,} ({self.params_kept:.2%} kept)")
        if self.widths:
            before = sum(row.heads * row.features_before for row in self.widths)
            after = sum(row.heads * row.features_after for row in self.widths)
            elsewhere = self.flops_saved_elsewhere
            saved = f", which also save {elsewhere:,} FLOPs outside the sites" if elsewhere else ""
            lines.append(f"widths  {len(self.widths)} narrower, {before:,} -> {after:,} features{saved}")
        if self.logit_factor != 1:
            lines.append(f"logits  multiplied by {self.logit_factor:.3g}, the factor with the least divergence")
        if self.timing is not None:
            lines.append(f"time    {timing_in_words(self.timing)}")
        asked = "no budget" if self.target is None else f"{self.measure} {self.target:g}"
        bound = "" if self.bound is None else f", dual bound {self.bound:.4g}, gap {self.gap:.2g}"
        lines.append(f"budget  {asked}, allocation {self.method}: loss {self.primal:.4g}{bound}")
        if self.certificate is not None:
            limit = f"{self.certificate.mistakes} {self.certificate.limit:g}"
            lines.append(f"limit   {limit}: {certificate_in_words(self.certificate)}")
        return lines


def timing_in_words(timing: Timing) -> str:
    """The times, and where they were measured."""
    where = timing.device if timing.device != "cpu" else f"cpu, {counted(timing.threads, 'thread')}"
    return (
        f"{1e3 * timing.dense:.4g} -> {1e3 * timing.compressed:.4g} ms ({timing.runner}, {where}): "
        f"{timing.measured:.2%} of the original's, {timing.asked:.2%} asked for, {timing.predicted:.2%} predicted, "
        f"{timing.in_sites:.0%} in sites"
    )


def certificate_in_words(certificate: Certificate) -> str:
    """What was observed and certified."""
    on, chosen = f"on {counted(certificate.samples, 'sample')}", certificate.chosen
    if chosen is None:
        found = "no budget keeps it" if certificate.tried else "no budget could be tried"
        return f"{found} {on}, so only what is free was removed"
    certified = f"at most {chosen.bound:.2%} with confidence {certificate.confidence:g}"
    return f"{chosen.observed:.2%} {on}, {certified}; {counted(len(certificate.tried), 'budget')} tried"


def counted(count: int, noun: str) -> str:
    """A number of things in words, such as "1 sample" and "1,000 samples"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def numbers(*values: int | None) -> list[str]:
    """Numbers for cells of a table; empty where one is not known."""
    return ["" if value is None else f"{value:,}" for value in values]


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    """A table whose first columns are texts; nothing is parsed, since a layer may be called 0.10."""
    aligned = ["left"] * texts + ["right"] * (len(headers) - texts)
    return tabulate(rows, headers, disable_numparse=True, colalign=aligned)


def _rank_in_words(rank: Rank) -> str:
    if isinstance(rank, tuple):
        return "+".join(map(_rank_in_words, rank))
    return "dense" if rank is None else str(rank)


def _row(choice: Choice, form: str) -> SiteRow:
    site, chosen, dense = choice.site, choice.chosen, choice.dense
    return SiteRow(
        name=site.name,
        kind=site.kind,
        out_features=site.out_features,
        in_features=site.in_features,
        groups=site.groups,
        rank=chosen.rank,
        flops_before=dense.flops,
        flops_after=chosen.flops,
        params_before=dense.params,
        params_after=chosen.params,
        distortion=chosen.distortion,
        energy_kept=choice.energy_kept,
        spectrum=choice.spectrum,
        form=form,
        full_rank=site.full_rank,
    )
