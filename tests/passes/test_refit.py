import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.errors import CalibrationError


class Residual(nn.Module):
    """A residual stream, a depthwise convolution, an in-place ReLU and a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.first, self.second = nn.Conv2d(12, 24, 1), nn.Conv2d(24, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.qkv, self.head = nn.Linear(12, 36), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.second(F.relu(self.first(x), inplace=True))
        x = F.relu_(self.depthwise(x)).flatten(2).mT
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))


def calibrated(model, batches, **options):
    prepared = balf_fx.prepare(model, batches[0], **options)
    balf_fx.calibrate(prepared, batches, progress=False)
    return prepared


def distance(model, other, batches):
    with torch.no_grad():
        return sum(float((model(batch) - other(batch)).square().sum()) for batch in batches)


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("factors", ["activations", "sensitivity"])
def test_refit_brings_the_answer_nearer(factors, capture):
    model, batches = Residual().eval(), list(torch.randn(4, 16, 3, 8, 8))
    prepared = calibrated(model, batches, sensitivity=factors == "sensitivity", capture=capture)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    once = balf_fx.convert(prepared, flops=0.5, factors=factors, progress=False)
    refit = balf_fx.convert(prepared, flops=0.5, factors=factors, batches=batches, progress=False)
    fresh = list(torch.randn(4, 16, 3, 8, 8))
    assert distance(model, refit, batches) < distance(model, once, batches)
    assert distance(model, refit, fresh) < distance(model, once, fresh)
    assert [row.rank for row in balf_fx.report(refit).sites] == [row.rank for row in balf_fx.report(once).sites]
    assert balf_fx.report(refit).flops_kept <= 0.5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert refit(fresh[0][:3]).shape == (3, 5)


def test_where_nothing_is_lost_nothing_changes():
    model, batches = Residual().eval(), list(torch.randn(2, 8, 3, 8, 8))
    refit = balf_fx.convert(calibrated(model, batches), flops=1.0, batches=batches, progress=False)
    torch.testing.assert_close(refit(batches[0]), model(batches[0]))


def test_a_linear_network_at_full_rank_is_exact():
    model = nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 12), nn.Linear(12, 12)).double().eval()
    batches = list(torch.randn(3, 40, 12, dtype=torch.float64))
    prepared = calibrated(model, batches)
    refit = balf_fx.convert(prepared, allocation={"2": 4}, batches=batches, progress=False)  # its input has rank 4
    torch.testing.assert_close(refit(batches[0]), model(batches[0]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("factors", ["activations", "svd"])
def test_compile_refits_too(conv_net, images, factors):
    options = {"flops": 0.5, "factors": factors, "progress": False}
    once, refit = (balf_fx.compile(conv_net, iter(images), refit=refit, **options) for refit in (False, True))
    assert distance(conv_net, refit, images) < distance(conv_net, once, images)


def test_the_prepared_graph_stays_as_it_is(conv_net, images):
    prepared = calibrated(conv_net, images, sensitivity=True)
    before = copy.deepcopy(prepared.state_dict())
    moments = [module.moments for module in prepared.modules() if hasattr(module, "moments")]
    balf_fx.convert(prepared, flops=0.5, factors="sensitivity", batches=images, progress=False)
    assert all(torch.equal(before[name], value) for name, value in prepared.state_dict().items())
    assert all(
        a is b for a, b in zip(moments, (m.moments for m in prepared.modules() if hasattr(m, "moments")), strict=True)
    )


def test_a_forward_that_does_not_call_the_model_is_an_error(conv_net, images):
    prepared = calibrated(conv_net, images)
    with pytest.raises(CalibrationError, match="did not call the model"):
        balf_fx.convert(prepared, flops=0.5, batches=images, forward=lambda model, batch: None, progress=False)
