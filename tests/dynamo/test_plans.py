"""Plans and files that start compressed."""

from __future__ import annotations

import copy
import re

import architectures
import pytest
import torch
from dynamo.helpers import STEPS, Transformer, calibrated, make_offline, ranks, run
from small_models import ConvNet, randomise_batchnorm
from torch import nn

import balf_fx
from balf_fx import backend
from balf_fx.backend import balf
from balf_fx.dynamo.options import BackendOptions
from balf_fx.engine.settings import Settings
from balf_fx.errors import NotCalibratedError, OptionError, PlanError
from balf_fx.files.storage import read


class Broken(nn.Module):
    """Two blocks with features that may be fewer, and a break between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2))

    def forward(self, x):
        x = x + self.first(x)
        torch._dynamo.graph_break()
        return x + self.second(x)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "small.safetensors"


def start(model, plan):
    """Compiled from a plan or from the path of a file."""
    return torch.compile(model, backend=balf, options={"plan": plan, "inner": "eager"})


def make(name):
    if name == "conv net":
        return randomise_batchnorm(ConvNet()).eval(), list(torch.randn(STEPS + 1, 8, 3, 12, 12))
    build = Transformer if name == "transformer" else Broken
    return build().eval(), list(torch.randn(STEPS + 1, 16, 10, 32))


@pytest.mark.parametrize(("name", "effort"), [("conv net", "best"), ("transformer", "balanced"), ("broken", "best")])
def test_a_plan_and_its_file_start_compressed_with_the_same_outputs(name, effort, path):
    model, batches = make(name)
    small = calibrated(model, batches, effort=effort, flops=0.4)
    wanted = run(small, batches[STEPS])
    plan = backend.plan(small)
    assert plan.plan.widths or name == "conv net"
    assert plan.ranks == ranks(balf_fx.report(small))
    balf_fx.save(small, path)
    shorter = run(small, batches[0][:5])
    for found in (plan, path):
        again = start(copy.deepcopy(model), found)
        assert torch.equal(run(again, batches[STEPS]), wanted)
        assert balf_fx.report(again) == balf_fx.report(small)
        assert torch.equal(run(again, batches[0][:5]), shorter)
    assert not torch.allclose(wanted, run(model, batches[STEPS]))


@pytest.mark.parametrize("name", ["conv net", "inverted residual", "scaled mlp", "transformer"])
def test_the_file_of_a_compiled_model_starts_compressed(name, path):
    if name == "conv net":
        model, batches = make(name)
        model, batches = model.double(), [batch.double() for batch in batches]
    else:
        model, batches = architectures.make(name, torch.float64)
    small = make_offline(model, batches, effort="best", flops=0.4)
    balf_fx.save(small, path)
    assert read(path).plan.widths or name == "conv net"
    again = start(copy.deepcopy(model), str(path))
    for batch in (batches[0], batches[1][:5]):
        torch.testing.assert_close(run(again, batch), run(small, batch))


def test_a_file_is_written_once_calibration_is_over(conv_net, images, path):
    small = calibrated(conv_net, images)
    with pytest.raises(NotCalibratedError):
        balf_fx.save(small, path)
    run(small, images[0])
    balf_fx.save(small, path)
    with pytest.raises(PlanError, match="options="):
        balf_fx.load(path, conv_net)


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_other_weights_are_refused(conv_net, images, path, effort):
    small = calibrated(conv_net, images, effort=effort)
    run(small, images[0])
    balf_fx.save(small, path)
    for plan in (backend.plan(small), path):
        other = start(randomise_batchnorm(ConvNet()).eval(), plan)
        with pytest.raises(OptionError, match="other weights"):
            run(other, images[0])


def test_a_plan_leaves_nothing_to_a_budget(conv_net, images):
    small = calibrated(conv_net, images)
    run(small, images[0])
    with pytest.raises(OptionError, match="cannot be combined with a budget"):
        BackendOptions(Settings(flops=0.5), plan=backend.plan(small))


def test_new_shapes_after_the_switch_have_the_same_widths_and_refitted_layers(tokens):
    model = Broken().eval()
    small = calibrated(model, tokens, effort="best", flops=0.4)
    before = run(small, tokens[STEPS])
    assert backend.plan(small).plan.widths
    torch.testing.assert_close(run(small, tokens[STEPS][:3]), before[:3])
    torch.testing.assert_close(run(small, tokens[STEPS][:, :7]), before[:, :7])


@pytest.mark.parametrize("content", [b"{}", None], ids=["damaged", "missing"])
def test_a_plan_that_cannot_be_read_is_an_error_of_the_option(conv_net, images, path, content):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=re.escape(str(path))):
        run(start(conv_net, path), images[0])
