"""Plans: the compression of a model as plain data, which can be applied to a model of the same architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import fx, nn

from balf_fx.errors import PassError, PlanError
from balf_fx.graph.allocation import Allocation, Choice
from balf_fx.graph.annotation import META_KEY, GraphRecord, Origin, Replaced
from balf_fx.graph.certificate import Certificate, Tried
from balf_fx.graph.curves import Candidate, Cost, Divided, EnergyCurve, Measure, Rank
from balf_fx.graph.fingerprint import Fingerprint
from balf_fx.graph.record_types import check_types
from balf_fx.graph.replacements import Recipe
from balf_fx.graph.site import ConvGeometry, Reason, Refusal, Site
from balf_fx.graph.timing import Timing
from balf_fx.version import __version__

FORMAT = 11
"""The format of written plans, increased when older versions could not read them."""

PLAN_ATTRIBUTE = "balf_plan"
"""The attribute of a finished model that holds its plan, like `meta`: copies keep `meta`, pickles attributes."""


@dataclass(frozen=True)
class PlannedWidth:
    """A width that was narrowed or reordered.

    Attributes:
        name, kind: as in `graph.widths.Width`.
        layers: the names of the layers on both sides.
        features, size: the number of features of each head, before and after.
        heads: the number of heads; 1 for channels.
        energy_kept: the share of the loss of removing all features that is avoided.
        kept: the features that are kept, in their new order, for channels; None if the new features are combinations of
            the old ones.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    features: int
    size: int
    heads: int
    energy_kept: float
    kept: tuple[int, ...] | None

    @property
    def is_narrower(self) -> bool:
        """Whether it has fewer features than before."""
        return self.size < self.features

    @property
    def key(self) -> str:
        """The key of the width, as in `graph.widths.Width.key`."""
        return f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Plan:
    """Ranks and sizes of one compressed model.

    Attributes:
        allocation: the solution of the budget.
        flops, params: the cost of the whole original model; flops is None if not counted.
        params_after: the parameters of the whole compressed model.
        captured: how the graph was captured: "symbolic_trace", "export" or "dynamo".
        refusals: layers that are not sites, with their FLOPs.
        origin: how the graph was captured and normalised.
        layers: the layers that were replaced, with fingerprints of the original weights.
        widths: the widths that were narrowed or reordered.
        versions: the versions of balf_fx and torch.
        modules: what stands in place of which modules of the user's model (`graph.replacements`), by path; None where
            the result is a graph.
        certificate: what was certified about the disagreement or divergence of the model; None for a budget.
        timing: what was measured of its time; None unless the budget was one.
        logit_factor: what the logits were multiplied by (`calibration.temperature`).
    """

    allocation: Allocation
    flops: int | None
    params: int
    params_after: int
    captured: str
    refusals: tuple[tuple[Refusal, int | None], ...]
    origin: Origin
    layers: tuple[Replaced, ...] = ()
    widths: tuple[PlannedWidth, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: _versions())
    modules: Mapping[str, Recipe] | None = None
    certificate: Certificate | None = None
    timing: Timing | None = None
    logit_factor: float = 1.0

    @classmethod
    def of(cls, compressed: nn.Module) -> Plan:
        """The plan of a graph.

        Args:
            compressed: the result of `compile`, `convert` or `load`, or a graph after `passes.Allocate`.

        Raises:
            PassError: the module has no plan.
        """
        meta = compressed.meta if isinstance(compressed, fx.GraphModule) else {}
        found = meta.get(META_KEY, getattr(compressed, PLAN_ATTRIBUTE, None))
        if isinstance(found, GraphRecord) and found.allocation is not None:
            return plan_of_records([found], found.allocation)
        if isinstance(found, Mapping):
            return cls.from_dict(found)
        raise PassError("there is no plan and nothing to report: pass the result of balf_fx.compile, convert or load")

    @property
    def divided(self) -> dict[str, Divided | None]:
        """How the kernel of each site is divided between its factors."""
        return {choice.site.name: choice.site.divided for choice in self.allocation.choices}

    @property
    def divisions(self) -> tuple[Divided, ...]:
        """All ways in which kernels are divided."""
        return tuple(sorted({found for found in self.divided.values() if found is not None}))

    @property
    def ranks(self) -> dict[str, Rank]:
        """{site: rank}, None for dense, as in the option `allocation`."""
        return {choice.site.name: choice.chosen.rank for choice in self.allocation.choices}

    def of_one_call(self, calls: int) -> Plan:
        """The plan with the mean FLOPs of one call of the model, in place of those of several calls."""
        if calls == 1:
            return self
        elsewhere = replace(self.allocation.saved_elsewhere, flops=self.allocation.saved_elsewhere.flops // calls)
        choices = tuple(choice.scaled(1, calls) for choice in self.allocation.choices)
        return replace(
            self,
            allocation=replace(self.allocation, choices=choices, saved_elsewhere=elsewhere),
            flops=None if self.flops is None else self.flops // calls,
            refusals=tuple((each, None if flops is None else flops // calls) for each, flops in self.refusals),
        )

    @property
    def flops_after(self) -> int | None:
        """FLOPs of the whole compressed model."""
        if self.flops is None:
            return None
        saved = sum(choice.dense.flops - choice.chosen.flops for choice in self.allocation.choices)
        return self.flops - saved - self.allocation.saved_elsewhere.flops

    @property
    def flops_kept(self) -> float | None:
        """flops_after / flops."""
        if self.flops is None or self.flops_after is None:
            return None
        return self.flops_after / self.flops if self.flops else 1.0

    @property
    def params_kept(self) -> float:
        """params_after / params."""
        return self.params_after / self.params if self.params else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data for JSON."""
        data = {"format": FORMAT, **asdict(self)}
        for refusal, _ in data["refusals"]:
            refusal["reason"] = refusal["reason"].value
        return data

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            PlanError: the data is not a plan, or a plan of another version.
        """
        if not isinstance(data, Mapping) or "format" not in data:
            raise PlanError("this is not a plan of balf_fx: it has no format")
        if data["format"] != FORMAT:
            raise PlanError(
                f"the plan has format {data['format']!r}, but this version of balf_fx reads format {FORMAT}: use the "
                f"versions with which it was written, {data.get('versions')}"
            )
        try:
            found = _plan(data)
            check_types(found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"the plan is incomplete or damaged: {type(error).__name__} {error}") from error
        return found

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The inverse of `to_json`.

        Raises:
            PlanError: as `from_dict`.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"this is not a plan of balf_fx: {error}") from error
        return cls.from_dict(data)

    def only(self, layers: set[str], widths: set[str]) -> Plan:
        """The plan for only some layers, by name, and some widths, by key."""
        choices = tuple(choice for choice in self.allocation.choices if choice.site.name in layers)
        sizes = {key: size for key, size in self.allocation.sizes.items() if key in widths}
        return replace(
            self,
            allocation=replace(self.allocation, choices=choices, sizes=sizes),
            layers=tuple(layer for layer in self.layers if layer.name in layers),
            widths=tuple(width for width in self.widths if width.key in widths),
        )


def plan_of_records(records: list[GraphRecord], allocation: Allocation) -> Plan:
    """The plan of graphs that share one allocation; the first record gives the totals of the whole model."""
    first = records[0]
    widths = {width.key: width for record in records for width in _planned_widths(record, allocation)}
    layers = {layer.name: layer for record in records for layer in record.replaced}
    return Plan(
        allocation=allocation,
        flops=first.flops,
        params=first.params or 0,
        params_after=first.params_after or 0,
        captured=first.captured,
        refusals=first.refusals,
        origin=first.origin,
        layers=tuple(layers.values()),
        widths=tuple(widths.values()),
    )


def _planned_widths(record: GraphRecord, allocation: Allocation) -> Iterator[PlannedWidth]:
    """The widths of a graph that are narrowed."""
    curves = dict(zip((width.key for width in record.widths), record.width_curves, strict=False))
    for width in record.all_widths:
        size, curve = allocation.size_of(width), curves.get(width.key)
        order = record.orders.get(width.key)
        narrower = curve is not None and size < width.features
        if order is not None or narrower or width.key in record.bases:
            kept = order if order is not None or curve is None else curve.kept(size)
            yield PlannedWidth(
                name=width.name,
                kind=width.kind,
                layers=width.layer_names,
                features=width.features,
                size=size,
                heads=width.heads,
                energy_kept=1.0 if curve is None else 1.0 - curve.normalised(curve.distortion[size]),
                kept=None if kept is None else tuple(kept.tolist()),
            )


def _versions() -> dict[str, str]:
    return {"balf-fx": __version__, "torch": str(torch.__version__)}


# Conversion of plain data back into records, since JSON has no tuples.


def _plan(data: Mapping[str, Any]) -> Plan:
    include = data["origin"]["include"]
    origin = {**data["origin"], "include": None if include is None else tuple(include)}
    for name in ("exclude", "dense"):
        origin[name] = tuple(origin[name])
    return Plan(
        allocation=_allocation(data["allocation"]),
        flops=data["flops"],
        params=int(data["params"]),
        params_after=int(data["params_after"]),
        captured=str(data["captured"]),
        refusals=tuple(
            (Refusal(**{**refusal, "reason": Reason(refusal["reason"])}), flops) for refusal, flops in data["refusals"]
        ),
        origin=Origin(**origin),
        layers=tuple(_layer(layer) for layer in data["layers"]),
        widths=tuple(_width(width) for width in data["widths"]),
        versions=dict(data["versions"]),
        modules=_recipes(data["modules"]),
        certificate=None if data["certificate"] is None else _certificate(data["certificate"]),
        timing=None if data["timing"] is None else Timing(**data["timing"]),
        logit_factor=float(data["logit_factor"]),
    )


def _recipes(data: Mapping[str, Any] | None) -> Mapping[str, Recipe] | None:
    return None if data is None else {str(path): Recipe.from_dict(each) for path, each in data.items()}


def _certificate(data: Mapping[str, Any]) -> Certificate:
    return Certificate(**{**data, "tried": tuple(Tried(**each) for each in data["tried"])})


def _allocation(data: Mapping[str, Any]) -> Allocation:
    measure = cast(Measure, data["measure"])
    choices = tuple(map(_choice, data["choices"]))
    sizes = {str(key): int(size) for key, size in data["sizes"].items()}
    return Allocation(
        **{
            **data,
            "measure": measure,
            "choices": choices,
            "sizes": sizes,
            "saved_elsewhere": Cost(**data["saved_elsewhere"]),
        }
    )


def _choice(data: Mapping[str, Any]) -> Choice:
    conv, spectrum = data["site"]["conv"], data["spectrum"]
    site = Site(**{**data["site"], "conv": None if conv is None else _geometry(conv)})
    chosen, dense = (Candidate(**{**data[name], "rank": _rank(data[name]["rank"])}) for name in ("chosen", "dense"))
    curve = None if spectrum is None else EnergyCurve(tuple(spectrum["ranks"]), tuple(spectrum["kept"]))
    return Choice(site, chosen, dense, float(data["energy_kept"]), curve)


def _geometry(data: Mapping[str, Any]) -> ConvGeometry:
    added = data["output_padding"]
    return ConvGeometry(
        kernel_size=tuple(data["kernel_size"]),
        stride=tuple(data["stride"]),
        padding=tuple((before, after) for before, after in data["padding"]),
        dilation=tuple(data["dilation"]),
        padding_mode=str(data["padding_mode"]),
        output_padding=None if added is None else tuple(added),
    )


def _layer(data: Mapping[str, Any]) -> Replaced:
    found = data["fingerprint"]
    fingerprint = Fingerprint(tuple(found["shape"]), tuple(found["sums"]))
    kept = tuple(map(int, data.get("kept", ())))
    biased, ordered, apart = tuple(map(bool, data["biased"])), bool(data["ordered"]), tuple(data.get("apart", ()))
    return Replaced(str(data["name"]), _rank(data["rank"]), biased, fingerprint, kept, data["form"], ordered, apart)


def _width(data: Mapping[str, Any]) -> PlannedWidth:
    kept = None if data["kept"] is None else tuple(data["kept"])
    return PlannedWidth(**{**data, "layers": tuple(data["layers"]), "kept": kept})


def _rank(rank: Any) -> Rank:
    return tuple(rank) if isinstance(rank, list) else rank
