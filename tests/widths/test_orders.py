import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.graph.annotation import graph_record


class Stream(nn.Module):
    """A residual stream that is normalised before a layer reads it."""

    def __init__(self, normalise) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.gain, self.offset = nn.Parameter(torch.rand(32) + 0.5), nn.Parameter(torch.rand(32))
        self.normalise = normalise

    def forward(self, x):
        x = self.first(x)
        x = x + self.second(self.normalise(x, self.gain, self.offset))
        return self.last(x)


PLAIN = {
    "rms_norm": lambda x, gain, offset: F.rms_norm(x, (32,), gain),
    "layer_norm": lambda x, gain, offset: F.layer_norm(x, (32,), gain, offset),
}
COMPUTED = {
    "a cast gain": lambda x, gain, offset: F.rms_norm(x.float(), (32,), gain.float()),
    "a gain by keyword": lambda x, gain, offset: F.rms_norm(x, (32,), weight=gain * 2.0),
    "a computed offset": lambda x, gain, offset: F.layer_norm(x, (32,), gain, offset + 1.0),
}


def stream(normalise):
    torch.manual_seed(0)
    return Stream(normalise).eval(), torch.randn(64, 16)


@pytest.mark.parametrize("name", PLAIN)
def test_a_normalised_stream_may_change_its_order(name):
    model, x = stream(PLAIN[name])
    (width,) = graph_record(balf_fx.prepare(model, x)).orderable
    assert (set(width.producers), width.features) == ({"first", "second"}, 32)


@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("name", COMPUTED)
def test_a_gain_that_the_graph_computes_keeps_the_order(name, effort):
    model, x = stream(COMPUTED[name])
    assert not graph_record(balf_fx.prepare(model, x)).orderable
    small = balf_fx.compile(model, [x], flops=0.9, effort=effort, progress=False)
    assert balf_fx.report(small).flops_kept <= 0.9
    torch.testing.assert_close(balf_fx.compile(model, [x], flops=1.0, effort=effort, progress=False)(x), model(x))
