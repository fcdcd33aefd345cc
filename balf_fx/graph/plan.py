"""What was done to a model, as plain data: enough to do it again to a model of the same architecture."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from balf_fx.errors import PassError, PlanError
from balf_fx.graph.allocation import Allocation
from balf_fx.graph.annotation import META_KEY, GraphRecord, Origin, Replaced
from balf_fx.graph.curves import Rank
from balf_fx.graph.fingerprint import Fingerprint
from balf_fx.reporting.report import Report, rank_from_data, report_from_dict, summarise
from balf_fx.version import __version__

FORMAT = 2
"""Raised when older versions could not read what is written."""


@dataclass(frozen=True)
class PlannedWidth:
    """Features that have become fewer.

    Attributes:
        name, kind: as in `widths.Width`.
        size: features that are left, of each head.
        kept: which ones, of channels; None where they are others than before.
    """

    name: str
    kind: str
    size: int
    kept: tuple[int, ...] | None

    @property
    def key(self) -> str:
        """As `widths.Width.key`."""
        return f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Plan:
    """Ranks and sizes of one compressed model.

    Attributes:
        report: what they cost and lose.
        origin: how the graph was made.
        layers: those that were replaced, with fingerprints of the original weights.
        widths: those that have become smaller.
        versions: of balf_fx and torch.
    """

    report: Report
    origin: Origin
    layers: tuple[Replaced, ...]
    widths: tuple[PlannedWidth, ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=lambda: _versions())

    @classmethod
    def of(cls, compressed: Any) -> Plan:
        """The plan of a compressed model, to be read, written down or followed again.

        Args:
            compressed: what `compile`, `convert` or `load` returned, a graph that has been through `passes.Factorize`,
                or what `torch.compile(..., backend="balf")` returned.

        Raises:
            PassError: the module carries no plan.
            NotCalibratedError: the backend is still calibrating; says how far it is.
        """
        meta = compressed.meta if isinstance(compressed, fx.GraphModule) else {}
        found = meta.get(META_KEY, getattr(compressed, PLAN_ATTRIBUTE, None))
        if isinstance(found, GraphRecord) and found.allocation is not None:
            return _of_record(found, found.allocation)
        if isinstance(found, Mapping):
            return cls.from_dict(found)
        backend = sys.modules.get("balf_fx.backend")  # not loaded, it cannot have compiled anything
        if backend is not None and backend.owner_of(compressed) is not None:
            own: Plan = backend.plan(compressed).plan
            return own
        raise PassError("there is no plan and nothing to report: pass what balf_fx.compile, convert or load returned")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan in a file that `balf_fx.save` has written, or in a .json file with what `to_json` returned.

        Raises:
            FileError: the file is damaged, or none of balf_fx.
            PlanError: the plan is damaged, or of another version.
        """
        from balf_fx.files.storage import read  # which imports plans

        if Path(path).suffix == ".json":
            return cls.from_json(Path(path).read_bytes())
        return read(path).plan

    @property
    def ranks(self) -> dict[str, Rank]:
        """{site: rank}, None for dense, as `allocation` takes it."""
        return {row.name: row.rank for row in self.report.sites}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold."""
        return {
            "format": FORMAT,
            "versions": dict(self.versions),
            "report": self.report.to_dict(),
            "origin": asdict(self.origin),
            "layers": [asdict(layer) for layer in self.layers],
            "widths": [asdict(width) for width in self.widths],
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            PlanError: this is no plan, or one of a later version.
        """
        if not isinstance(data, Mapping) or "format" not in data:
            raise PlanError("this is no plan of balf_fx: it has no format")
        if data["format"] != FORMAT:
            raise PlanError(
                f"the plan has format {data['format']!r}, and this version of balf_fx reads format {FORMAT}: use the "
                f"versions that it was written with, {data.get('versions')}"
            )
        try:
            origin = data["origin"]
            include = origin["include"]
            return cls(
                report=report_from_dict(data["report"]),
                origin=Origin(
                    origin["arguments"],
                    origin["fold_batchnorm"],
                    None if include is None else tuple(include),
                    tuple(origin["exclude"]),
                ),
                layers=tuple(_layer_from_data(layer) for layer in data["layers"]),
                widths=tuple(_width_from_data(width) for width in data["widths"]),
                versions=dict(data["versions"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"the plan is incomplete or damaged: {type(error).__name__} {error}") from error

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The inverse of `to_json`.

        Raises:
            PlanError: as `from_dict`.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"this is no plan of balf_fx: {error}") from error
        return cls.from_dict(data)


def _of_record(record: GraphRecord, allocation: Allocation) -> Plan:
    """The plan of a graph that has been rewritten."""
    widths = []
    for width, curve in zip(record.widths, record.width_curves, strict=False):
        size = allocation.sizes.get(width.key, width.features)
        if curve is not None and size < width.features:
            kept = curve.kept(size)
            chosen = None if kept is None else tuple(kept.tolist())
            widths.append(PlannedWidth(width.name, width.kind, size, chosen))
    return Plan(summarise(record, allocation), record.origin, record.replaced, tuple(widths))


def _versions() -> dict[str, str]:
    return {"balf-fx": __version__, "torch": str(torch.__version__)}


def _layer_from_data(data: Mapping[str, Any]) -> Replaced:
    fingerprint = data["fingerprint"]
    return Replaced(
        str(data["name"]),
        rank_from_data(data["rank"]),
        tuple(map(bool, data["biased"])),
        Fingerprint(tuple(fingerprint["shape"]), tuple(fingerprint["sums"])),
    )


def _width_from_data(data: Mapping[str, Any]) -> PlannedWidth:
    kept = data["kept"]
    chosen = None if kept is None else tuple(kept)
    return PlannedWidth(str(data["name"]), str(data["kind"]), int(data["size"]), chosen)


PLAN_ATTRIBUTE = "balf_plan"
"""Where a finished GraphModule carries its plan beside `meta`: copies keep only `meta`, pickles only attributes."""
