"""The curve of accuracy against budgets, as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from balf_fx.errors import FileError
from balf_fx.graph.curves import Measure
from balf_fx.reporting.report import counted


@dataclass(frozen=True)
class Point:
    """One compressed model.

    Attributes:
        budget: the requested budget.
        flops_kept, params_kept: the shares of the whole model's FLOPs and parameters that are kept.
        divergence: the divergence of its outputs from the original's: Kullback-Leibler, in nats, for classes or tokens;
            for other outputs the squared error relative to the mean square.
        agreement: the share of top-1 predictions that equal the original's; None if the model is not a classifier.
        accuracy: the share of correct top-1 predictions; None without labels.
        perplexity: that of the next tokens; None if the data are no text.
    """

    budget: float
    flops_kept: float | None
    params_kept: float
    divergence: float
    agreement: float | None
    accuracy: float | None
    perplexity: float | None = None


@dataclass(frozen=True)
class Sweep:
    """The curve.

    Attributes:
        measure: what the budgets limit.
        samples: the number of samples on which outputs were compared.
        accuracy: the accuracy of the original; None without labels.
        points: the points for the budgets that can be reached, in their order.
        out_of_reach: the other budgets.
        minimum: the smallest budget that can be reached; None if all of them can.
        perplexity: that of the original; None if the data are no text.
    """

    measure: Measure
    effort: str
    samples: int
    accuracy: float | None
    points: tuple[Point, ...]
    out_of_reach: tuple[float, ...] = ()
    minimum: float | None = None
    perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The curve as plain data for JSON."""
        return asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Sweep:
        """The inverse of `to_json`.

        Raises:
            FileError: the text is not a sweep.
        """
        try:
            data = json.loads(text)
            points = tuple(Point(**point) for point in data["points"])
            return cls(**{**data, "points": points, "out_of_reach": tuple(data["out_of_reach"])})
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"this is not a sweep as JSON: {type(error).__name__} {error}") from error

    def rows(self) -> list[tuple[str, ...]]:
        """A table: headers, the original if its accuracy or perplexity is known, and the points."""
        last = "accuracy" if self.perplexity is None else "perplexity"
        headers = (self.measure, "FLOPs kept", "params kept", "same top-1", "divergence", last)
        found: list[tuple[str, ...]] = [headers]
        if self.accuracy is not None or self.perplexity is not None:
            found.append(("dense", *(["100.00 %"] * 3), "0", _quality(self)))
        for point in self.points:
            shares = map(_percent, (point.flops_kept, point.params_kept, point.agreement))
            found.append((f"{point.budget:g}", *shares, f"{point.divergence:.4g}", _quality(point)))
        return found

    @property
    def note(self) -> str:
        """The number of samples, the effort, and the budgets that are out of reach."""
        note = f"on {counted(self.samples, 'sample')}, effort {self.effort!r}"
        if not self.out_of_reach:
            return note
        listed = ", ".join(f"{budget:g}" for budget in self.out_of_reach)
        return f"{note}; out of reach: {listed}; the smallest is {self.minimum:.4f}"

    def __str__(self) -> str:
        headers, *rows = self.rows()
        table = tabulate(rows, headers, disable_numparse=True, colalign=("right",) * len(headers))
        return f"{table}\n\n{self.note}"


def _quality(found: Point | Sweep) -> str:
    """The perplexity, or else the accuracy."""
    return _percent(found.accuracy) if found.perplexity is None else f"{found.perplexity:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}".replace("%", " %")
