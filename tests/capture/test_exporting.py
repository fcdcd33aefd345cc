"""Exported graphs: what export adds to the model's own operations is taken out again."""

import copy
import pickle

import torch
from torch import nn

import balf_fx
from balf_fx.capture.normal_form import capture


class Constants(nn.Module):
    """An index list and a tensor in the code; one of them is written to, so that each call needs a copy of it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = self.last(self.first(x).relu())[:, [4, 8, 7]] + torch.tensor([1.0, 2.0, 3.0])
        total = torch.tensor([0.0, 1.0, 0.0])
        total.add_(x.mean(0))
        return x + total


def test_each_call_starts_from_the_constant_itself():
    model, x = Constants().eval(), torch.randn(64, 16)
    small = balf_fx.compile(model, x, flops=0.6, capture="export", progress=False)
    expected = small(x)
    for other in (copy.deepcopy(small), small):
        assert torch.equal(other(x), expected)
    whole = balf_fx.compile(model, x, flops=1.0, capture="export", progress=False)
    torch.testing.assert_close(whole(x), model(x))


def test_a_pickled_copy_has_the_same_constants():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 32)

        def forward(self, x):
            return self.layer(x)[:, [4, 8, 7]] * torch.tensor([1.0, 2.0, 3.0])

    small = balf_fx.compile(Indexed().eval(), torch.randn(8, 16), flops=0.6, capture="export", progress=False)
    assert set(pickle.loads(pickle.dumps(small)).state_dict()) == set(small.state_dict())


class Turned(nn.Module):
    """What is viewed is made contiguous before."""

    def forward(self, x):
        return x.transpose(1, 2).contiguous().view(len(x), 48)


def test_values_may_lie_in_memory_otherwise_than_the_examples():
    x = torch.randn(4, 8, 6)
    graph_module = capture(Turned().eval(), x.transpose(1, 2), method="export")
    for value in (x.transpose(1, 2), x.transpose(1, 2).contiguous()):
        assert torch.equal(graph_module(value), x.flatten(1))
