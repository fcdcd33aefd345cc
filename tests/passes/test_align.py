import math

import pytest
import torch
from architectures import make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import balf_fx
from balf_fx.errors import OptionError
from balf_fx.graph.annotation import graph_record, sites
from balf_fx.graph.curves import Spectrum, each_rank
from balf_fx.graph.site import Site
from balf_fx.latency import table
from balf_fx.latency.table import Table
from balf_fx.passes import Align, FindWidths
from balf_fx.ranks.costs import rank_curve


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
@pytest.mark.parametrize("budget", [{"flops": 0.6}, {"params": 0.6}])
@pytest.mark.parametrize("name", ["mlp", "transformer", "inverted residual"])
def test_ranks_and_widths_are_multiples_where_they_change(name, budget, effort):
    model, batches = make(name, count=3)
    small = balf_fx.compile(model, batches, **budget, effort=effort, multiple_of=4, strict=False, progress=False)
    plan = balf_fx.plan(small)
    ranks = [rank for choice in plan.allocation.choices for rank in each_rank(choice.chosen.rank) if rank is not None]
    sizes = [width.size for width in plan.widths if width.size != width.features]
    assert ranks or sizes
    assert not [number for number in (*ranks, *sizes) if number % 4]
    again = balf_fx.compile(model, batches, allocation=plan, effort=effort, progress=False)
    torch.testing.assert_close(again(batches[0]), small(batches[0]))


def test_groups_count_together():
    model = nn.Sequential(nn.Conv2d(32, 64, 3, groups=4)).eval()
    batches = [torch.randn(8, 32, 6, 6)]
    small = balf_fx.compile(model, batches, flops=0.5, multiple_of=8, effort="fast", progress=False)
    (choice,) = balf_fx.plan(small).allocation.choices
    assert choice.chosen.rank % 2 == 0
    assert small.get_submodule("0.0").out_channels % 8 == 0


def test_another_multiple_does_not_add_to_the_last():
    model = nn.Sequential(nn.Linear(48, 48)).eval()
    prepared = balf_fx.prepare(model, torch.randn(64, 48))
    prepared(torch.randn(64, 48))
    ranks = [
        balf_fx.report(balf_fx.convert(prepared, flops=0.6, multiple_of=step, progress=False)).sites[0].rank
        for step in (5, 7, 1)
    ]
    plain = balf_fx.report(balf_fx.convert(prepared, flops=0.6, progress=False)).sites[0].rank
    assert ranks == [plain // 5 * 5, plain // 7 * 7, plain]


@settings(max_examples=30)
@given(st.integers(2, 5), st.integers(0, 1000))
def test_the_parts_have_the_best_multiples(step, seed):
    """Brute force: no ranks of the parts that are multiples lose less at the same cost or less."""
    generator = torch.Generator().manual_seed(seed)
    energies = torch.rand(2, 12, generator=generator, dtype=torch.float64).sort(-1, descending=True).values
    parts = Spectrum(energies, torch.eye(12, dtype=torch.float64).expand(2, 12, 12), None)
    joint = Spectrum(torch.full((1, 24), 9.0, dtype=torch.float64), torch.eye(24, dtype=torch.float64)[None], None)
    site = Site("both", "linear", "both.weight", None, 1, 24, 40, parts=2, multiple_of=step)
    curve = rank_curve(site, joint, 2 * 24 * 40, 24, parts)
    split = [each for each in curve.candidates if isinstance(each.rank, tuple)]
    possible = [None, *range(step, 12, step)]
    for first in possible:
        for second in possible:
            lost = sum(
                float(row[rank:].sum()) for row, rank in zip(energies, (first, second), strict=True) if rank is not None
            )
            cost = sum(12 * 40 if rank is None else rank * 52 for rank in (first, second))
            if (first, second) != (None, None) and cost < 24 * 40:
                assert any(each.params <= cost and each.distortion <= lost + 1e-12 for each in split)
    assert all(rank is None or rank % step == 0 for each in split for rank in each.rank)


@pytest.mark.parametrize("wrong", [0, -8, 2.0, True, "8", None])
def test_what_is_no_multiple_is_refused(wrong):
    with pytest.raises(OptionError, match="multiple_of must be a whole number of at least 1"):
        Align(wrong)
    with pytest.raises(OptionError, match="multiple_of"):
        balf_fx.compile(nn.Linear(8, 8), [torch.randn(4, 8)], flops=0.5, multiple_of=wrong)


def test_explicit_ranks_have_to_fit():
    model, batches = nn.Sequential(nn.Linear(32, 32)).eval(), [torch.randn(64, 32)]
    with pytest.raises(OptionError, match="from 8 to 8 in steps of 8, or None"):
        balf_fx.compile(model, batches, allocation={"0": 10}, multiple_of=8, progress=False)


@pytest.fixture
def padding_to_16(monkeypatch):
    """Kernels that pad their outputs to multiples of sixteen."""

    def seconds(run):
        return 1e-9 * run.inputs * math.ceil(run.outputs / 16) * 16

    monkeypatch.setattr(table, "_seconds", seconds)


def test_auto_measures_what_each_layer_prefers(padding_to_16):
    model = nn.Sequential(nn.Linear(256, 320), nn.ReLU(), nn.Linear(320, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    prepared = balf_fx.prepare(model, torch.randn(32, 256))
    FindWidths()(prepared)
    Align("auto", Table())(prepared)
    steps = {site.name: site.multiple_of for site in sites(prepared)}
    assert steps == {"0": 16, "2": 16, "4": 2}  # a quarter of ten features
    assert {width.name: width.step for width in graph_record(prepared).widths} == {"2": 16}


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_auto_is_an_option_like_a_number(padding_to_16, effort):
    model = nn.Sequential(nn.Linear(256, 320), nn.ReLU(), nn.Linear(320, 256)).eval()
    batches = [torch.randn(64, 256) for _ in range(3)]
    small = balf_fx.compile(model, batches, flops=0.5, multiple_of="auto", effort=effort, progress=False)
    plan = balf_fx.plan(small)
    numbers = [choice.chosen.rank for choice in plan.allocation.choices if choice.chosen.rank is not None]
    numbers += [width.size for width in plan.widths if width.is_narrower]
    assert numbers
    assert not [number for number in numbers if number % 16]


def test_auto_keeps_all_sizes_where_no_multiple_is_faster(monkeypatch):
    monkeypatch.setattr(table, "_seconds", lambda run: 1e-9 * run.inputs * run.outputs)
    prepared = balf_fx.prepare(nn.Sequential(nn.Linear(256, 256)).eval(), torch.randn(4, 256))
    Align("auto", Table())(prepared)
    assert [site.multiple_of for site in sites(prepared)] == [1]
