"""A compressed model trains: all of it, or low-rank adapters on its factors, and gets back what compression cost."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.cli import demo
from balf_fx.cli.demo import accuracy

WIDTH = 32
CALIBRATION = 256
CAPTURED = list(itertools.product(("fast", "best"), ("symbolic_trace", "export")))


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return demo.load_digits()


@pytest.fixture(scope="module")
def dense(digits):
    torch.manual_seed(0)
    blocks = (
        nn.Sequential(nn.Conv2d(inputs, WIDTH, 3, stride, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        for inputs, stride in ((1, 1), (WIDTH, 2), (WIDTH, 1))
    )
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))
    fit(net, digits, learning_rate=3e-3)
    return net


@pytest.fixture(scope="module")
def compressed(dense, digits):
    """So hard that it shows: lower ranks; lower ranks by influence, as in AIR with LoRA; and fewer features."""

    def loss(output, batch):
        return F.cross_entropy(output, batch[1])

    labelled = [(digits.calibration, digits.train_labels[:CALIBRATION])]
    return {
        "fast": balf_fx.compile(dense, labelled, flops=0.3, effort="fast", progress=False),
        "AIR": balf_fx.compile(dense, labelled, flops=0.3, loss=loss, progress=False, **balf_fx.AIR),
        "best": balf_fx.compile(dense, labelled, flops=0.1, progress=False),
    }


def fit(model, digits, learning_rate, epochs=8):
    """Train what requires gradients, and leave the model in evaluation mode."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], learning_rate)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(digits.train), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train[index]), digits.train_labels[index]).backward()
            optimizer.step()
    return model.eval()


def changed_layers(report):
    return [*report.factor_layers, *(row.name for row in report.sites if row.is_only_narrower)]


def assert_recovered(dense, damaged, recovered, digits):
    """More than a third of what was lost on held-out digits is there again, and the dense model is the best still."""
    before, low, high = (accuracy(model, digits.test, digits.test_labels) for model in (dense, damaged, recovered))
    assert before - low > 0.1
    assert before > high > low + (before - low) / 3


@pytest.mark.parametrize("how", ["fast", "AIR", "best"])
def test_training_all_parameters_recovers_accuracy(dense, compressed, digits, how):
    recovered = fit(copy.deepcopy(compressed[how]), digits, learning_rate=3e-3, epochs=6)
    assert_recovered(dense, compressed[how], recovered, digits)


@pytest.mark.parametrize("how", ["fast", "AIR", "best"])
def test_adapters_on_the_compressed_layers_recover_accuracy(dense, compressed, digits, how):
    peft = pytest.importorskip("peft")
    report = balf_fx.report(compressed[how])
    names = changed_layers(report) if how == "best" else list(report.factor_layers)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)
    adapted = peft.get_peft_model(copy.deepcopy(compressed[how]), config)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(names)
    assert all("lora_" in name for name in trained)
    recovered = fit(adapted, digits, learning_rate=1e-2)
    assert_recovered(dense, compressed[how], recovered, digits)

    answer = recovered(digits.test)
    merged = recovered.merge_and_unload()
    torch.testing.assert_close(merged(digits.test), answer, rtol=1e-3, atol=1e-3)
    before = dict(compressed[how].named_parameters())
    after = dict(merged.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {f"{name}.weight" for name in names}
    assert balf_fx.report(merged) == report


def test_adapters_go_into_the_graph_itself(compressed, digits):
    """With `inject_adapter_in_model` it remains the same GraphModule, which torch.export takes with its adapters."""
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(compressed["fast"])
    names = list(balf_fx.report(model).factor_layers)
    injected = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False), model)
    assert isinstance(injected, torch.fx.GraphModule)
    batch = digits.test[:8]
    answer = injected(batch)
    assert not torch.allclose(answer, compressed["fast"](batch), atol=1e-2)
    torch.testing.assert_close(torch.export.export(injected, (batch,)).module()(batch), answer)
    torch.testing.assert_close(copy.deepcopy(injected)(batch), answer)


@pytest.mark.parametrize(("effort", "capture"), CAPTURED)
def test_a_step_lowers_the_loss(dense, digits, effort, capture):
    model = balf_fx.compile(dense, digits.calibration, flops=0.3, effort=effort, capture=capture, progress=False)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(model(digits.train), digits.train_labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        optimizer.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("effort", "capture"), CAPTURED)
def test_what_was_frozen_stays_frozen(dense, digits, effort, capture):
    model = copy.deepcopy(dense)
    model[1].requires_grad_(False)
    small = balf_fx.compile(model, digits.calibration, flops=0.3, effort=effort, capture=capture, progress=False)
    trains = {name: parameter.requires_grad for name, parameter in small.named_parameters()}
    assert {name for name, flag in trains.items() if not flag} == {name for name in trains if name.startswith("1.")}
    assert any(trains.values())
    assert not all(trains.values())


class Regularised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 16)

    def forward(self, x):
        return self.down(self.drop(self.up(x).relu()))


@pytest.mark.parametrize(("capture", "drops"), [("symbolic_trace", True), ("export", False)])
def test_dropout_returns_where_tracing_captured_the_model(capture, drops):
    x = torch.randn(64, 16)
    small = balf_fx.compile(Regularised().eval(), x, flops=0.6, effort="fast", capture=capture, progress=False)
    assert torch.equal(small(x), small(x))
    small.train()
    assert torch.equal(small(x), small(x)) is not drops


@pytest.mark.parametrize("fold", [True, False])
def test_batchnorm_trains_unless_it_is_folded(conv_net, images, fold):
    options = {"effort": "fast", "fold_batchnorm": fold, "progress": False}
    small = balf_fx.compile(conv_net, images, flops=0.6, **options)
    buffers = {name: value.clone() for name, value in small.named_buffers()}
    assert fold is not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    small.train()(images[0])
    assert all(not torch.equal(buffers[name], value) for name, value in small.named_buffers())
    assert bool(buffers) is not fold
