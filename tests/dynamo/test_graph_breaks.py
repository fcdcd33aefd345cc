"""Models that Dynamo captures in several graphs: one budget, one set of weights."""

from __future__ import annotations

import copy

import torch
from dynamo.helpers import STEPS, Broken, Looped, calibrated, compiled, make_offline, ranks
from torch import nn

import balf_fx


def test_sensitivity_across_graph_breaks(tokens):
    model = Broken().eval()
    small = calibrated(model, tokens, factors="sensitivity")
    with torch.no_grad():
        error = (small(tokens[3]) - model(tokens[3])).square().sum()
    assert balf_fx.report(small).flops_kept <= 0.5
    assert 0 < error < model(tokens[3]).square().sum()


def test_graph_breaks_share_one_budget(tokens):
    model = Broken().eval()
    small = calibrated(model, tokens, pivot=False)  # no order is free where a graph ends
    with torch.no_grad():
        small(tokens[0])
    report = balf_fx.report(small)
    offline = balf_fx.compile(
        nn.Sequential(model.first, nn.ReLU(), model.second), tokens[:STEPS], flops=0.5, effort="fast", pivot=False
    )
    assert list(ranks(report).values()) == list(ranks(balf_fx.report(offline)).values())
    assert list(ranks(report)) == ["first", "second"]
    assert report.flops_before == 2 * 2 * 40 * 32 * 64


def test_layers_that_share_a_graph_have_factors_of_their_own(tokens):
    model = Looped().eval()
    small = compiled(model, pivot=False)
    with torch.no_grad():
        for batch in tokens[:STEPS]:
            torch.testing.assert_close(small(batch), model(batch), rtol=0, atol=0)
        got = small(tokens[3])
        assert torch.equal(got, small(tokens[3]))
    report = balf_fx.report(small)
    assert len(report.sites) == len(set(ranks(report))) == 6
    assert report.flops_before == 3 * 2 * 2 * 40 * 32 * 64
    offline = make_offline(copy.deepcopy(model), tokens[:STEPS], capture="symbolic_trace", pivot=False)
    assert sorted(map(str, ranks(report).values())) == sorted(map(str, ranks(balf_fx.report(offline)).values()))
    torch.testing.assert_close(got, offline(tokens[3]))


def test_patterns_may_match_in_one_graph_only(tokens):
    small = calibrated(Broken().eval(), tokens, flops=0.9, include=["second"])
    with torch.no_grad():
        small(tokens[0])
    assert list(ranks(balf_fx.report(small))) == ["second"]


def test_a_tied_weight_is_kept_for_the_embedding():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(64, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x).relu())

    model = Tied().eval()
    ids = torch.randint(64, (4, 6))
    small = calibrated(model, [ids] * STEPS)
    with torch.no_grad():
        output = small(ids)
        features = model.embedding(ids).relu()
    assert output.shape == (4, 6, 64)
    report = balf_fx.report(small)
    assert report.params_after > report.params_before
    assert (output - features @ model.head.weight.T).norm() < 0.7 * output.norm()
