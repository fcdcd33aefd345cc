"""Plans and files that start compressed."""

from __future__ import annotations

import pytest
import torch
from dynamo.helpers import calibrated, ranks
from small_models import ConvNet, randomise_batchnorm

import balf_fx
from balf_fx import backend
from balf_fx.backend import balf
from balf_fx.dynamo.options import BackendOptions
from balf_fx.errors import OptionError


def test_a_plan_starts_compressed(conv_net, images):
    small = calibrated(conv_net, images)
    with torch.no_grad():
        wanted = small(images[0])
    plan = backend.plan(small)
    assert plan.ranks == ranks(balf_fx.report(small))
    reloaded = ConvNet().eval()
    reloaded.load_state_dict(conv_net.state_dict())
    again = torch.compile(reloaded, backend=balf, options={"plan": plan, "inner": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(again(images[0]), wanted)
    assert balf_fx.report(again) == balf_fx.report(small)


def test_a_plan_for_other_weights_is_refused(conv_net, images):
    small = calibrated(conv_net, images)
    with torch.no_grad():
        small(images[0])
    other = torch.compile(
        randomise_batchnorm(ConvNet()).eval(), backend=balf, options={"plan": backend.plan(small), "inner": "eager"}
    )
    with pytest.raises(OptionError, match="other weights"), torch.no_grad():
        other(images[0])
    with pytest.raises(OptionError, match="nothing to a budget"):
        BackendOptions(plan=backend.plan(small), flops=0.5)
