"""Other shapes, before and after the switch, and open sizes."""

from __future__ import annotations

import copy
import logging

import architectures
import pytest
import torch
from dynamo.helpers import STEPS, WIDTH, Transformer, calibrated, compiled, make_offline, messages, rows, run
from torch import nn

import balf_fx
from balf_fx import backend
from balf_fx.backend import balf
from balf_fx.graph.flops import count_flops


def test_new_shapes_after_the_switch_reuse_the_factors(conv_net, images, caplog):
    offline = make_offline(conv_net, images[:STEPS])
    small = calibrated(conv_net, images)
    with torch.no_grad():
        small(images[0])
        before = backend.plan(small)
        caplog.set_level(logging.INFO, "balf_fx.backend")
        for shape in ((3, 3, 20, 24), (1, 3, 12, 12)):
            batch = torch.randn(shape)
            torch.testing.assert_close(small(batch), offline(batch))
    assert not messages(caplog)
    assert backend.plan(small) is before


def test_new_shapes_before_the_switch_merge_their_statistics(conv_net):
    batches = [torch.randn(shape) for shape in ((8, 3, 12, 12), (4, 3, 16, 16), (2, 3, 12, 12))]
    small = calibrated(conv_net, batches)
    with torch.no_grad():
        small(batches[0])
    offline = make_offline(conv_net, batches)
    report, expected = balf_fx.report(small), balf_fx.report(offline)
    static, dynamic = (count_flops(conv_net, batch) for batch in batches[:2])  # the third runs the graph of the second
    assert report.flops_before == (static + 2 * dynamic) // 3
    kept = {row.name: row.energy_kept for row in expected.sites}
    assert all(row.energy_kept == pytest.approx(kept[row.name]) for row in report.sites if row.rank is not None)


def test_dynamic_shapes():
    model = Transformer(depth=1).eval()
    batches = [torch.randn(size, length, 32) for size, length in ((4, 10), (3, 7), (6, 12))]
    offline = make_offline(model, batches)
    small = compiled(model, dynamic=True, inner="aot_eager")
    with torch.no_grad():
        for batch in batches:
            assert torch.equal(small(batch), model(batch))
        for batch in (*batches, torch.randn(5, 9, 32)):
            torch.testing.assert_close(small(batch), offline(batch))


def test_dynamic_shapes_of_a_conv_net(conv_net, images):
    small = compiled(conv_net, dynamic=True)
    with torch.no_grad():
        for batch in images[:STEPS]:
            assert torch.equal(small(batch), conv_net(batch))
        for size in (2, 5):
            assert small(images[0][:size]).shape == (size, 10)


@pytest.mark.parametrize("name", ["fused", "unfused", "fused keys and values", "grouped", "multihead"])
def test_open_sizes_have_the_widths_of_attention_as_well(name):
    model, batches = architectures.make(name, torch.float64)
    small = calibrated(model, batches, calibration_steps=2, effort="balanced", flops=0.4)
    with torch.no_grad():
        whole = small(batches[0])
        assert {width.kind for width in backend.plan(small).plan.widths} >= {"queries", "values"}
        torch.testing.assert_close(small(batches[0][:5]), whole[:5])


class Named(nn.Module):
    """A block whose weights have the names of another block's, one of which is not the layer's own."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.layer = scale, nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.layer(torch.tanh(nn.functional.linear(x, self.weight * self.scale)))


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_blocks_with_the_same_names_are_found_again_in_graphs_of_other_shapes(effort):
    model = nn.Sequential(Named(0.5), Named(2.0), Named(1.0)).double().eval()
    batches = rows()
    small = calibrated(model, batches, dynamic=False, flops=0.7, effort=effort)
    expected = run(small, batches[0])
    torch.testing.assert_close(run(small, batches[0][:17]), expected[:17])
    assert len(balf_fx.report(small).sites) == 6


class Stream(nn.Module):
    """An embedding whose stream takes over the order of a layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(40, 48), nn.Linear(48, 96), nn.Linear(96, 48)
        self.head = nn.Linear(48, 40)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(x)


def test_embeddings_of_other_shapes_and_of_plans_have_the_order_of_their_stream():
    model, batches = Stream().double().eval(), list(torch.randint(40, (STEPS, 4, 10)))
    small = calibrated(model, batches, flops=0.7, dynamic=False)
    wanted = run(small, batches[0])
    assert "columns" in {row.form for row in balf_fx.report(small).sites}
    torch.testing.assert_close(run(small, batches[0][:, :7].contiguous()), wanted[:, :7])
    started = torch.compile(copy.deepcopy(model), backend=balf, options={"plan": backend.plan(small), "inner": "eager"})
    torch.testing.assert_close(run(started, batches[0]), wanted)
