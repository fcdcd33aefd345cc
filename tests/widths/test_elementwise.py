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


class Stream(nn.Module):
    """A residual stream of tokens, pooled over its positions."""

    def __init__(self, pool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 10)
        self.up, self.down, self.pool = nn.Linear(16, 48), nn.Linear(48, 16), pool

    def forward(self, x):
        x = self.first(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.last(self.pool(x))


class Hidden(nn.Module):
    """Hidden features that are pooled before a layer reads them."""

    def __init__(self, pool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(12, 48), nn.Linear(48, 10)
        self.pool = pool

    def forward(self, x):
        return self.last(self.pool(F.relu(self.first(x))))


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


POOLS = {
    "one axis": lambda x: x.mean(1),
    "by keyword": lambda x: torch.mean(x, dim=1),
    "by numpy's keyword": lambda x: torch.mean(x, axis=1),
    "two axes": lambda x: x.unflatten(1, (2, -1)).mean((1, 2)),
    "kept and picked": lambda x: x.mean(dim=1, keepdim=True)[:, 0],
    "kept and squeezed": lambda x: x.mean(1, keepdim=True).squeeze(1),
    "pixels picked": lambda x: F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (2, -1)), 1)[:, :, 0, 0],
    "a sum": lambda x: x.sum(1) / x.shape[1],
}
DROPS = {
    "dropout": nn.Dropout(0.5),
    "feature alpha dropout": nn.FeatureAlphaDropout(0.5),
    "stochastic depth": lambda x: stochastic_depth(x, 0.5, "row", training=False),
}


LAYOUTS = {
    "mT": (lambda x: x.transpose(1, 2).transpose(1, 2), lambda x: x.mT.mT),
    "swapdims": (lambda x: x.transpose(0, 1), lambda x: x.swapdims(0, 1)),
    "moveaxis": (lambda x: x.transpose(0, 1), lambda x: torch.moveaxis(x, 0, 1)),
    "roll": (lambda x: x[:, [4, 5, 0, 1, 2, 3]], lambda x: x.roll(2, 1)),
    "padding": (lambda x: F.pad(x.transpose(1, 2), (0, 2)).transpose(1, 2), lambda x: F.pad(x, (0, 0, 0, 2))),
    "a value of the same type": (lambda x: x, lambda x: x + x.new_zeros(6, 1)),
}


def reference(x):
    return F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1)


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


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("pool", POOLS)
def test_features_pass_reductions_of_other_axes(pool, capture):
    assert same(Hidden, reference, POOLS[pool], capture)
    assert same(Stream, reference, POOLS[pool], capture)


@pytest.mark.parametrize("drop", DROPS)
def test_features_pass_what_does_nothing_in_deployment(drop):
    assert same(Branch, nn.Identity(), DROPS[drop], "symbolic_trace")


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_pass_other_layouts(layout, capture):
    assert same(Hidden, *LAYOUTS[layout], capture)
