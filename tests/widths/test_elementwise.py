"""One function in several writings: each has the same widths, and becomes the same compressed model."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import balf_fx
from balf_fx.graph.annotation import graph_record


@fx.wrap
def stochastic_depth(x, p, mode, training=True):
    """As torchvision has it."""
    assert not training
    return x


class Branch(nn.Module):
    """A residual branch behind an operation that does nothing in deployment."""

    def __init__(self, drop) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.last, self.drop = nn.Linear(32, 10), drop

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.drop(self.down(self.drop(F.relu(self.up(x))))))


DROPS = {
    "dropout": nn.Dropout(0.5),
    "feature alpha dropout": nn.FeatureAlphaDropout(0.5),
    "stochastic depth": lambda x: stochastic_depth(x, 0.5, "row", training=False),
}


def same(made, one, other, capture):
    """Whether both writings of a model have the same widths, and become the same model with fewer features."""
    data = [torch.randn(64, 6, 12, generator=torch.Generator().manual_seed(0))]
    records = [
        graph_record(balf_fx.prepare(made(how).eval(), data[0], factors="sensitivity", capture=capture))
        for how in (one, other)
    ]
    found = [[(each.kind, each.layer_names) for each in (*own.widths, *own.orderable)] for own in records]
    options = {"effort": "balanced", "progress": False, "capture": capture, "flops": 0.4}
    small = [balf_fx.compile(made(how).eval(), data, **options) for how in (one, other)]
    torch.testing.assert_close(small[1](data[0]), small[0](data[0]), rtol=1e-3, atol=1e-4)
    return found[0] == found[1] and bool(found[0]) and any(each.is_narrower for each in balf_fx.plan(small[1]).widths)


@pytest.mark.parametrize("drop", DROPS)
def test_features_pass_what_does_nothing_in_deployment(drop):
    assert same(Branch, nn.Identity(), DROPS[drop], "symbolic_trace")
