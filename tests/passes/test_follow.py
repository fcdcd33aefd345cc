import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import balf_fx


def counted(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("samples", [8, 64])
def test_flops_are_those_of_the_batch_at_hand(samples):
    """A plan says how many FLOPs it takes on the batch that it was made for."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10)
    ).eval()
    batches = list(torch.randn(3, 32, 3, 7, 7))
    plan = balf_fx.plan(balf_fx.compile(model, batches, flops=0.5, progress=False))
    assert plan.widths
    few = [batch[:samples] if samples < 32 else batch.repeat(2, 1, 1, 1) for batch in batches]
    followed = balf_fx.compile(model, few, allocation=plan, progress=False)
    found = balf_fx.plan(followed)
    assert found.ranks == plan.ranks
    assert (found.flops * 32, found.flops_after * 32) == (plan.flops * samples, plan.flops_after * samples)
    assert found.flops_after == counted(followed, few[0])
    assert found.allocation.choices[0].dense.flops * 32 == plan.allocation.choices[0].dense.flops * samples
