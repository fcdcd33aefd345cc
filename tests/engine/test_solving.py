"""What is counted for a plan is what the rewritten model has."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.graph.flops import count_flops

CENTRED = [True, False]
MODES = [False, "up", "full"]


class Fused(nn.Module):
    """Attention with one projection for queries, keys and values, and a gated pair of layers; only some have biases."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16, bias=False)
        self.qkv = nn.Linear(16, 48, bias=False)
        self.gate, self.up = nn.Linear(16, 48, bias=False), nn.Linear(16, 48)
        self.down = nn.Linear(48, 16, bias=False)

    def forward(self, x):
        x = x + F.relu(self.first(x))
        queries, keys, values = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def fused():
    return Fused().eval()


def compress(model, **options):
    batches = [torch.randn(4, 9, 16) + 0.5 for _ in range(4)]
    return balf_fx.compile(model, batches, progress=False, **options), batches[0]


def check_costs(compressed, batch):
    report = balf_fx.report(compressed)
    assert report.params_after == sum(parameter.numel() for parameter in compressed.parameters())
    assert report.flops_after == count_flops(compressed, batch)


@pytest.mark.parametrize("centred", CENTRED)
@pytest.mark.parametrize("mode", MODES)
def test_a_refit_adds_no_bias_that_was_not_counted(fused, mode, centred):
    ranks = {"first": 2, "qkv": (None, 4, 4), "gate": 6}
    compressed, batch = compress(fused, allocation=ranks, refit=mode, centred=centred)
    check_costs(compressed, batch)
    state = compressed.state_dict()
    biased = {name[: -len(".bias")] for name in state if name.endswith((".bias", "_bias"))}  # also those added apart
    assert biased == {"up"} | ({"first.1", "gate.1", "qkv.1.1", "qkv.1.2"} if centred else set())
