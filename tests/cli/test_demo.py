"""The demo trains, compresses and measures, and leaves the caller's random state alone."""

import dataclasses
import json
import time

import pytest
import torch

from balf_fx.cli import demo
from balf_fx.cli.demo import latencies_ms, load_digits, run_demo, train_net


@pytest.fixture
def thin_net(monkeypatch):
    monkeypatch.setattr(demo, "_WIDTHS", ((1, 16, 2), (16, 32, 2)))


@pytest.fixture
def quick(thin_net):
    return run_demo(flops=0.55, epochs=1)


def test_digits_are_split_without_overlap():
    digits = load_digits(seed=3)
    assert len(digits.train) == len(digits.train_labels) == 1200
    assert len(digits.test) == len(digits.test_labels) == 597
    assert torch.equal(digits.calibration, digits.train[: len(digits.calibration)])
    assert digits.train.shape[1:] == (1, 8, 8)
    assert digits.train.min() == 0
    assert digits.train.max() == 1
    held_out = {image.cpu().numpy().tobytes() for image in digits.test}
    assert not held_out & {image.cpu().numpy().tobytes() for image in digits.train}


def test_split_follows_the_seed():
    first, again, other = (load_digits(seed).train_labels for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_is_reproducible_and_keeps_the_random_state(thin_net):
    digits = load_digits()
    few = dataclasses.replace(digits, train=digits.train[:64], train_labels=digits.train_labels[:64])
    before = torch.get_rng_state()
    nets = [train_net(few, seed=5, epochs=1) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    assert not nets[0].training
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_result_keeps_the_budget_and_is_frozen(quick):
    assert 0.5 < quick.flops_kept <= 0.55
    assert quick.compressed.params < quick.dense.params
    assert quick.dense.latency_ms > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        quick.budget = 1


def test_result_as_table_and_as_json(quick):
    table = str(quick)
    for word in ("dense", "compressed", "top-1", "FLOPs", "parameters", "latency", f"{quick.dense.flops:,}"):
        assert word in table
    data = json.loads(quick.to_json())
    assert data["flops_kept"] == quick.flops_kept
    assert data["dense"] == dataclasses.asdict(quick.dense)


@pytest.mark.parametrize("position", [0, 1])
def test_latencies_come_in_the_order_of_the_models(position):
    class Sleeping(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.003)
            return x

    models = [torch.nn.Identity(), torch.nn.Identity()]
    models[position] = Sleeping()
    assert latencies_ms(models, torch.rand(1))[position] >= 3.0


@pytest.mark.slow
def test_default_demo_keeps_its_promise():
    result = run_demo()
    assert result.dense.top1 > 95
    assert result.compressed.top1 > result.dense.top1 - 3
    assert result.flops_kept <= 0.55
    assert json.loads(result.to_json())["budget"] == 0.55
