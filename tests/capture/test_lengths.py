"""Models that ask for `len` of a tensor: their exported graphs take batches of any size."""

import builtins

import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.capture.lengths import symbolic_lengths
from balf_fx.capture.normal_form import capture


def flat(value):
    return value.view(len(value), -1)


class WithClass(nn.Module):
    """A token for the class is repeated for each sample, by a method and by a function."""

    def __init__(self):
        super().__init__()
        self.token, self.layer = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 8)
        self.head, self.sizes = nn.Linear(40, 3), [1, 2]

    def forward(self, x):
        tokens = self.token.expand(len(x), -1, -1)
        return self.head(flat(self.layer(torch.cat([tokens, x], 1)))) * len(self.sizes)


@pytest.mark.parametrize("method", ["auto", "export"])
def test_batches_of_other_sizes_run(method):
    model = WithClass().eval()
    graph_module = capture(model, torch.randn(6, 4, 8), method=method)
    for count in (1, 2, 5, 6, 9):
        x = torch.randn(count, 4, 8)
        assert torch.equal(graph_module(x), model(x))


def test_a_compressed_model_takes_other_batches():
    model = WithClass().eval()
    small = balf_fx.compile(model, torch.randn(64, 4, 8), flops=0.8, progress=False)
    assert small(torch.randn(3, 4, 8)).shape == (3, 3)


class Each(nn.Module):
    """A loop over samples fixes their number, which the graph asserts."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return torch.stack([self.layer(x[index]) for index in range(len(x))])


def test_a_loop_over_samples_fixes_their_number():
    model, x = Each().eval(), torch.randn(3, 8)
    graph_module = capture(model, x)
    torch.testing.assert_close(graph_module(x), model(x))
    with pytest.raises(AssertionError, match="had size 3 in dimension 0"):
        graph_module(torch.randn(4, 8))


def test_len_is_the_builtin_one_again_afterwards():
    with symbolic_lengths(WithClass()):
        assert "len" in globals()
        assert len([1, 2]) == 2
        assert len(torch.zeros(3, 2)) == 3
        with pytest.raises(TypeError):
            len(torch.tensor(1.0))
    assert len is builtins.len
    assert "len" not in globals()
