"""Weights that change, are not seen, or are to be released."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from dynamo.helpers import STEPS, calibrated, compiled, make_offline, messages, options, ranks
from small_models import ConvNet, randomise_batchnorm
from torch import nn
from torch.nn.utils import parametrizations

import balf_fx
from balf_fx.backend import balf
from balf_fx.errors import NotCalibratedError, WeightsChangedError


def test_sensitivity_restarts_with_the_weights(conv_net, images):
    small = compiled(conv_net, factors="sensitivity")
    with torch.no_grad():
        small(images[3])
        next(conv_net.parameters()).mul_(2)
        for batch in images[:STEPS]:
            assert torch.equal(small(batch), conv_net(batch))
        offline = make_offline(conv_net, images[:STEPS], factors="sensitivity")
        torch.testing.assert_close(small(images[3]), offline(images[3]))


def computed(model: nn.Module) -> nn.Module:
    """Computes the weights of its layers anew in every call."""
    return nn.Sequential(*(parametrizations.weight_norm(layer) for layer in model)).eval()


def test_computed_weights_have_factors_as_well():
    model = computed(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)))
    x = torch.randn(16, 8)
    small = compiled(model, flops=0.8, calibration_steps=2)
    with torch.no_grad():
        assert torch.equal(small(x), model(x))
        model[0].bias += 1.0  # calibration starts again
        model[0].parametrizations.weight.original0 *= 2.0
        for _ in range(2):
            assert torch.equal(small(x), model(x))
        small(x)
        expected = make_offline(model, x, flops=0.8)
        torch.testing.assert_close(small(x), expected(x))
        assert [row.rank for row in balf_fx.report(small).sites] == [r.rank for r in balf_fx.report(expected).sites]
        factorized = [row.name for row in balf_fx.report(small).sites if row.rank is not None]
        assert factorized
        assert small(x[:5]).shape == (5, 8)  # another shape: the factors are found by what the weights are made of
        layer = model.get_submodule(factorized[0])
        layer.parametrizations.weight.original1 += 1.0
        with pytest.raises(WeightsChangedError, match="source"):
            small(x)


def test_weights_that_calibration_has_not_seen_stay_dense(tokens, caplog):
    seen, unseen = nn.Linear(32, 32), nn.Linear(32, 32)
    small = torch.compile(lambda layer, x: layer(x), backend=balf, options=options())
    caplog.set_level(logging.INFO, "balf_fx.backend")
    with torch.no_grad():
        for batch in tokens:
            small(seen, batch)
        assert torch.equal(small(unseen, tokens[0]), unseen(tokens[0]))
        assert not torch.allclose(small(seen, tokens[0]), seen(tokens[0]))
    assert "stay dense: they were not part of calibration" in messages(caplog)[-1]


def _optimise(model):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model.block[0].weight.grad = torch.ones_like(model.block[0].weight)
    optimiser.step()


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(randomise_batchnorm(ConvNet()).state_dict()),
    "optimiser": _optimise,
    "in place": lambda model: model.block[0].weight.mul_(2),
    "data": lambda model: setattr(model.block[0].weight, "data", torch.randn_like(model.block[0].weight)),
    "statistics": lambda model: model.block[1].running_mean.add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_change_after_the_switch_are_an_error(conv_net, images, change):
    small = calibrated(conv_net, images)
    with torch.no_grad():
        small(images[0])
        change(conv_net)
        for batch in (images[0], torch.randn(2, 3, 20, 20)):  # where the graph is compiled, and where it is not yet
            with pytest.raises(WeightsChangedError, match=r"block\..* changed after the switch.*torch.compiler.reset"):
                small(batch)
        torch.compiler.reset()
        assert torch.equal(small(images[0]), conv_net(images[0]))


def test_weights_that_stay_dense_may_change(conv_net, images):
    small = calibrated(conv_net, images, exclude=["head"])
    with torch.no_grad():
        before = small(images[0])
        conv_net.head.weight.mul_(2)
        conv_net.head.bias.mul_(2)
        torch.testing.assert_close(small(images[0]), 2 * before)


def test_weights_that_change_during_calibration_start_it_again(conv_net, images, caplog):
    small = calibrated(conv_net, images)
    with torch.no_grad():
        conv_net.block[0].weight.mul_(2)
        for batch in images[:STEPS]:
            assert torch.equal(small(batch), conv_net(batch))
        small(images[3])
    assert "calibration starts again" in caplog.text
    offline = make_offline(conv_net, images[:STEPS])
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(offline))


def test_a_new_parameter_in_place_of_an_old_one_stays_dense(conv_net, images):
    small = calibrated(conv_net, images)
    with torch.no_grad():
        compressed = small(images[0])
        conv_net.block[0].weight = nn.Parameter(2 * conv_net.block[0].weight)
        changed = small(images[0])
    assert not torch.allclose(changed, compressed)


def test_reset_starts_over(conv_net, images):
    small = calibrated(conv_net, images)
    with torch.no_grad():
        small(images[0])
        session = weakref.ref(balf.find(small))
        torch.compiler.reset()
        gc.collect()
        assert session() is None
        assert torch.equal(small(images[0]), conv_net(images[0]))
    with pytest.raises(NotCalibratedError, match="1 of 3"):
        balf_fx.report(small)


@pytest.mark.parametrize("steps", [1, STEPS + 1])
def test_the_model_takes_everything_with_it(images, steps):
    model = randomise_batchnorm(ConvNet()).eval()
    small = compiled(model)
    with torch.no_grad():
        for _ in range(steps):
            small(images[0])
    weight = weakref.ref(model.block[0].weight)
    del model, small
    gc.collect()  # the model,
    gc.collect()  # and what went with it
    assert weight() is None
