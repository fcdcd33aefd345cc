"""Without a budget, what is free is removed, for any input."""

import pytest
import torch
from architectures import make
from torch import nn

import balf_fx
from balf_fx.errors import OptionError


def deficient(rank=20):
    """Three layers, of which the second is of low rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        left, _ = torch.linalg.qr(torch.randn(64, rank))
        model[2].weight.copy_(left @ torch.randn(rank, 64))
    return model


def test_a_layer_of_low_rank_gets_its_rank_whatever_calibration_saw():
    model, batches = deficient(), [torch.zeros(4, 48)]
    small = balf_fx.compile(model, batches, progress=False)
    assert balf_fx.plan(small).ranks == {"0": None, "2": 20, "4": None}
    inputs = 10 * torch.randn(500, 48)
    torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    report = balf_fx.report(small)
    assert report.flops_kept < 1
    assert "no budget, allocation free" in str(report)


def test_nothing_is_free_in_a_layer_of_full_rank():
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    small = balf_fx.compile(model, torch.randn(2, 8, 48), progress=False)
    assert set(balf_fx.plan(small).ranks.values()) == {None}
    assert balf_fx.report(small).flops_kept == 1.0


def test_heads_of_attention_get_identity_blocks():
    model, batches = make("unfused", torch.float64, count=2)
    small = balf_fx.compile(model, batches, progress=False)
    assert balf_fx.report(small).flops_kept < 1
    torch.testing.assert_close(small(batches[1]), model(batches[1]), rtol=1e-6, atol=1e-6)


def test_noise_above_rounding_is_kept():
    model = deficient()
    with torch.no_grad():
        model[2].weight.add_(1e-4 * torch.randn(64, 64))
    small = balf_fx.compile(model, torch.randn(2, 8, 48), progress=False)
    assert balf_fx.plan(small).ranks["2"] is None


def test_the_same_from_a_prepared_graph():
    model, batches = deficient(), [torch.randn(4, 48)]
    graph = balf_fx.prepare(model, batches[0])
    small = balf_fx.convert(graph, progress=False)
    assert balf_fx.plan(small).ranks == balf_fx.plan(balf_fx.compile(model, batches, progress=False)).ranks


@pytest.mark.parametrize("options", [{"refit": True}, {"factors": "sensitivity"}])
def test_what_needs_a_loss_needs_a_budget(options):
    with pytest.raises(OptionError, match="give a budget"):
        balf_fx.compile(deficient(), [torch.randn(4, 48)], **options)
