import copy
import pickle

import pytest
import torch
from torch import nn

import balf_fx

X = torch.randn(16, 8)


class Indexed(nn.Module):
    """Computes something from buffers and constants alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x):
        return self.b(self.a(x).relu())[:, [4, 3, 7]] * (self.scale[:3] + 1).exp()


class Counting(Indexed):
    def forward(self, x):
        self.scale.add_(1)
        return self.a(x).sum() + self.scale.sum()


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_a_pickled_copy_has_the_same_state(capture):
    small = balf_fx.compile(Indexed(), X, params=0.8, capture=capture, effort="fast", progress=False)
    again = pickle.loads(pickle.dumps(small))
    assert list(again.state_dict()) == list(small.state_dict())
    assert torch.equal(again(X), small(X))
    for name, buffer in small.named_buffers():
        if buffer.is_floating_point():
            buffer.mul_(2)
            again.get_buffer(name).mul_(2)
    assert torch.equal(again(X), small(X))


def test_a_pickled_copy_goes_on_counting():
    model = Counting()
    small = balf_fx.compile(model, X, params=1.0, effort="fast", progress=False)
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        expected = copy.deepcopy(model)
        for _ in range(2):
            torch.testing.assert_close(again(X), expected(X))
