"""Plots of a report, drawn with matplotlib's object-oriented interface: no window and no global state.

Each site has one line across all axes, and the height grows with the number of sites. Colours are from the palette of
Okabe and Ito, which is also distinguishable with colour vision deficiencies.
"""

from __future__ import annotations

import io
import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from balf_fx.errors import MissingExtraError
from balf_fx.reporting.report import Report, SiteRow, WidthRow, counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from balf_fx.graph.certificate import Certificate
    from balf_fx.reporting.curve import Point, Sweep

try:
    import matplotlib
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Patch
    from matplotlib.textpath import text_to_path
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
except ImportError as error:
    raise MissingExtraError('plots need matplotlib: pip install "balf-fx[plot]"') from error


BLUE, ORANGE = "#0072B2", "#E69F00"


GREY, PALE = "#B5B5B5", "#E4E4E4"


# Inches. Axes are placed explicitly, so that a line has the same height among 5 lines as among 150.
_COLUMN, _GAP = 3.4, 0.3


_LINE = 0.27


_HEAD, _ABOVE, _TICKS, _BELOW = 0.75, 0.35, 0.2, 0.55  # title and legend; the space above and below axes


_NAME_LENGTH, _NAME_SIZE = 46, 8


_MEASURES = {"flops": "FLOPs", "params": "parameters", "latency": "time"}
_BAR = 0.72  # height of a bar, as a share of a line


def plot_report(report: Report) -> Figure:
    """Plot rank, FLOPs (parameters if FLOPs were not counted) and energy of each site, and below them each width."""
    sites, widths = report.sites, report.widths
    upper, lower = max(len(sites), 1) * _LINE, len(widths) * _LINE
    above_upper, above_lower = (_ABOVE + (_TICKS if _has_ticks_above(len(rows)) else 0.0) for rows in (sites, widths))
    height = _HEAD + above_upper + upper + _BELOW + (above_lower + lower + _BELOW if widths else 0.0)
    left = max(map(_wide, [*(row.name for row in sites), *map(_width_name, widths)]), default=0.0) + 0.2
    width = left + 3 * _COLUMN + 2 * _GAP + 0.1
    figure = Figure(figsize=(width, height))

    def add_axes(index: int, columns: int, top: float, tall: float) -> Axes:
        x, wide = left + index * (_COLUMN + _GAP), columns * _COLUMN + (columns - 1) * _GAP
        axes = figure.add_axes((x / width, 1 - (top + tall) / height, wide / width, tall / height))
        axes.tick_params(labelleft=index == 0)
        return axes

    top = _HEAD + above_upper
    draw_ranks(add_axes(0, 1, top, upper), sites)
    draw_costs(add_axes(1, 1, top, upper), report)
    draw_energies(add_axes(2, 1, top, upper), sites)
    if widths:
        top += upper + _BELOW + above_lower
        draw_widths(add_axes(0, 2, top, lower), widths)
        draw_width_energies(add_axes(2, 1, top, lower), widths)
    figure.text(0.1 / width, 1 - 0.12 / height, _headline(report), va="top", fontsize=13, fontweight="bold")
    _legend(figure, width, height)
    return figure


def draw_ranks(axes: Axes, sites: Sequence[SiteRow]) -> None:
    """Draw the rank of each site as a share of its full rank."""
    _lines(axes, [row.name for row in sites])
    shares = [100 * row.rank_share for row in sites]
    colours = [to_rgba(_colour(row), 0.35 if row.rank is None else 1.0) for row in sites]
    axes.barh(range(len(sites)), shares, _BAR, color=colours)
    for line, (row, share) in enumerate(zip(sites, shares, strict=True)):
        _label(axes, share, line, _elide(row.rank_in_words, 14))
    axes.set_title("Rank", loc="left", fontsize=10)
    axes.set_xlabel("share of the full rank")
    _percent(axes, 122)


def draw_costs(axes: Axes, report: Report) -> None:
    """Draw the FLOPs of each site before and after; parameters if FLOPs were not counted."""
    counted = report.flops_before is not None
    pairs = [
        (row.flops_before, row.flops_after) if counted else (row.params_before, row.params_after)
        for row in report.sites
    ]
    _lines(axes, [row.name for row in report.sites])
    axes.barh(range(len(pairs)), [before for before, _ in pairs], _BAR, color=PALE)
    axes.barh(range(len(pairs)), [after for _, after in pairs], _BAR, color=[_colour(row) for row in report.sites])
    for line, (before, after) in enumerate(pairs):
        _label(axes, max(before, after), line, _change(before, after))
    axes.set_title("FLOPs of the example batch" if counted else "Parameters", loc="left", fontsize=10)
    axes.set_xlabel("FLOPs" if counted else "parameters")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep="\N{THIN SPACE}"))
    axes.set_xlim(0, 1.16 * max((max(pair) for pair in pairs), default=1) or 1)


def draw_energies(axes: Axes, sites: Sequence[SiteRow]) -> None:
    """Draw the energy that ranks keep, from none at the bottom of a line to all at its top, and the chosen rank."""
    _lines(axes, [row.name for row in sites])
    for line, row in enumerate(sites):
        bottom, cut = line + _BAR / 2, 100 * row.rank_share
        at_cut = bottom - _BAR * row.energy_kept
        if row.spectrum is not None:
            shares = [100 * rank / row.spectrum.ranks[-1] for rank in row.spectrum.ranks]
            heights = [bottom - _BAR * kept for kept in row.spectrum.kept]
            stop = bisect_left(shares, cut)
            axes.fill_between(shares, heights, bottom, color=PALE, linewidth=0)
            axes.fill_between(
                [*shares[:stop], cut], [*heights[:stop], at_cut], bottom, color=_colour(row), alpha=0.5, linewidth=0
            )
            axes.plot(shares, heights, color="#777777", linewidth=0.8)
        if row.rank is not None:
            axes.vlines(cut, bottom - _BAR, bottom, color=BLUE, linewidth=1.2)
            axes.plot([cut], [at_cut], "o", color=BLUE, markersize=3.5)
            _label(axes, 100, line, _share(row.energy_kept))
    axes.set_title("Energy that ranks keep, and the cut", loc="left", fontsize=10)
    axes.set_xlabel("share of the full rank; each line is 0 to 100% high")
    _percent(axes, 118)


def draw_widths(axes: Axes, widths: Sequence[WidthRow]) -> None:
    """Draw the share of features that each width keeps."""
    _lines(axes, [_width_name(row) for row in widths])
    axes.barh(range(len(widths)), [100] * len(widths), _BAR, color=PALE)
    kept = [100 * row.features_after / row.features_before for row in widths]
    axes.barh(range(len(widths)), kept, _BAR, color=ORANGE)
    for line, row in enumerate(widths):
        heads = f"{row.heads} x " if row.heads > 1 else ""
        _label(axes, 100, line, f"{heads}{row.features_before:,} → {row.features_after:,}")
    axes.set_title("Widths: features that stay", loc="left", fontsize=10)
    axes.set_xlabel("share of the features")
    _percent(axes, 118)


def draw_width_energies(axes: Axes, widths: Sequence[WidthRow]) -> None:
    """Draw the energy that each width keeps: the share of the loss of removing all features that is avoided."""
    _lines(axes, [_width_name(row) for row in widths])
    kept = [100 * row.energy_kept for row in widths]
    axes.hlines(range(len(widths)), 0, kept, color=PALE, linewidth=1.5)
    axes.plot(kept, range(len(widths)), "o", color=ORANGE, markersize=5)
    for line, row in enumerate(widths):
        _label(axes, 101, line, _share(row.energy_kept))
    axes.set_title("Energy that they keep", loc="left", fontsize=10)
    axes.set_xlabel("share of what losing all of them would cost")
    _percent(axes, 118)


def _plain(axes: Axes) -> None:
    """A pale grid behind the curves, small labels, and no frame on the right and above."""
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def plot_certificate(certificate: Certificate) -> Figure:
    """Plot the mistakes at each budget that was tried, their upper bounds, the limit and the chosen budget."""
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    axes = figure.subplots()
    tried = sorted(certificate.tried, key=lambda each: each.share)
    kept = [100 * each.share for each in tried]
    observed, bounds = [100 * each.observed for each in tried], [100 * each.bound for each in tried]
    axes.fill_between(kept, observed, bounds, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(kept, bounds, color=BLUE, linewidth=1, label=f"upper bound, confidence {certificate.confidence:g}")
    axes.plot(kept, observed, color=BLUE, marker="o", markersize=4, label="observed")
    axes.axhline(100 * certificate.limit, color=ORANGE, linestyle="--", linewidth=1, label="limit")
    if certificate.chosen is not None:
        chosen = 100 * certificate.chosen.share
        axes.axvline(chosen, color=GREY, linewidth=1)
        axes.annotate(
            f"chosen: {chosen:g}%", (chosen, axes.get_ylim()[1]), (4, -10), textcoords="offset points", fontsize=8
        )
    axes.set_ylabel(certificate.mistakes, fontsize=9)
    axes.yaxis.set_major_formatter(PercentFormatter())
    axes.set_xlabel(f"{_MEASURES[certificate.measure]} kept", fontsize=9)
    axes.xaxis.set_major_formatter(PercentFormatter())
    _plain(axes)
    axes.legend(fontsize=8, frameon=False)
    title = f"Mistakes on {counted(certificate.samples, 'sample')}"
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    return figure


def plot_sweep(sweep: Sweep) -> Figure:
    """Plot accuracy and agreement on top, divergence below, against the share of the measure that is kept."""
    figure = Figure(figsize=(8.0, 6.0), layout="constrained")
    shares, divergences = figure.subplots(2, sharex=True, height_ratios=(1.6, 1.0))
    points = sorted(sweep.points, key=lambda point: _kept(sweep, point))
    kept = [100 * _kept(sweep, point) for point in points]
    curves = {
        "same top-1 as the dense model": (BLUE, "o", [point.agreement for point in points]),
        "right": (ORANGE, "s", [point.accuracy for point in points]),
    }
    for name, (colour, marker, values) in curves.items():
        known = [(x, 100 * value) for x, value in zip(kept, values, strict=True) if value is not None]
        if known:
            shares.plot(*zip(*known, strict=True), color=colour, marker=marker, markersize=5, label=name)
    if sweep.accuracy is not None:
        shares.axhline(100 * sweep.accuracy, color=ORANGE, linestyle="--", linewidth=1, label="right, dense model")
    divergences.plot(kept, [point.divergence for point in points], color=BLUE, marker="o", markersize=5)
    if all(point.divergence > 0 for point in points):
        divergences.set_yscale("log")
        low, high = divergences.get_ylim()
        divergences.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
        divergences.yaxis.set_major_formatter("{x:g}")
        divergences.yaxis.set_minor_locator(NullLocator())
    shares.set_ylabel("top-1 predictions", fontsize=9)
    shares.yaxis.set_major_formatter(PercentFormatter())
    divergences.set_ylabel("divergence, nats" if shares.lines else "squared error, relative", fontsize=9)
    asked = "asked for" if sweep.measure == "latency" else "kept"
    divergences.set_xlabel(f"{_MEASURES[sweep.measure]} {asked}", fontsize=9)
    for x, point in zip(kept, points, strict=True):
        divergences.annotate(
            f"{point.divergence:.2g}",
            (x, point.divergence),
            (0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
        )
    divergences.margins(y=0.15)
    divergences.set_xticks(kept, [f"{share:.3g}%" for share in kept])
    for axes in (shares, divergences):
        _plain(axes)
    title = f"Predictions on {counted(sweep.samples, 'sample')}, effort {sweep.effort!r}"
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    if shares.lines:
        shares.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9)
    else:
        shares.remove()
    return figure


def _kept(sweep: Sweep, point: Point) -> float:
    """The share of the measure that a model keeps; the budget where it is not known, as of a time."""
    kept = {"flops": point.flops_kept, "params": point.params_kept}.get(sweep.measure)
    return point.budget if kept is None else kept


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element with text as text; the result is reproducible.

    Args:
        name: the prefix of its ids, so that several figures can be in one page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "balf_fx", "svg.fonttype": "none"}):  # savefig has no such options
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>\s*", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\1{name}-", drawn)


def _lines(axes: Axes, names: Sequence[str]) -> None:
    """Set up one line for each name, the first on top."""
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    elided = [_elide(name, _NAME_LENGTH) for name in names]
    axes.set_yticks(range(len(names)), elided, fontsize=_NAME_SIZE, parse_math=False)
    axes.tick_params(axis="y", length=0)
    above = _has_ticks_above(len(names))
    axes.tick_params(axis="x", labelsize=8, top=above, labeltop=above)
    axes.xaxis.label.set_fontsize(8)
    axes.spines[["left", "right", "top"]].set_visible(False)
    for line in range(1, len(names), 2):
        axes.axhspan(line - 0.5, line + 0.5, color="black", alpha=0.03, linewidth=0, zorder=0)


def _wide(name: str) -> float:
    """The width of a name next to its line, in inches."""
    font = FontProperties(size=_NAME_SIZE)
    points = text_to_path.get_text_width_height_descent(_elide(name, _NAME_LENGTH), font, False)[0]
    return 1.06 * float(points) / 72  # on a screen letters are rounded to pixels


def _has_ticks_above(lines: int) -> bool:
    """Whether the ticks at the bottom are too far from the first line."""
    return lines > 25


def _legend(figure: Figure, width: float, height: float) -> None:
    handles = [
        Patch(color=BLUE, label="lower rank"),
        Patch(color=ORANGE, label="dense, with fewer features or identity blocks"),
        Patch(color=GREY, label="dense, as it was"),
        Patch(color=PALE, label="saved or dropped"),
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.1 / width, 1 - 0.4 / height),
        borderpad=0,
        borderaxespad=0,
        ncols=len(handles),
        frameon=False,
        fontsize=9,
    )


def _label(axes: Axes, x: float, line: int, text: str) -> None:
    axes.annotate(text, (x, line), (4, 0), textcoords="offset points", va="center", fontsize=7.5, parse_math=False)


def _percent(axes: Axes, end: float) -> None:
    """Set ticks up to 100 %, with space for labels beyond it."""
    axes.set_xlim(0, end)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.xaxis.set_major_formatter(PercentFormatter())


def _colour(row: SiteRow) -> str:
    if row.rank is not None:
        return BLUE
    return ORANGE if row.is_only_narrower else GREY


def _width_name(row: WidthRow) -> str:
    return row.name if row.name.endswith(row.kind) else f"{row.name} ({row.kind})"


def _change(before: int, after: int) -> str:
    """The change of a cost as text; empty if it has not changed."""
    return "" if after == before else f"{after / before - 1:+.0%}".replace("-", "\N{MINUS SIGN}")


def _share(share: float) -> str:
    """A percentage that is only rounded to 100 if it is exactly 100."""
    return f"{min(100 * share, 99.9 if share < 1 else 100):.1f}%"


def _elide(text: str, length: int) -> str:
    """Shorten a text to this many characters after its first quarter, since the end of a name tells more."""
    if len(text) <= length:
        return text
    head = length // 4
    return f"{text[:head]}…{text[head + 1 - length :]}"


def _headline(report: Report) -> str:
    params = f"{report.params_kept:.1%} of the parameters"
    if report.flops_kept is None:
        return f"{params} kept"
    return f"{report.flops_kept:.1%} of the FLOPs and {params} kept"
