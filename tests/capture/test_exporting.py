"""Exported graphs: what export adds to the model's own operations is taken out again."""

import copy
import pickle

import pytest
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


class Branching(nn.Module):
    """Its code asks for the number of samples."""

    def __init__(self, asks):
        super().__init__()
        self.layer, self.asks = nn.Linear(16, 16), asks

    def forward(self, x):
        y = self.layer(x)
        return 2 * y if self.asks(x.shape[0]) else y


@pytest.mark.parametrize(
    ("asks", "allowed"),
    [
        (lambda n: n == 1, {2, 3, 4, 5, 7}),
        (lambda n: n % 2 == 0, {4}),
        (lambda n: n != 5, {1, 2, 3, 4}),
        (lambda n: n > 3, {4, 5, 7}),
        (lambda n: n > 0, {1, 2, 3, 4, 5, 7}),
    ],
    ids=["one", "even", "not 5", "more than 3", "any"],
)
def test_batches_for_which_the_code_takes_another_branch_are_refused(asks, allowed):
    model = Branching(asks).eval()
    graph_module = capture(model, torch.randn(4, 16), method="export")
    for samples in (1, 2, 3, 4, 5, 7):
        x = torch.randn(samples, 16)
        if samples in allowed:
            torch.testing.assert_close(graph_module(x), model(x))
        else:
            with pytest.raises(AssertionError, match="'x' "):
                graph_module(x)


def test_batches_may_be_of_any_size_where_no_condition_fails():
    model = Branching(lambda n: (49 * n) % 7 == 0).eval()
    graph_module, x = capture(model, torch.randn(4, 16), method="export"), torch.randn(3000, 16)
    torch.testing.assert_close(graph_module(x), model(x))
