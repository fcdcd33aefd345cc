"""Data and weights without variance, of one sample, or of extreme scales still give a result within the budget."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def image_to_image():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1, bias=False)
    )


MODELS = {"rows": (Gated, (6, 8)), "images": (image_to_image, (3, 8, 8))}
DATA = {
    "constant": lambda shape: [torch.ones(1, *shape)] * 4,
    "zero": lambda shape: [torch.zeros(4, *shape)] * 2,
    "one batch of zeros": lambda shape: [torch.randn(4, *shape), torch.zeros(4, *shape)],
    "one sample": lambda shape: [torch.randn(1, *shape)],
    "constant features": lambda shape: [torch.randn(4, *shape) * (torch.arange(shape[-1]) < 3)],
    "rank one": lambda shape: [torch.randn(4, *[1] * len(shape)) * torch.ones(shape)] * 2,
    "huge": lambda shape: [torch.randn(4, *shape) * 1e12],
    "tiny": lambda shape: [torch.randn(4, *shape) * 1e-25],
    "unlike scales": lambda shape: [torch.randn(4, *shape) * scale for scale in (1e-8, 1e8)],
}
WEIGHTS = {
    "as they are": lambda layer: None,
    "zero": lambda layer: nn.init.zeros_(layer.weight),
    "equal rows": lambda layer: layer.weight.data.copy_(layer.weight.data[:1].expand_as(layer.weight)),
    "dead units": lambda layer: layer.weight.data[::2].zero_(),
}
DTYPES = {
    "as they are": torch.float32,
    "zero": torch.float64,
    "equal rows": torch.float32,
    "dead units": torch.bfloat16,
}


EFFORTS = itertools.cycle(["best", "balanced", "best", "fast", "best"])


@pytest.mark.parametrize(
    ("name", "data", "weights", "effort"), [(*case, next(EFFORTS)) for case in itertools.product(MODELS, DATA, WEIGHTS)]
)
def test_degenerate_data_gives_a_finite_result_within_the_budget(name, data, weights, effort):
    build, shape = MODELS[name]
    model = build().eval()
    WEIGHTS[weights](next(module for module in model.modules() if hasattr(module, "weight")))
    model = model.to(DTYPES.get(weights, torch.float32))
    batches = [batch.to(DTYPES.get(weights, torch.float32)) for batch in DATA[data](shape)]
    compressed = balf_fx.compile(model, batches, params=0.8, effort=effort, progress=False)
    count = sum(parameter.numel() for parameter in compressed.parameters())
    report = balf_fx.report(compressed)
    assert report.params_after == count <= 0.8 * sum(parameter.numel() for parameter in model.parameters())
    assert all(parameter.isfinite().all() for parameter in compressed.parameters())
    assert all(0 <= row.energy_kept <= 1 + 1e-9 for row in (*report.sites, *report.widths))
    assert math.isfinite(balf_fx.plan(compressed).allocation.primal)
    for batch in batches:
        assert compressed(batch).isfinite().all()
        assert compressed(batch).dtype == model(batch).dtype
