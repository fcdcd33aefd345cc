"""Pictures show the report's figures: what is drawn is read back and compared."""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import balf_fx
from balf_fx.errors import MissingExtraError
from balf_fx.graph.curves import EnergyCurve
from balf_fx.reporting.curve import Point, Sweep
from balf_fx.reporting.report import Report, SiteRow, WidthRow

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from balf_fx.reporting.plots import BLUE, GREY, ORANGE, PALE, plot_report, plot_sweep, to_svg

CURVE = EnergyCurve((0, 1, 4, 16, 64), (0.0, 0.5, 0.75, 0.9375, 1.0))


def site(name="layer", rank=16, flops=(1000, 400), params=(500, 300), spectrum=CURVE):
    return SiteRow(name, "linear", 64, 256, 1, rank, *flops, *params, 0.1, 0.9375, spectrum)


def report_of(*sites, widths=(), flops=(5000, 3000)):
    return Report(
        sites, (), "budget", "flops", 0.6, *flops, 2000, 1500, "symbolic_trace", 1.0, {}, 0.1, 0.1, 0.0, widths
    )


@pytest.fixture
def report():
    """A site of each kind and a width."""
    sites = (site("ranked"), site("dense", None, (800, 800), (500, 500)), site("narrower", None, (600, 300)))
    return report_of(*sites, widths=(WidthRow("ranked", "values", 64, 48, 3, 0.9),))


def bars(axes, colour):
    """Ends of the bars of a colour, by line."""
    return {
        round(patch.get_y() + patch.get_height() / 2): patch.get_width()
        for patch in axes.patches
        if to_hex(patch.get_facecolor()).upper() == colour and patch.get_width() > 0 and patch.get_height() < 0.9
    }


def labels(axes):
    return [text.get_text() for text in axes.texts]


def test_ranks_are_shares_of_the_full_rank(report):
    ranks = plot_report(report).axes[0]
    assert bars(ranks, BLUE) == {0: 25}
    assert bars(ranks, GREY) == {1: 100}
    assert bars(ranks, ORANGE) == {2: 100}
    assert labels(ranks) == ["16", "dense", "narrower"]
    assert [text.get_text() for text in ranks.get_yticklabels()] == ["ranked", "dense", "narrower"]
    assert ranks.yaxis_inverted()


def test_ranks_of_parts_are_shares_of_theirs():
    ranks = plot_report(report_of(site(rank=(8, None, 4, 4)))).axes[0]
    assert bars(ranks, BLUE) == {0: 50}  # of 16 each: 8 + 16 + 4 + 4
    assert labels(ranks) == ["8+dense+4+4"]


def test_ranks_of_divided_kernels_are_shares_of_theirs():
    row = dataclasses.replace(site(rank=96), out_features=32, full_rank=96, spectrum=None)
    figure = plot_report(report_of(row))
    assert bars(figure.axes[0], BLUE) == {0: 100}
    assert [list(line.get_xdata()) for line in figure.axes[2].lines] == [[100]]


def test_costs_before_and_after_lie_on_each_other(report):
    costs = plot_report(report).axes[1]
    assert bars(costs, PALE) == {0: 1000, 1: 800, 2: 600}
    assert (bars(costs, BLUE), bars(costs, GREY), bars(costs, ORANGE)) == ({0: 400}, {1: 800}, {2: 300})
    assert labels(costs) == ["\N{MINUS SIGN}60%", "", "\N{MINUS SIGN}50%"]
    assert "FLOPs" in costs.get_title(loc="left")


def test_parameters_are_drawn_where_flops_are_not_known():
    figure = plot_report(report_of(site(flops=(0, 0)), flops=(None, None)))
    assert bars(figure.axes[1], PALE) == {0: 500}
    assert figure.axes[1].get_title(loc="left") == "Parameters"
    assert figure.texts[0].get_text() == "75.0% of the parameters kept"


def test_the_cut_lies_on_the_curve(report):
    energies = plot_report(report).axes[2]
    curve, cut = energies.lines[:2]
    assert list(curve.get_xdata()) == [0, 100 / 64, 100 / 16, 25, 100]
    ((x,), (y,)) = cut.get_data()
    assert (x, y) == (25, curve.get_ydata()[3])
    bottom, top = curve.get_ydata()[0], curve.get_ydata()[-1]
    assert (bottom - y) / (bottom - top) == pytest.approx(0.9375)
    assert len(energies.lines) == 4  # what stays dense has no cut
    assert labels(energies) == ["93.8%"]


def test_older_reports_have_a_cut_and_no_curve():
    energies = plot_report(report_of(site(spectrum=None))).axes[2]
    assert [len(line.get_xdata()) for line in energies.lines] == [1]


def test_widths_are_drawn_where_there_are_any(report):
    widths, kept = plot_report(report).axes[3:]
    assert bars(widths, ORANGE) == {0: 75}
    assert labels(widths) == ["3 x 64 → 48"]
    assert [text.get_text() for text in widths.get_yticklabels()] == ["ranked (values)"]
    assert list(kept.lines[0].get_xdata()) == [90]
    assert len(plot_report(dataclasses.replace(report, widths=())).axes) == 3


@pytest.mark.parametrize("count", [0, 1, 5, 150])
def test_lines_are_as_high_and_frames_as_wide_however_many_there_are(count):
    names = [f"a.very.long.name.of.a.model.with.many.blocks.{index}.attention.projection" for index in range(count)]
    figure = plot_report(
        report_of(*map(site, names), widths=tuple(WidthRow(n, "channels", 8, 4, 1, 0.9) for n in names))
    )
    width, height = figure.get_size_inches()
    assert 10.8 < width < 14
    for axes in figure.axes:
        box = axes.get_position()
        assert round(box.width * width, 6) in (3.4, 7.1)
        assert box.height * height == pytest.approx(0.27 * max(count, 1))
        assert 0 <= box.x0 < box.x1 <= 1
        assert 0 <= box.y0 < box.y1 <= 1


def test_no_text_is_cut_off_or_lies_on_the_legend(report):
    """Of a report with long names, drawn and measured."""
    long = [dataclasses.replace(row, name=f"{row.name}.{'MW' * 30}") for row in report.sites]
    figure = plot_report(dataclasses.replace(report, sites=tuple(long)))
    figure.draw_without_rendering()
    frame = figure.bbox
    texts = [
        *figure.texts,
        *(text for axes in figure.axes for text in (*axes.texts, *axes.get_yticklabels(), axes.xaxis.label)),
    ]
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    assert len(boxes) > 10
    for box in boxes:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1 + 1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1 + 1
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert not any(legend.overlaps(box) for box in boxes)
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert all(
        len(name) == 46 and name.startswith(row.name[:11]) and "…" in name
        for name, row in zip(names, long, strict=True)
    )


def test_real_reports_are_drawn(conv_net, images):
    for flops, effort in ((0.6, "fast"), (0.5, "balanced")):
        found = balf_fx.report(balf_fx.compile(conv_net, images, flops=flops, effort=effort, progress=False))
        figure = plot_report(found)
        ranks = [row for row in found.sites if isinstance(row.rank, int)]
        assert sorted(bars(figure.axes[0], BLUE).values()) == sorted(100 * row.rank_share for row in ranks)
        assert len(figure.axes) == (5 if found.widths else 3)


def test_svg_is_the_same_every_time_and_loads_nothing(report):
    drawn = to_svg(plot_report(report), "a")
    assert drawn == to_svg(plot_report(report), "a")
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert "narrower</text>" in drawn
    for word in ("<!DOCTYPE", "<metadata", "<image", "@import"):
        assert word not in drawn


def test_nothing_global_changes():
    code = """
import sys
import matplotlib
from balf_fx.reporting.plots import plot_report, to_svg
from tests.reporting.test_plots import report_of, site
before = matplotlib.rcParams.copy()
to_svg(plot_report(report_of(site())), "a")
assert "matplotlib.pyplot" not in sys.modules
assert dict.__eq__(before, matplotlib.rcParams)  # items() would choose a backend
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "balf_fx.reporting.plots")
    monkeypatch.delattr(balf_fx.reporting, "plots", raising=False)
    with pytest.raises(MissingExtraError, match=r'pip install "balf-fx\[plot\]"'):
        importlib.import_module("balf_fx.reporting.plots")


@pytest.fixture
def curve():
    points = (Point(0.9, 0.899, 0.95, 0.01, 0.98, 0.9), Point(0.5, 0.5, 0.6, 0.2, 0.8, 0.75))
    return Sweep("flops", "best", 1000, 0.92, points)


def test_the_curve_shows_its_points(curve):
    shares, divergences = plot_sweep(curve).axes
    agreement, accuracy, dense = shares.lines
    assert (list(agreement.get_xdata()), list(agreement.get_ydata())) == ([50, 89.9], [80, 98])
    assert list(accuracy.get_ydata()) == [75, 90]
    assert list(dense.get_ydata()) == [92, 92]
    assert list(divergences.lines[0].get_ydata()) == [0.2, 0.01]
    assert divergences.get_yscale() == "log"
    assert divergences.get_xlabel() == "FLOPs kept"
    assert [label.get_text() for label in divergences.get_xticklabels()] == ["50%", "89.9%"]


@pytest.mark.parametrize(
    ("measure", "shares", "words"), [("params", [60, 95], "parameters kept"), ("latency", [50, 90], "time asked for")]
)
def test_other_curves_are_drawn_over_their_own_shares(curve, measure, shares, words):
    axes = plot_sweep(dataclasses.replace(curve, measure=measure)).axes[1]
    assert list(axes.lines[0].get_xdata()) == shares
    assert axes.get_xlabel() == words


def test_the_curve_does_without_labels_and_classes(curve):
    bare = tuple(dataclasses.replace(point, accuracy=None) for point in curve.points)
    assert len(plot_sweep(dataclasses.replace(curve, points=bare, accuracy=None)).axes[0].lines) == 1
    bare = tuple(dataclasses.replace(point, agreement=None) for point in bare)
    (only,) = plot_sweep(dataclasses.replace(curve, points=bare, accuracy=None, measure="params")).axes
    assert only.get_xlabel() == "parameters kept"
    lossless = (dataclasses.replace(curve.points[0], divergence=0.0),)
    assert plot_sweep(dataclasses.replace(curve, points=lossless)).axes[1].get_yscale() == "linear"
