import dataclasses
import json

import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.errors import PassError
from balf_fx.graph.allocation import Allocation
from balf_fx.graph.annotation import GraphRecord
from balf_fx.graph.certificate import Certificate, Tried
from balf_fx.graph.curves import Cost
from balf_fx.graph.flops import count_flops
from balf_fx.graph.parameters import count_parameters
from balf_fx.graph.plan import Plan, plan_of_records
from balf_fx.graph.timing import Timing
from balf_fx.graph.widths import Width, WidthCurve
from balf_fx.passes import Allocate, Score, ScoreWidths
from balf_fx.reporting.report import Report, SiteRow, WidthRow


@pytest.fixture
def compressed(conv_net, images):
    return balf_fx.compile(conv_net, images, flops=0.6, exclude=["head"], progress=False)


def test_rows_and_totals_add_up(compressed):
    report = balf_fx.report(compressed)
    saved = sum(row.flops_before - row.flops_after for row in report.sites)
    assert report.flops_before - report.flops_after == saved + report.flops_saved_elsewhere
    assert report.flops_kept == report.flops_after / report.flops_before <= 0.6
    assert 0 <= report.gap == pytest.approx(report.primal - report.bound)
    assert {row.name: row.reason for row in report.refused} == {
        "block.3": "one output channel per group (O x D x groups = 1 x 9 x 32)",
        "head": "excluded by the user (matches exclude)",
    }


def test_factor_layers_are_the_layers_of_the_result(compressed):
    names = balf_fx.report(compressed).factor_layers
    assert names == tuple(f"{row.name}.{i}" for row in balf_fx.report(compressed).sites if row.rank for i in (0, 1))
    assert names
    for name in names:
        assert isinstance(compressed.get_submodule(name), nn.Conv2d)


def test_factor_layers_of_parts_leave_out_those_that_stay_dense():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return q * k + v

    x = torch.randn(64, 16)
    small = balf_fx.compile(Fused(), x, allocation={"qkv": (4, None, 6)}, effort="fast", progress=False)
    names = balf_fx.report(small).factor_layers
    assert names == ("qkv.0", "qkv.1.0", "qkv.1.2")
    assert [tuple(small.get_submodule(name).weight.shape) for name in names] == [(10, 16), (16, 4), (16, 6)]


def test_totals_include_what_widths_save_outside_of_sites(bottleneck, images):
    small = balf_fx.compile(bottleneck, images, flops=0.5, progress=False)
    report = balf_fx.report(small)
    (width,) = report.widths
    kept = small.depthwise.out_channels
    assert width == WidthRow("project", "channels", 64, kept, 1, width.energy_kept)
    assert 0 < kept < 64
    assert report.flops_saved_elsewhere == count_flops(bottleneck.depthwise, images[0].new_ones(8, 64, 12, 12)) - (
        count_flops(small.depthwise, images[0].new_ones(8, kept, 12, 12))
    )
    assert report.params_saved_elsewhere == (64 - kept) * 10
    saved = sum(row.flops_before - row.flops_after for row in report.sites)
    assert report.flops_before - report.flops_after == saved + report.flops_saved_elsewhere
    assert (report.flops_before, report.flops_after) == (
        count_flops(bottleneck, images[0]),
        count_flops(small, images[0]),
    )
    assert (report.params_before, report.params_after) == (count_parameters(bottleneck), count_parameters(small))


@pytest.mark.parametrize("factors", ["activations", "sensitivity"])
def test_the_objective_is_what_rows_lose_where_all_count_alike(bottleneck, images, factors):
    graph_module = balf_fx.prepare(bottleneck, images[0], factors=factors)
    balf_fx.calibrate(graph_module, images, progress=False)
    for step in (Score(factors), *([ScoreWidths()] if factors == "sensitivity" else []), Allocate(flops=0.5)):
        step(graph_module)
    report = balf_fx.report(graph_module)
    assert bool(report.widths) == (factors == "sensitivity")
    assert report.primal == pytest.approx(sum(1 - row.energy_kept for row in (*report.sites, *report.widths)))


def test_only_widths_that_have_shrunk_are_listed():
    curve = WidthCurve(tuple(float(16 - size) for size in range(17)), 1.0)
    queries, values = (Width(kind, "attention", 16, ("q", "k"), heads=4) for kind in ("queries", "values"))
    channels = Width("channels", "fc", 16, ("fc",))
    record = GraphRecord(flops=100, widths=(channels, queries, values), width_curves=(None, curve, curve))
    allocation = Allocation(
        "budget", "flops", 0.5, (), 0.25, 0.25, sizes={queries.key: 12, values.key: 16}, saved_elsewhere=Cost(20, 3)
    )
    report = Report.of(plan_of_records([record], allocation))
    assert report.widths == (WidthRow("attention", "queries", 16, 12, 4, 0.75),)
    assert (report.flops_after, report.params_saved_elsewhere) == (80, 3)
    assert "widths  1 narrower, 64 -> 48 features, which also save 20 FLOPs outside the sites" in str(report)


def test_the_table_shows_what_was_done(compressed):
    table = str(balf_fx.report(compressed))
    for piece in (
        "block.4",
        "16 x 144 x 2",
        "O x D x groups",
        "one output channel per group",
        "budget",
        "gap",
        "% kept",
    ):
        assert piece in table


def test_names_that_are_numbers_stay_as_they_are():
    model = nn.Sequential(nn.Sequential(*(nn.Linear(8, 8) for _ in range(11)), nn.Linear(8, 1))).eval()
    small = balf_fx.compile(model, torch.randn(2, 8, 8), flops=0.9, exclude=["0.10"], effort="fast", progress=False)
    lines = str(balf_fx.report(small)).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("0.")] == [
        *(f"0.{index}" for index in range(10)),
        "0.10",
        "0.11",
    ]


def test_one_is_singular(compressed):
    report = balf_fx.report(compressed)
    certificate = Certificate("disagreement", 0.1, 0.95, "flops", 1, (Tried(0.95, 0.0, 0.05),))
    timing = Timing("eager", "cpu", 1, 0.6, 0.5, 0.59, 0.61, 0.9, True, 0.02, 0.0122)
    text = str(dataclasses.replace(report, certificate=certificate, timing=timing))
    assert "0.00% on 1 sample, " in text
    assert "; 1 budget tried" in text
    assert "cpu, 1 thread)" in text


def test_identity_blocks_are_named():
    row = SiteRow("proj", "linear", 8, 8, 1, None, 9, 5, 9, 5, 0, 1, form="blocks")
    assert (row.rank_in_words, row.rank_share) == ("blocks", 1.0)


def test_ranks_of_divided_kernels_are_at_most_the_full_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.einsum("row,rih->oihw", torch.randn(20, 16, 3), torch.randn(20, 16, 3)) / 30)
    options = {"flops": 0.88, "separable": True, "effort": "fast", "progress": False}
    rows = balf_fx.report(balf_fx.compile(model, list(torch.randn(4, 8, 16, 12, 12)), **options)).sites
    assert {(row.form, row.full_rank) for row in rows} == {("separable", 48)}
    assert [row.rank_share for row in rows] == [row.rank / 48 for row in rows]
    assert all(16 < row.rank <= 48 for row in rows)


def test_widths_have_a_table_of_their_own(bottleneck, images):
    small = balf_fx.compile(bottleneck, images, flops=0.5, progress=False)
    report = balf_fx.report(small)
    before, table = str(dataclasses.replace(report, widths=())), str(report)
    for piece in ("features before", "heads", "1 narrower, 64 -> ", "FLOPs outside the sites"):
        assert piece in table
        assert piece not in before
    assert ["narrower" in line for line in table.splitlines() if line.startswith("expand")] == [
        row.is_only_narrower for row in report.sites if row.name == "expand"
    ]


def test_plain_data_survives_json(compressed):
    report = balf_fx.report(compressed)
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert data["flops_kept"] == report.flops_kept
    assert data["sites"][0]["name"] == "stem"


def test_reports_survive_a_round_trip(bottleneck, images):
    small = balf_fx.compile(bottleneck, images, flops=0.5, progress=False)
    report = balf_fx.report(small)
    assert report.widths
    data = json.loads(Plan.of(small).to_json())
    small.meta["balf"] = data
    assert balf_fx.report(small) == report
    for choice in data["allocation"]["choices"]:
        choice["spectrum"] = None  # a plan may hold no spectra
    bare = tuple(dataclasses.replace(row, spectrum=None) for row in report.sites)
    assert balf_fx.report(small) == dataclasses.replace(report, sites=bare)


def test_a_report_is_a_view_of_a_plan(compressed, tmp_path):
    plan = balf_fx.plan(compressed)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Report.of(plan) == balf_fx.report(compressed) == balf_fx.report(tmp_path / "plan.json")
    assert (plan.flops_kept, plan.params_kept) == (Report.of(plan).flops_kept, Report.of(plan).params_kept)
    assert [(row.name, row.rank) for row in Report.of(plan).sites] == list(plan.ranks.items())


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_spectra_tell_what_other_ranks_would_have_kept(conv_net, images, effort):
    report = balf_fx.report(balf_fx.compile(conv_net, images, flops=0.6, effort=effort, split=False, progress=False))
    assert any(row.rank is not None for row in report.sites)
    for row in report.sites:
        assert row.shape == f"{row.out_features} x {row.in_features} x {row.groups}"
        ranks, kept = row.spectrum.ranks, row.spectrum.kept
        assert (ranks[0], ranks[-1], kept[0], kept[-1]) == (0, min(row.out_features, row.in_features), 0.0, 1.0)
        assert list(kept) == sorted(kept)
        if row.rank in ranks:
            assert kept[ranks.index(row.rank)] == pytest.approx(row.energy_kept, abs=1e-5)
        assert row.rank_share == (1 if row.rank is None else row.rank / ranks[-1])


@pytest.mark.parametrize(
    ("rank", "share", "words"),
    [(None, 1.0, "dense"), (12, 0.5, "12"), ((4, None), 0.75, "4+dense"), ((2, 4), 0.375, "2+4")],
)
def test_ranks_as_shares_and_in_words(rank, share, words):
    outputs = 16 if isinstance(rank, tuple) else 24
    row = SiteRow("qkv", "linear", outputs, 48, 1, rank, 5, 5, 5, 5, 0, 1)
    assert (row.rank_share, row.rank_in_words) == (share, words)


def test_dense_sites_and_missing_budgets_are_shown(conv_net, images):
    report = balf_fx.report(balf_fx.compile(conv_net, images, allocation={"stem": 2}, progress=False))
    assert [row.rank for row in report.sites] == [2, None, None, None, None]
    assert "dense" in str(report)
    assert "no budget" in str(report)
    assert report.target is report.bound is report.gap is None


def test_a_module_of_another_origin_has_no_report():
    for module in (nn.Linear(2, 2), torch.fx.symbolic_trace(nn.Linear(2, 2))):
        with pytest.raises(PassError, match="nothing to report"):
            balf_fx.report(module)


def test_shares_of_flops_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.tiny, self.last = nn.Linear(16, 32), nn.Linear(32, 1), nn.Linear(32, 24)
            self.kept = nn.Linear(32, 32)

        def forward(self, x):
            x = self.kept(self.first(x).relu())
            return self.last(x) @ x[:, :24].mT * self.tiny(x)

    model, x = Net().eval(), torch.randn(10, 16)
    small = balf_fx.compile(model, x, flops=0.9, exclude=["kept"], effort="fast", progress=False)
    first, kept, tiny, last, product = (2 * 10 * n for n in (16 * 32, 32 * 32, 32, 32 * 24, 24 * 10))
    total = first + kept + tiny + last + product
    report = balf_fx.report(small)
    assert report.flops_before == total
    assert report.flops_in_sites == pytest.approx((first + last) / total)
    assert report.flops_refused == pytest.approx(
        {"excluded by the user": kept / total, "no rank is cheaper than the dense layer": tiny / total}
    )
