"""The switch: what torch.compile makes of a model is what balf_fx.compile makes of it."""

from __future__ import annotations

import logging

import pytest
import torch
from dynamo.helpers import STEPS, Transformer, calibrated, compiled, make_offline, options, ranks
from torch import nn

import balf_fx
from balf_fx.backend import balf
from balf_fx.errors import BudgetError, NoSiteError


@pytest.mark.parametrize("settings", [{}, balf_fx.BALF, {"flops": None, "params": 0.6}, {"allocation": "uniform"}])
def test_the_same_ranks_and_outputs_as_compile_for_a_conv_net(conv_net, images, settings):
    chosen = {"flops": 0.5, **settings}
    offline = make_offline(conv_net, images[:STEPS], **chosen)
    small = calibrated(conv_net, images, **chosen)
    with torch.no_grad():
        torch.testing.assert_close(small(images[3]), offline(images[3]))
    online, expected = balf_fx.report(small), balf_fx.report(offline)
    assert ranks(online) == ranks(expected)
    assert (online.flops_before, online.flops_after) == (expected.flops_before, expected.flops_after)
    assert (online.params_before, online.params_after) == (expected.params_before, expected.params_after)
    assert online.captured == "dynamo"


def test_the_same_ranks_and_outputs_as_compile_for_a_transformer(tokens):
    model = Transformer().eval()
    offline = make_offline(model, tokens[:STEPS])
    small = calibrated(model, tokens)
    with torch.no_grad():
        torch.testing.assert_close(small(tokens[3]), offline(tokens[3]))
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(offline))


@pytest.mark.parametrize("fold_batchnorm", [True, False])
def test_sensitivity_is_that_of_compile_for_a_conv_net(conv_net, images, fold_batchnorm):
    before = {name: (value, value.clone()) for name, value in conv_net.state_dict(keep_vars=True).items()}
    needed = [parameter.requires_grad for parameter in conv_net.parameters()]
    offline = make_offline(conv_net, images[:STEPS], factors="sensitivity", fold_batchnorm=fold_batchnorm)
    small = compiled(conv_net, factors="sensitivity", fold_batchnorm=fold_batchnorm)
    with torch.no_grad():
        for batch in images[:STEPS]:
            assert torch.equal(small(batch), conv_net(batch))
        torch.testing.assert_close(small(images[3]), offline(images[3]))
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(offline))
    plain = ranks(balf_fx.report(make_offline(conv_net, images[:STEPS])))
    assert ranks(balf_fx.report(small)) != plain
    assert [parameter.requires_grad for parameter in conv_net.parameters()] == needed
    assert all(value is conv_net.state_dict(keep_vars=True)[name] for name, (value, _) in before.items())
    assert all(torch.equal(value, earlier) for value, earlier in before.values())
    assert all(parameter.grad is None for parameter in conv_net.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_sensitivity_is_that_of_compile_for_a_transformer(tokens, mode):
    model = Transformer().eval()
    offline = make_offline(model, tokens[:STEPS], factors="sensitivity")
    small = compiled(model, factors="sensitivity")
    with mode():
        for batch in tokens[:STEPS]:
            small(batch)
        torch.testing.assert_close(small(tokens[3]), offline(tokens[3]))
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(offline))


def test_without_gradients_sensitivity_is_the_plain_output_error(tokens, caplog):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x):
            return self.second(self.first(x).relu()).detach().sign()

    caplog.set_level(logging.INFO, "balf_fx.passes.score")
    model = Detached().eval()
    small, plain = (calibrated(model, tokens, factors=factors) for factors in ("sensitivity", "activations"))
    with torch.no_grad():
        torch.testing.assert_close(small(tokens[3]), plain(tokens[3]))
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(plain))
    assert "no gradient has reached linear: its factors minimise the plain output error" in caplog.text


def test_two_models_of_one_class_with_the_same_options_do_not_mix(tokens):
    shared = options()
    models = [Transformer().eval() for _ in range(2)]
    smalls = [torch.compile(model, backend=balf, options=shared) for model in models]
    with torch.no_grad():
        for batch in tokens[:STEPS]:
            for model, small in zip(models, smalls, strict=True):
                assert torch.equal(small(batch), model(batch))
        outputs = [small(tokens[3]) for small in smalls]
    for model, small, output in zip(models, smalls, outputs, strict=True):
        offline = make_offline(model, tokens[:STEPS])
        assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(offline))
        torch.testing.assert_close(output, offline(tokens[3]))


def test_one_model_compiled_twice_has_two_budgets(conv_net, images):
    smalls = [calibrated(conv_net, images, flops=flops) for flops in (0.7, 0.3)]
    with torch.no_grad():
        for small in smalls:
            small(images[0])
    assert [round(balf_fx.report(small).flops_kept, 1) for small in smalls] == [0.7, 0.3]


def test_errors_of_the_switch_come_back_at_every_call(conv_net, images):
    small = calibrated(conv_net, images, flops=0.01)
    for _ in range(2):
        with pytest.raises(BudgetError, match="strict=False"), torch.no_grad():
            small(images[0])
    closest = calibrated(conv_net, images, flops=0.01, strict=False)
    with torch.no_grad():
        closest(images[0])
    assert max(row.rank or 0 for row in balf_fx.report(closest).sites) == 1


def test_a_model_without_sites():
    strict, lenient = compiled(nn.ReLU()), compiled(nn.ReLU(), strict=False)
    with torch.no_grad():
        for small in (strict, lenient):
            for _ in range(STEPS):
                small(torch.randn(4))
        with pytest.raises(NoSiteError, match="nothing in the model can be factorized"):
            strict(torch.randn(4))
        assert lenient(torch.ones(4)).sum() == 4


def test_an_inner_backend_that_fails_may_succeed_the_next_time(conv_net, images):
    attempts = []

    def inner(graph_module, example_inputs):
        attempts.append(graph_module)
        if len(attempts) == 1:
            raise RuntimeError("not now")
        return graph_module

    offline = make_offline(conv_net, images[:STEPS])
    small = calibrated(conv_net, images, inner=inner)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="not now"):
            small(images[0])
        torch.testing.assert_close(small(images[0]), offline(images[0]))


def test_explicit_ranks_and_weights_alone(conv_net, images):
    small = calibrated(conv_net, images, flops=None, allocation={"block.0": 5})
    with torch.no_grad():
        small(images[0])
    assert ranks(balf_fx.report(small))["block.0"] == 5
    small = calibrated(conv_net, images, factors="svd")
    offline = make_offline(conv_net, images[:1], factors="svd")
    with torch.no_grad():
        torch.testing.assert_close(small(images[0]), offline(images[0]))


def test_a_switch_that_was_interrupted_is_tried_again(conv_net, images):
    calls = []

    def loss(output, inputs):
        calls.append(True)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return output.square().mean()

    given = {"factors": "sensitivity", "loss": loss}
    offline = make_offline(conv_net, images[:STEPS], **{**given, "loss": lambda output, _: output.square().mean()})
    small = calibrated(conv_net, images, **given)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            small(images[0])
        torch.testing.assert_close(small(images[0]), offline(images[0]))
