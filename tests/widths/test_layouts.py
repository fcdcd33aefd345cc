"""Layers become narrower where the code between them allows it; others write features in their old places."""

import pytest
import torch
from architectures import GatedMlp, ScaledMlp, Unfused, make
from torch import nn

import balf_fx
from balf_fx.graph.annotation import graph_record
from balf_fx.graph.replacements import Replacement


def prepared(model, x):
    return graph_record(balf_fx.prepare(model, x, result="module", factors="sensitivity"))


class Reshaped(nn.Module):
    """Code that names the number of its hidden features."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 10)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)).view(-1, 8, 4).reshape(-1, 32))


def compress(model, batches, **options):
    return balf_fx.compile(model, batches, effort="balanced", progress=False, result="module", **options)


@pytest.mark.parametrize("name", ["gated mlp", "convs", "inverted residual", "squeeze and excite", "pooled"])
def test_elementwise_code_runs_on_fewer_features(name):
    model, batches = make(name)
    small = compress(model, batches, flops=0.5, pivot=False)
    widths = [width for width in balf_fx.plan(small).widths if width.kind == "channels"]
    assert widths
    for path, recipe in balf_fx.plan(small).modules.items():
        assert recipe.reads is None, path
        assert not recipe.places, path


@pytest.mark.parametrize("kind", [GatedMlp, ScaledMlp])
def test_parameters_along_features_let_a_width_pass(kind):
    (width,) = prepared(kind().eval(), torch.randn(64, 12)).widths
    assert (width.kind, width.padded) == ("channels", False)


def test_code_that_names_the_number_of_features_sees_all_of_them():
    model, x = Reshaped().eval(), torch.randn(256, 12)
    small = compress(model, [x], flops=0.7)
    assert small.up(x).shape == (256, 32)
    for width in balf_fx.plan(small).widths:
        assert width.size == int((small.up(x) != 0).any(0).sum())


def test_heads_are_padded_and_read_without_the_zeros():
    model, batches = Unfused().eval(), list(torch.randn(2, 48, 6, 32))
    record = prepared(model, batches[0])
    assert {width.kind: width.padded for width in record.widths} == {"queries": True, "values": True}
    assert record.orderable == ()
    small = compress(model, batches, params=0.5)
    found = {width.kind: width for width in balf_fx.plan(small).widths if width.is_narrower}
    assert "values" in found
    assert isinstance(small.v, Replacement)
    output = small.v(batches[0]).unflatten(-1, (2, 12))
    assert output.shape[-1] == 12
    assert not output[..., found["values"].size :].any()
    assert output[..., : found["values"].size].any()
