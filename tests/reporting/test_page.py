"""The page: well-formed, complete, escaped, and in need of nothing else."""

import dataclasses
import importlib
import re
import sys
from html.parser import HTMLParser

import pytest

import balf_fx
from balf_fx.errors import MissingExtraError
from balf_fx.graph.certificate import Certificate, Tried
from balf_fx.graph.timing import Timing
from balf_fx.reporting.curve import Point, Sweep
from balf_fx.reporting.report import RefusedRow, Report, SiteRow, WidthRow, timing_in_words

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from balf_fx.reporting.page import render

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and gathers what tests look at."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.outside, self.text = [], [], set(), [], []
        self.rows = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data") and not value.startswith("#"):
                self.outside.append(value)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture
def report():
    site = SiteRow("head", "linear", 64, 256, 1, 16, 1000, 400, 500, 300, 0.1, 0.9375)
    refused = RefusedRow("norm", "BatchNorm2d", "not a linear or convolution layer", None)
    width = WidthRow("fc2", "channels", 3072, 1800, 1, 0.98765)
    return Report(
        (site,), (refused,), "budget", "flops", 0.6, 5000, 3000, 2000, 1500, "export", 1.0, {}, 0.1, 0.1, 0.0, (width,)
    )


def test_a_real_page_is_well_formed_and_loads_nothing(conv_net, images):
    found = balf_fx.report(balf_fx.compile(conv_net, images, flops=0.5, effort="balanced", progress=False))
    text = render(found)
    page = Page(text)
    assert page.outside == []
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.isdisjoint({"script", "link", "iframe", "img", "image"})
    assert not re.search(r"url\((?!#)|@import", text)
    assert set(re.findall(r'https?://[^\s"<]+', text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    names = [row[0] for row in page.rows]
    assert all(row.name in names for row in (*found.sites, *found.widths, *found.refused))


def test_tables_hold_every_figure(report):
    page = Page(render(report))
    assert page.rows[1] == ["head", "linear", "64 x 256 x 1", "16", "1,000", "400", "500", "300", "93.75%"]
    assert page.rows[3] == ["fc2", "channels", "3,072", "1,800", "1", "98.77%"]
    assert page.rows[5] == ["norm", "BatchNorm2d", "not a linear or convolution layer", ""]
    for text in ("60.0%", "5,000 → 3,000", "75.0%", "2,000 → 1,500", "flops 0.6"):
        assert any(text in piece for piece in page.text)


def test_what_is_not_there_has_no_table(report):
    page = Page(render(dataclasses.replace(report, widths=(), refused=())))
    assert len(page.rows) == 2
    assert not {"Widths", "Not a site"} & set(page.text)
    nothing = dataclasses.replace(report, sites=(), flops_before=None, flops_after=None, target=None, bound=None)
    Page(render(nothing))


def test_the_curve_over_budgets_is_drawn_and_listed(report):
    point = Point(0.5, 0.4987, 0.6, 0.01234, 0.97, 0.9)
    curve = Sweep("flops", "best", 1000, 0.91, (point, dataclasses.replace(point, budget=0.3)), (0.1,), 0.2)
    text = render(report, curve)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(page.ids)
    assert "on 1,000 samples, effort 'best'; out of reach: 0.1; the smallest is 0.2000" in page.text
    assert page.rows[1] == ["dense", "100.00 %", "100.00 %", "100.00 %", "0", "91.00 %"]
    assert page.rows[2] == ["0.5", "49.87 %", "60.00 %", "97.00 %", "0.01234", "90.00 %"]
    assert {"Accuracy and budget", "Budgets", "FLOPs kept"} <= set(page.text)
    assert not {"Accuracy and budget", "Budgets"} & set(Page(render(report)).text)


def test_certified_mistakes_are_drawn_and_listed(report):
    tried = (Tried(0.95, 0.004, 0.01), Tried(0.9, 0.011, 0.02), Tried(0.85, 0.03, 0.05))
    certificate = Certificate("disagreement", 0.025, 0.95, "flops", 500, tried)
    text = render(dataclasses.replace(report, certificate=certificate))
    page = Page(text)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(page.ids)
    assert page.rows[1:4] == [
        ["0.95", "0.400%", "1.000%"],
        ["0.9", "1.100%", "2.000%"],
        ["0.85", "3.000%", "5.000%"],
    ]
    said = "1.10% on 500 samples, at most 2.00% with confidence 0.95; 3 budgets tried"
    assert any(said in piece for piece in page.text)
    assert {"Certified mistakes", "chosen: 90%", "limit"} <= set(page.text)
    assert f"limit   disagreement 0.025: {said}" in str(dataclasses.replace(report, certificate=certificate))
    missed = dataclasses.replace(certificate, tried=tried[2:])
    assert "no budget keeps it" in render(dataclasses.replace(report, certificate=missed))
    untried = dataclasses.replace(certificate, tried=())
    assert "no budget could be tried" in render(dataclasses.replace(report, certificate=untried))


def test_times_are_listed(report):
    timing = Timing("eager", "cpu", 1, 0.6, 0.5, 0.59, 0.61, 0.9, True, 0.02, 0.0122)
    page = Page(render(dataclasses.replace(report, timing=timing)))
    assert any(timing_in_words(timing) in piece for piece in page.text)


def test_names_are_text_and_no_markup(report):
    evil = '<script>alert("x")</script> & $a_b$'
    found = dataclasses.replace(
        report,
        sites=(dataclasses.replace(report.sites[0], name=evil), dataclasses.replace(report.sites[0], name="a$_$")),
    )
    page = Page(render(found))
    assert "script" not in page.tags
    assert page.rows[1][0] == evil
    assert "a$_$" in page.text  # in the picture as well: no mathematics


def test_the_page_is_the_same_every_time(report):
    assert render(report) == render(dataclasses.replace(report))


def test_missing_jinja_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "balf_fx.reporting.page", raising=False)
    monkeypatch.delattr(balf_fx.reporting, "page", raising=False)
    with pytest.raises(MissingExtraError, match=r'pip install "balf-fx\[plot\]"'):
        importlib.import_module("balf_fx.reporting.page")
