import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.graph.annotation import annotation
from balf_fx.refit.targets import limits_of, within_limits


@given(st.integers(0, 1000), st.sampled_from([(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)]))
def test_errors_beyond_the_limits_are_none(seed, limits):
    target, predicted = 6 * torch.randn(2, 50, generator=torch.Generator().manual_seed(seed))
    low, high = limits
    wanted = within_limits(target, predicted, limits)
    within = (target > low) & (target < high)
    assert torch.equal(wanted[within], target[within])
    assert torch.equal(wanted[target <= low], predicted[target <= low].clamp_max(low))
    assert torch.equal(wanted[target >= high], predicted[target >= high].clamp_min(high))
    torch.testing.assert_close(wanted.clamp(low, high), target.clamp(low, high), rtol=0, atol=0)


class Clipped(nn.Module):
    def __init__(self, clip) -> None:
        super().__init__()
        self.first, self.second, self.clip = nn.Linear(8, 24), nn.Linear(24, 6), clip

    def forward(self, x):
        return self.second(self.clip(self.first(torch.tanh(x))))


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize(
    ("clip", "limits"),
    [
        (nn.ReLU(), (0.0, math.inf)),
        (nn.ReLU6(inplace=True), (0.0, 6.0)),
        (nn.Hardtanh(-0.5, 0.5), (-0.5, 0.5)),
        (nn.Sequential(nn.Dropout(), nn.ReLU6()), (0.0, 6.0)),
        (F.relu6, (0.0, 6.0)),
        (lambda x: F.hardtanh(x, max_val=0.25), (-1.0, 0.25)),
        (nn.Hardswish(inplace=True), (-3.0, math.inf)),
        (F.hardsigmoid, (-3.0, 3.0)),
        (lambda x: x.unflatten(-1, (2, 12)).mT.relu().mT.flatten(1), (0.0, math.inf)),
        (lambda x: torch.relu_(x + x), None),
        (nn.GELU(), None),
    ],
)
def test_limits_are_known(clip, limits, capture):
    prepared = balf_fx.prepare(Clipped(clip).eval(), torch.randn(4, 8), capture=capture)
    (node,) = [node for node in prepared.graph.nodes if annotation(node).site and annotation(node).site.name == "first"]
    assert limits_of(prepared, node) == limits
