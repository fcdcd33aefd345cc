import json

import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.errors import PassError


@pytest.fixture
def compressed(conv_net, images):
    return balf_fx.compile(conv_net, images, flops=0.6, exclude=["head"], progress=False)


def test_rows_and_totals_add_up(compressed):
    report = balf_fx.report(compressed)
    saved = sum(row.flops_before - row.flops_after for row in report.sites)
    assert report.flops_before - report.flops_after == saved
    assert report.flops_kept == report.flops_after / report.flops_before <= 0.6
    assert report.primal == pytest.approx(sum(1 - row.energy_kept for row in report.sites))
    assert 0 <= report.gap == pytest.approx(report.primal - report.bound)
    assert {row.name: row.reason for row in report.refused} == {
        "block.3": "one output channel per group (O x D x groups = 1 x 9 x 32)",
        "head": "excluded by the user (matches exclude)",
    }


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


def test_plain_data_survives_json(compressed):
    report = balf_fx.report(compressed)
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert data["flops_kept"] == report.flops_kept
    assert data["sites"][0]["name"] == "stem"


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
