"""The options of torch.compile."""

from __future__ import annotations

import pytest
import torch
from dynamo.helpers import calibrated, ranks

import balf_fx
from balf_fx.backend import balf
from balf_fx.dynamo.options import parse_options
from balf_fx.errors import OptionError, UnknownSiteError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"flop": 0.5}, "no option 'flop'"),
        ({"calibration_steps": 4, "refit": True}, "give a budget"),
        ({"flops": 0.5, "params": 0.5}, "exactly one budget"),
        ({"flops": 55}, "fraction"),
        ({"flops": 0.5, "calibration_steps": 0}, "calibration_steps"),
        ({"flops": 0.5, "inner": "balf"}, "inner"),
        ({"flops": 0.5, "inner": "nonsense"}, "nonsense"),
        ({"flops": 0.5, "mode": "reduce-overhead", "inner_options": {}}, "one of them"),
        ({"flops": 0.5, "factors": "magic"}, "factors"),
        ({"flops": 0.5, "capture": "export"}, "Dynamo captures the graphs"),
        ({"flops": 0.5, "factors": "air", "refit": True}, "a refit would replace"),
        ({"plan": 3}, "plan must be .*, not of type int"),
        ({"plan": torch.fx.symbolic_trace(torch.nn.ReLU())}, "or a path, not of type ReLU. The options"),
        ({"plan": "a.safetensors", "flops": 0.5}, "a plan cannot be combined with a budget .*: drop flops"),
        (
            {"plan": "a.safetensors", "exclude": ["0"], "checkpoint": "a", "calibration_steps": 4, "progress": False},
            "drop exclude, checkpoint, calibration_steps",
        ),
    ],
)
def test_wrong_options_fail_at_compile_time(conv_net, images, given, message):
    small = torch.compile(conv_net, backend=balf, options=given)
    with pytest.raises(OptionError, match=message) as caught, torch.no_grad():
        small(images[0])
    assert "flops, params, latency" in str(caught.value)


def test_no_plan_is_the_same_as_none():
    assert parse_options({"plan": None}) == parse_options({})
    assert parse_options({"plan": None, "flops": 0.5}) == parse_options({"flops": 0.5})


def test_without_a_budget_what_is_free_is_removed(conv_net, images):
    with torch.no_grad():
        conv_net.block[4].weight[1:].zero_()
        small = torch.compile(conv_net, backend=balf, options={"calibration_steps": 1, "inner": "eager"})
        small(images[0])
        torch.testing.assert_close(small(images[1]), conv_net(images[1]))
    assert balf_fx.report(small).flops_kept < 1


def test_include_and_exclude(conv_net, images):
    small = calibrated(conv_net, images, flops=0.9, include=["block.*"], exclude=["block.4"])
    with torch.no_grad():
        small(images[0])
    assert list(ranks(balf_fx.report(small))) == ["block.0"]
    small = calibrated(conv_net, images, exclude=["blocks.*"])
    with pytest.raises(UnknownSiteError, match=r"'blocks\.\*' matches no site"), torch.no_grad():
        small(images[0])


def test_a_budget_of_time(conv_net, images):
    given = {"latency": 0.9, "runner": "eager", "multiple_of": "auto", "strict": False, "effort": "fast"}
    small = torch.compile(conv_net, backend=balf, options={**given, "calibration_steps": 1, "inner": "eager"})
    with torch.no_grad():
        small(images[0])
        small(images[0])
    timing = balf_fx.report(small).timing
    assert (timing.asked, timing.runner) == (0.9, "eager")
    assert timing.measured <= 1.0 or set(ranks(balf_fx.report(small)).values()) == {None}


def test_a_function_without_parameters_has_a_time():
    options = {"latency": 0.9, "runner": "eager", "strict": False, "effort": "fast", "calibration_steps": 1}
    weight = torch.randn(16, 16)
    small = torch.compile(lambda x: (x @ weight).relu(), backend=balf, options={**options, "inner": "eager"})
    x = torch.randn(4, 16)
    with torch.no_grad():
        small(x)
        torch.testing.assert_close(small(x), (x @ weight).relu())
