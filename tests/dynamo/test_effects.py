"""Models that change their inputs, their buffers, or values that autograd has saved."""

import pytest
import torch
from dynamo.helpers import STEPS, compiled, run
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.errors import ModelError


class Changing(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.kind == "input":
            x.sub_(0.5)
        if self.kind == "buffer":
            self.calls.add_(1)
        y = self.a(x).sigmoid()
        if self.kind == "items":
            y[:, :4] = 0.0
        c = y.chunk(2, 1)
        return self.b(F.relu(torch.cat([c[0].mul_(2), c[1]], 1), inplace=True)) + self.calls


BATCHES = torch.randn(STEPS + 2, 8, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("kind", ["input", "buffer", "items"])
def test_calls_before_and_after_the_switch_do_what_the_model_does(kind, effort):
    model = Changing(kind).eval()
    given = [batch.clone() for batch in BATCHES]
    expected = [batch.clone() for batch in BATCHES]
    small = compiled(model, params=1.0, flops=None, effort=effort)
    with torch.no_grad():
        mine = [small(batch).clone() for batch in given]
    calls = float(model.calls)
    model.calls.zero_()
    with torch.no_grad():
        theirs = [model(batch) for batch in expected]
    assert balf_fx.plan(small).params_kept == 1.0
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(given, expected)
    assert calls == float(model.calls)


def test_calls_without_samples_are_not_counted():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    small = compiled(model, params=0.6, flops=None, dynamic=True)
    assert run(small, torch.zeros(0, 16), *BATCHES[:STEPS], torch.zeros(0, 16)).shape == (0, 16)
    with pytest.raises(balf_fx.errors.NotCalibratedError):
        balf_fx.plan(small)
    run(small, BATCHES[0])
    assert balf_fx.plan(small).params_kept <= 0.6
    assert run(small, torch.zeros(0, 16)).shape == (0, 16)


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="weight of 2 "):
        run(compiled(model, params=0.6, flops=None, factors="svd"), *BATCHES)


class Standardised(nn.Linear):
    """Its weight is computed, and its input is not contiguous."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean(1, keepdim=True)) / self.weight.std(1, keepdim=True)
        return F.linear(x.mT, weight, self.bias)


def test_calibration_calls_are_bit_for_bit_those_of_the_model():
    model = nn.Sequential(Standardised(16, 24), nn.GELU(), Standardised(8, 12)).eval()
    batches = [torch.randn(3, 16, 8), torch.randn(8, 16, 3).permute(2, 1, 0)]
    small = compiled(model, params=0.9, flops=None)
    with torch.no_grad():
        for batch in batches:
            assert torch.equal(small(batch), model(batch))
