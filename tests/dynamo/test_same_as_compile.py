"""A model that Dynamo captures as one graph is compressed as balf_fx.compile compresses it.

In float64, where the two ways to capture a model differ by less than any choice between candidates.
"""

from __future__ import annotations

import architectures
import families
import pytest
import torch
from dynamo.helpers import STEPS, calibrated, make_offline
from small_models import ConvNet, randomise_batchnorm

import balf_fx
from balf_fx import backend
from balf_fx.graph.plan import Plan


def decisions(plan):
    """Everything that a plan says of the model, without how it was captured."""
    widths = {(each.name, each.layers): (each.kind, each.features, each.size, each.kept) for each in plan.widths}
    costs = (plan.flops, plan.flops_after, plan.params, plan.params_after)
    return plan.ranks, widths, costs, {layer.name: layer.rank for layer in plan.layers}


def distance(output, batch):
    """A loss that a user might write."""
    return (output[:, 0] * batch.flatten(1).sum(1)).square().mean()


def make(name):
    """A model in float64, and batches for calibration and for a comparison."""
    if name == "conv net":
        return randomise_batchnorm(ConvNet()).eval().double(), list(torch.randn(STEPS + 1, 8, 3, 12, 12).double())
    if name in families.FAMILIES:
        build, shape = families.FAMILIES[name]
        return build().eval().double(), list(torch.randn(STEPS + 1, 48, *shape, dtype=torch.float64))
    return architectures.make(name, torch.float64, STEPS + 1)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("conv net", {"effort": "fast"}),
        ("conv net", {"effort": "balanced"}),
        ("conv net", {"effort": "best"}),
        ("conv net", {"effort": "best", "fold_batchnorm": False}),
        ("conv net", {"effort": "best", "loss": distance}),
        ("conv net", {"effort": "best", "include": ["block.*", "head"], "exclude": ["block.0"], "flops": 0.9}),
        ("conv net", {"factors": "svd"}),
        ("inverted residual", {"effort": "best", "flops": 0.6}),
        ("gated mlp", {"effort": "balanced", "flops": None, "params": 0.5}),
        ("gated mlp", {"factors": "air"}),
        ("transformer", {"effort": "balanced"}),
        ("transformer", {"effort": "best", "dense": ["head"], "flops": 0.6}),
        ("fused keys and values", {"effort": "best", "flops": None, "params": 0.6}),
        ("interleaved", {"effort": "balanced", "flops": None, "params": 0.6}),
        ("expanded", {"effort": "balanced", "flops": None, "params": 0.6}),
        ("Conv1D attention", {"effort": "balanced", "flops": None, "params": 0.6}),
    ],
)
def test_plan_and_outputs_are_those_of_compile(name, changes):
    model, batches = make(name)
    offline = make_offline(model, batches[:STEPS], **changes)
    small = calibrated(model, batches, **changes)
    with torch.no_grad():
        torch.testing.assert_close(small(batches[STEPS]), offline(batches[STEPS]))
    found, expected = backend.plan(small).plan, Plan.of(offline)
    assert decisions(found) == decisions(expected)
    assert any(layer.rank is not None for layer in expected.layers) or expected.widths
    online, report = balf_fx.report(small), balf_fx.report(offline)
    assert (online.flops_before, online.flops_after) == (report.flops_before, report.flops_after)
    assert (online.params_before, online.params_after) == (report.params_before, report.params_after)


def test_best_is_the_default(conv_net, images):
    conv_net, images = conv_net.double(), [batch.double() for batch in images]
    given = {"flops": 0.5, "calibration_steps": STEPS, "inner": "eager", "progress": False}
    small = torch.compile(conv_net, backend=backend.balf, options=given)
    with torch.no_grad():
        for batch in images:
            output = small(batch)
        offline = make_offline(conv_net, images[:STEPS], effort="best")
        torch.testing.assert_close(output, offline(images[STEPS]))
