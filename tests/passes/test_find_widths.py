import dataclasses

import pytest
import torch
from architectures import CHANNELS, EVERYTHING, make
from torch import nn

import balf_fx
from balf_fx.graph.annotation import graph_record
from balf_fx.passes import FindWidths
from balf_fx.widths.channels import find_channels


def widths_of(name, capture):
    model, batches = make(name)
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity", capture=capture)
    return graph_record(prepared).widths


@pytest.mark.parametrize(
    "name", [name for name in EVERYTHING if "multihead" not in name]
)  # which is not exported whole
def test_other_graphs_of_a_model_have_the_same_widths(name):
    traced, exported = (widths_of(name, capture) for capture in ("symbolic_trace", "export"))
    assert {width.key: set(width.layer_names) for width in traced} == {
        width.key: set(width.layer_names) for width in exported
    }


def test_layers_go_by_their_own_names():
    model, batches = make("inverted residual")
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    width = next(width for width in graph_record(prepared).widths if width.name == "block.4")
    assert width.key == "channels block.4"
    assert width.layers == ("block_0", "block_4")
    assert width.layer_names == ("block.0", "block.4")


@pytest.mark.parametrize("name", CHANNELS)
def test_names_that_recur_are_numbered(name, monkeypatch):
    model, batches = make(name)
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    once = list(find_channels(prepared))
    monkeypatch.setattr("balf_fx.passes.find_widths.find_heads", find_channels)
    monkeypatch.setattr("balf_fx.passes.find_widths._JOINED", 2 * len(once))
    FindWidths()(prepared)
    found = graph_record(prepared).widths
    assert [width.name for width in found] == [w.name for w in once] + [f"{w.name} 2" for w in once]
    assert len({width.key for width in found}) == len(found)
    assert [dataclasses.replace(width, name="", layer_names=()) for width in found] == [
        dataclasses.replace(width, name="") for width in (*once, *once)
    ]


class Excited(nn.Module):
    """Squeeze and excitation, whose gate gets its axes by a move that names its size (Hu et al. 2018)."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.last = how, nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 16, 3)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64))
        self.unflatten = nn.Unflatten(1, (64, 1, 1))

    def forward(self, x):
        x = torch.relu(self.first(x))
        gate = torch.sigmoid(self.gate(x))
        if self.how == "module":
            gate = self.unflatten(gate)
        elif self.how == "broadcast":
            gate = gate[:, :, None, None].broadcast_to(x.shape)
        else:
            gate = gate.unflatten(1, (64, 1, 1) if self.how == "size" else (-1, 1, 1))
        return self.last(x * gate)


@pytest.mark.parametrize(("how", "narrows"), [("module", 0), ("size", 0), ("broadcast", 0), ("open", 1)])
@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_moves_that_cannot_be_resized_keep_their_size(how, narrows, capture):
    torch.manual_seed(0)
    model, x = Excited(how).eval(), torch.randn(16, 3, 9, 9)
    with torch.no_grad():
        for layer in (model.first, model.gate[4]):
            layer.weight[32:], layer.bias[32:] = layer.weight[:32], layer.bias[:32]
    small = balf_fx.compile(model, [x], flops=0.5, capture=capture, progress=False)
    assert small(x).shape == model(x).shape
    wide = [width for width in balf_fx.plan(small).widths if width.features == 64 and width.is_narrower]
    assert capture == "export" or bool(wide) == bool(narrows)


class Mixed(nn.Module):
    """A product over as many tokens as there are features, which sums over tokens."""

    def __init__(self):
        super().__init__()
        self.a, self.v, self.out = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        a, v = (layer(x).unflatten(-1, (2, 16)).transpose(1, 2) for layer in (self.a, self.v))
        return self.out((a @ v).transpose(1, 2).flatten(-2))


def test_a_product_that_sums_over_tokens_is_none_of_queries_and_keys():
    model, x = Mixed().double().eval(), torch.randn(8, 16, 32).double()
    assert not any(width.kind == "queries" for width in found(model, x))
    torch.testing.assert_close(balf_fx.compile(model, [x], progress=False)(x), model(x))


def found(model, x):
    prepared = balf_fx.prepare(model, x)
    FindWidths()(prepared)
    return graph_record(prepared).widths
