"""What would be ignored is refused, and what has an effect is not."""

import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.engine.effects import check_effects
from balf_fx.engine.settings import Settings
from balf_fx.errors import OptionError


def loss(output, batch):
    return output.square().mean()


def weights(batch):
    return torch.ones(len(batch))


def _names(value):
    """An id without the functions' addresses, which differ from process to process."""
    return " ".join(value) if isinstance(value, dict) else ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flops": 0.5, "runner": "eager"}, "runner= would have no effect: it is for latency="),
        ({"flops": 0.5, "minimise": "params"}, "minimise= would .* disagreement= or divergence="),
        ({"flops": 0.5, "confidence": 0.9}, "confidence= would .* disagreement= or divergence="),
        ({"flops": 0.5, "factors": "activations", "loss": loss}, "loss= would .* gradients"),
        ({"loss": loss}, "loss= would .* a budget"),
        ({"flops": 0.5, "factors": "svd", "weights": weights}, "weights= would .* factors='svd'"),
        ({"weights": weights}, "weights= would .* a budget"),
        ({"flops": 0.5, "factors": "svd", "separable": True}, "separable= would .* factors='activations'"),
        ({"flops": 0.5, "factors": "air", "separable": True}, "separable= would"),
        ({"flops": 0.5, "allocation": "uniform", "separable": True}, "separable= would"),
        ({"allocation": {"0": 2}, "separable": True}, "separable= would"),
        ({"separable": True}, "separable= would .* under a budget"),
    ],
    ids=_names,
)
def test_what_can_have_no_effect_is_refused_before_any_work(options, message):
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    with pytest.raises(OptionError, match=message):
        balf_fx.compile(model, [], progress=False, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"latency": 0.5, "runner": "eager"},
        {"disagreement": 0.1, "validation": [], "minimise": "latency", "runner": "eager", "confidence": 0.9},
        {"flops": 0.5, "loss": loss, "effort": "fast"},  # allocations are measured by it
        {"flops": 0.5, "loss": loss, "factors": "air"},
        {"allocation": {"0": 2}, "loss": loss},
        {"flops": 0.5, "weights": weights, "effort": "fast"},
        {"flops": 0.5, "weights": weights, "factors": "svd", "refit": True},
        {"disagreement": 0.1, "validation": [], "weights": weights, "factors": "svd"},
        {"flops": 0.5, "separable": True, "factors": "activations"},
    ],
    ids=_names,
)
def test_what_may_have_an_effect_is_not_refused(options):
    check_effects(Settings(**options))
