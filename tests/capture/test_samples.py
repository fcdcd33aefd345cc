"""Samples in another dimension than the first: the result is that of a model whose samples come first."""

import copy

import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.capture.normal_form import capture
from balf_fx.graph.annotation import annotation
from balf_fx.graph.layers import layers_of


class Sequences(nn.Module):
    """Takes [N, L, F], and computes with [L, N, F] inside where `first` is given."""

    def __init__(self, first):
        super().__init__()
        self.first = first
        self.before, self.after, self.head = nn.Linear(16, 48), nn.Linear(48, 16), nn.Linear(16, 4)

    def forward(self, x, attention_mask=None):
        x = x.transpose(0, 1) if self.first else x
        x = x + self.after(self.before(x).relu())
        x = x.transpose(0, 1) if self.first else x
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1)
        return self.head(x.sum(1))


def pair():
    torch.manual_seed(0)
    model = Sequences(first=False).eval()
    with torch.no_grad():
        model.before.weight[20:] *= 0.1
    other = Sequences(first=True).eval()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    return model, other


def dimensions(model, x, method):
    graph_module = capture(model, x, method=method)
    return {name: annotation(nodes[0]).samples for name, (_, nodes) in layers_of(graph_module).items()}


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize("length", [5, 12, 6])
def test_the_dimension_is_found(method, length):
    """With 6 samples, 12 positions might be 6 times two windows, and 6 of them say nothing at all."""
    model, other = pair()
    x = torch.randn(6, length, 16)
    assert dimensions(model, x, method) == {"before": 0, "after": 0, "head": 0}
    assert dimensions(other, x, method) == {"before": 1, "after": 1, "head": 0}


class Fixed(nn.Module):
    """Runs on 6 samples alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x.reshape(6, -1, 8).transpose(0, 1))


@pytest.mark.parametrize(("length", "dimension"), [(5, 1), (12, 0)])
def test_where_fewer_samples_cannot_run_sizes_decide(length, dimension):
    assert dimensions(Fixed().eval(), torch.randn(6, length, 8), "symbolic_trace") == {"layer": dimension}


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_result_is_that_of_samples_first(effort, masked):
    batches = [{"x": torch.randn(count, 9, 16)} for count in (32, 32, 16)]
    if masked:
        for batch in batches:
            batch["attention_mask"] = (torch.arange(9) < torch.randint(3, 10, (len(batch["x"]), 1))).float()
    found = []
    for model in pair():
        small = balf_fx.compile(model, batches, flops=0.5, effort=effort, progress=False)
        found.append(([each.rank for each in balf_fx.report(small).sites], small(**batches[0])))
    (ranks, output), (others, other) = found
    assert ranks == others
    torch.testing.assert_close(output, other, rtol=1e-4, atol=1e-4)


class Attention(nn.Module):
    """Heads of `nn.MultiheadAttention`, which puts positions first inside, or the same written with samples first."""

    def __init__(self, stock):
        super().__init__()
        self.stock = stock
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        if self.stock:
            found = self.attention(x, x, x, need_weights=False)[0]
        else:
            heads = self.attention
            states = nn.functional.linear(x, heads.in_proj_weight, heads.in_proj_bias)
            query, key, value = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in states.chunk(3, -1))
            mixed = nn.functional.scaled_dot_product_attention(query, key, value)
            found = heads.out_proj(mixed.transpose(1, 2).flatten(2))
        return self.head((x + found).relu().mean(1))


def test_the_attention_of_torch_is_as_that_of_others():
    torch.manual_seed(1)
    stock = Attention(stock=True).eval()
    written = Attention(stock=False).eval()
    written.load_state_dict(stock.state_dict())
    batches = torch.randn(64, 12, 16).cumsum(1).split(32)
    small, other = (
        balf_fx.compile(model, batches, flops=0.6, effort="best", capture="export", progress=False)
        for model in (stock, written)
    )
    assert [each.rank for each in balf_fx.report(small).sites] == [each.rank for each in balf_fx.report(other).sites]
    torch.testing.assert_close(small(batches[0]), other(batches[0]), rtol=1e-3, atol=1e-3)
