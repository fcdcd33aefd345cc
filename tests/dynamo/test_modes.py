"""Gradients, training, inference mode, dtypes, layouts and inner backends."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamo.helpers import STEPS, Broken, Transformer, calibrated, compiled, make_offline, messages
from small_models import ConvNet, randomise_batchnorm
from torch import nn

import balf_fx


def test_gradients_are_those_of_the_model(conv_net, images, caplog):
    small = compiled(conv_net)
    with torch.no_grad():
        for batch in images:
            small(batch)
        assert not torch.equal(small(images[0]), conv_net(images[0]))
    wanted = torch.autograd.grad(conv_net(images[0]).square().sum(), list(conv_net.parameters()))
    got = torch.autograd.grad(small(images[0]).square().sum(), list(conv_net.parameters()))
    torch.testing.assert_close(got, wanted)
    small(images[0])
    torch.randn(2, requires_grad=True)
    assert sum("gradients are required" in message for message in messages(caplog)) == 1
    with torch.no_grad():
        assert not torch.equal(small(images[0]), conv_net(images[0]))


def test_gradients_of_an_input(tokens):
    model = Transformer().eval().requires_grad_(False)
    small = compiled(model)
    x = tokens[0].clone().requires_grad_()
    (got,) = torch.autograd.grad(small(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(got, wanted)
    for batch in tokens:  # nothing requires gradients, so no_grad is not needed
        output = small(batch)
    assert not output.requires_grad
    assert balf_fx.report(small).flops_kept <= 0.5


def test_a_model_in_training_mode_runs_as_it_is(conv_net, images, caplog):
    twin = copy.deepcopy(conv_net).train()
    small = compiled(conv_net.train(), calibration_steps=1)
    with torch.no_grad():
        for batch in images:
            assert torch.equal(small(batch), twin(batch))
    torch.testing.assert_close(conv_net.state_dict(), twin.state_dict())
    assert "training mode" in caplog.text


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_modes(conv_net, images, mode):
    offline = make_offline(conv_net, images[:STEPS])
    small = compiled(conv_net)
    with mode():
        for batch in images[:STEPS]:
            assert torch.equal(small(batch), conv_net(batch))
        output = small(images[3])
    with torch.no_grad():
        torch.testing.assert_close(output, offline(images[3]))
        torch.testing.assert_close(small(images[3]), offline(images[3]))  # guarded apart, compiled again


def test_weights_made_in_inference_mode(images):
    with torch.inference_mode():
        model = randomise_batchnorm(ConvNet()).eval()
        small = compiled(model)
        for batch in images:
            small(batch)
        small(images[0])
    assert balf_fx.report(small).flops_kept <= 0.5


def test_autocast(tokens):
    model = Transformer().eval()
    small = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for batch in tokens[:STEPS]:
            assert torch.equal(small(batch), model(batch))
        output = small(tokens[3])
    assert output.dtype == torch.bfloat16
    assert balf_fx.report(small).flops_kept <= 0.5


def test_bfloat16(tokens):
    model = Transformer().eval().bfloat16()
    batches = [batch.bfloat16() for batch in tokens]
    small = compiled(model)
    with torch.no_grad():
        for batch in batches[:STEPS]:
            assert torch.equal(small(batch), model(batch))
        assert small(batches[3]).dtype == torch.bfloat16
    assert balf_fx.report(small).flops_kept <= 0.5


def test_channels_last(conv_net, images):
    conv_net = conv_net.to(memory_format=torch.channels_last)
    batches = [batch.to(memory_format=torch.channels_last) for batch in images]
    small = compiled(conv_net)
    with torch.no_grad():
        for batch in batches[:STEPS]:
            assert torch.equal(small(batch), conv_net(batch))
        small(batches[3])
    assert balf_fx.report(small).flops_kept <= 0.5


def test_fullgraph(tokens):
    model = Transformer().eval()
    small = compiled(model, fullgraph=True)
    with torch.no_grad():
        for batch in tokens:
            small(batch)
    assert balf_fx.report(small).flops_kept <= 0.5


def test_a_callable_inner_backend(conv_net, images):
    graphs = []

    def inner(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module

    small = calibrated(conv_net, images, inner=inner)
    assert not graphs
    with torch.no_grad():
        small(images[0])
        small(images[0])
    assert len(graphs) == 1
    assert {type(module) for module in graphs[0].modules() if not list(module.children())} >= {nn.Conv2d}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"mode": "reduce-overhead"}, {"inner_options": {"max_fusion_size": 32}}])
def test_inductor(tokens, settings):
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    offline = make_offline(model, tokens[:STEPS])
    small = calibrated(model, tokens, inner="inductor", **settings)
    with torch.no_grad():
        torch.testing.assert_close(small(tokens[3]), offline(tokens[3]))


@pytest.mark.slow
def test_inductor_with_a_dynamic_batch(tokens):
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    small = calibrated(model, tokens, inner="inductor", dynamic=True)
    with torch.no_grad():
        whole = small(tokens[3])
        torch.testing.assert_close(small(tokens[3][:3]), whole[:3])


@pytest.mark.slow
def test_gradients_through_inductor(tokens):
    model = Broken().eval()
    small = compiled(model, inner="inductor")
    got = torch.autograd.grad(small(tokens[0]).square().sum(), list(model.parameters()))
    wanted = torch.autograd.grad(model(tokens[0]).square().sum(), list(model.parameters()))
    torch.testing.assert_close(got, wanted)
