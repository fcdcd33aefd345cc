"""ScaleLogits multiplies one output, whatever was written in place of the layer that computes it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.errors import PassError
from balf_fx.graph.annotation import graph_record, record_graph
from balf_fx.graph.fingerprint import Fingerprint
from balf_fx.passes import Allocate, Factorize, FindPivots, Pivot, RemoveObservers, ScaleLogits, Score, SplitBias

FACTOR = 0.7


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 30)

    def forward(self, x):
        x = self.norm(F.relu(self.body(x)))
        return x.mean(0), self.head(x)


def rewritten(rank, pivots, apart):
    """A graph whose head has a rank, None for a dense one."""
    model, batch = Net().eval(), torch.randn(40, 24)
    graph_module = balf_fx.prepare(model, batch)
    graph_module(batch)
    with torch.no_grad():
        passes = [FindPivots(move=0)] if pivots else []
        passes += [
            Score("activations"),
            Allocate(ranks={"body": 8, "head": rank if rank is None or pivots else min(rank, 12)}),
            RemoveObservers(),
        ]
        passes += [Pivot()] if pivots else []
        for each in [*passes, Factorize(), *([SplitBias()] if apart else [])]:
            each(graph_module)
    return graph_module, batch


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("pivots", [False, True])
@pytest.mark.parametrize("rank", [None, 3, 20])
def test_one_output_is_multiplied(rank, pivots, apart):
    graph_module, batch = rewritten(rank, pivots, apart)
    before = graph_module(batch)
    held = {id(parameter): parameter.detach().clone() for parameter in graph_module.parameters()}
    old = list(graph_module.parameters())
    assert ScaleLogits(FACTOR, output=1)(graph_module).modified
    mean, logits = graph_module(batch)
    assert torch.equal(mean, before[0])
    torch.testing.assert_close(logits, FACTOR * before[1])
    assert all(torch.equal(parameter, held[id(parameter)]) for parameter in old)  # new ones are in their place


def test_a_pass_that_finds_nothing_is_an_error():
    graph_module, _ = rewritten(3, False, False)
    with pytest.raises(PassError, match="output 0"):
        ScaleLogits(FACTOR)(graph_module)  # what scales the mean scales what the head reads, too


@pytest.mark.parametrize("rank", [None, 3])
def test_where_graphs_share_layers_the_head_is_one_that_is_replaced(rank):
    graph_module, batch = rewritten(rank, False, False)
    before, weight = graph_module(batch), Fingerprint.of(Net().head.weight, Net().head.bias)
    ScaleLogits(FACTOR, output=1, shared=True)(graph_module)
    mean, logits = graph_module(batch)
    assert torch.equal(mean, before[0])
    torch.testing.assert_close(logits, FACTOR * before[1])
    (head,) = (layer for layer in graph_record(graph_module).replaced if layer.name == "head")
    assert head.rank == rank
    assert head.fingerprint.shape == weight.shape


def test_where_graphs_share_layers_a_norm_stays():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    graph_module = torch.fx.symbolic_trace(model)
    assert ScaleLogits(FACTOR).parameters(graph_module)
    assert not ScaleLogits(FACTOR, shared=True).parameters(graph_module)


def test_parameters_of_the_users_model_are_recorded():
    graph_module, _ = rewritten(None, False, False)
    record_graph(graph_module, modules={"head": "layer"}, parameters=frozenset(("head.weight", "head.bias")))
    ScaleLogits(FACTOR, output=1)(graph_module)
    assert graph_record(graph_module).constants == ("head.weight", "head.bias")
    graph_module, _ = rewritten(3, False, False)
    record_graph(graph_module, modules={"head": "layer"})
    ScaleLogits(FACTOR, output=1)(graph_module)
    assert graph_record(graph_module).constants == ()  # it goes back with the layer that was replaced
    graph_module, _ = rewritten(None, False, False)
    record_graph(graph_module, modules={"head": "layer"})
    assert ScaleLogits(FACTOR, output=1).parameters(graph_module) == ()


def test_half_precision_is_multiplied_in_single_precision():
    model = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16).requires_grad_(False)
    graph_module = torch.fx.symbolic_trace(model)
    weight = model[0].weight.clone()
    ScaleLogits(FACTOR)(graph_module)
    new = graph_module.get_submodule("0").weight
    assert new.dtype == torch.bfloat16
    assert not new.requires_grad
    assert torch.equal(new, (weight.float() * FACTOR).to(torch.bfloat16))
