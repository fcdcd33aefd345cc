"""`torch.compile(model, backend="balf")`, mostly with "eager" as the inner backend: only Dynamo takes time."""

from __future__ import annotations

import copy
import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import pytest
import torch
from small_models import ConvNet, randomise_batchnorm
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import balf_fx
from balf_fx import backend
from balf_fx.backend import balf
from balf_fx.dynamo.frames import weight_name
from balf_fx.dynamo.options import BackendOptions
from balf_fx.errors import (
    BudgetError,
    NoSiteError,
    NotCalibratedError,
    OptionError,
    UnknownSiteError,
    WeightsChangedError,
)

STEPS = 3


@pytest.fixture(autouse=True)
def _reset():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def options(**changes):
    return {"flops": 0.5, "calibration_steps": STEPS, "inner": "eager", **changes}


def compiled(model, dynamic=None, fullgraph=False, **changes):
    return torch.compile(model, backend=balf, dynamic=dynamic, fullgraph=fullgraph, options=options(**changes))


def calibrated(model, batches, **changes):
    """Compiled, and called once for each of STEPS batches."""
    small = compiled(model, **changes)
    with torch.no_grad():
        for batch in batches[:STEPS]:
            small(batch)
    return small


def messages(caplog):
    """What the backend has logged, without what Dynamo traces in between."""
    return [record.getMessage() for record in caplog.records if record.name == "balf_fx.backend"]


def ranks(report):
    return {row.name: row.rank for row in report.sites}


class Attention(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.attention = Attention(width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, width=32, depth=2):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 48)

    def forward(self, x):
        return self.head(self.blocks(x))


class Broken(nn.Module):
    """Two graphs, with a break between them."""

    def __init__(self, width=32):
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x):
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)


class Looped(nn.Module):
    """Layers with a break inside: Dynamo runs all of them through the same graphs."""

    def __init__(self, width=32, depth=3):
        super().__init__()
        self.layers = nn.ModuleList([Broken(width) for _ in range(depth)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def tokens():
    return list(torch.randn(STEPS + 1, 4, 10, 32))


# The life of a compiled model.


def test_calibration_returns_what_the_model_returns_bit_for_bit(conv_net, images):
    small = compiled(conv_net)
    with torch.no_grad():
        for batch in images[:STEPS]:
            assert torch.equal(small(batch), conv_net(batch))
        assert not torch.equal(small(images[0]), conv_net(images[0]))


@pytest.mark.parametrize("settings", [{}, balf_fx.BALF, {"flops": None, "params": 0.6}, {"allocation": "uniform"}])
def test_the_same_ranks_and_outputs_as_compile_for_a_conv_net(conv_net, images, settings):
    chosen = {"flops": 0.5, **settings}
    offline = balf_fx.compile(conv_net, images[:STEPS], effort="fast", progress=False, **chosen)
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
    offline = balf_fx.compile(model, tokens[:STEPS], flops=0.5, progress=False, effort="fast")
    small = calibrated(model, tokens)
    with torch.no_grad():
        torch.testing.assert_close(small(tokens[3]), offline(tokens[3]))
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(offline))


def offline_sensitivity(model, batches, fold_batchnorm=True):
    """What compile makes without widths, measurements and a refit."""
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity", widths=False, fold_batchnorm=fold_batchnorm)
    balf_fx.calibrate(prepared, batches, progress=False)
    return balf_fx.convert(prepared, flops=0.5, progress=False)


@pytest.mark.parametrize("fold_batchnorm", [True, False])
def test_sensitivity_is_that_of_compile_for_a_conv_net(conv_net, images, fold_batchnorm):
    before = {name: (value, value.clone()) for name, value in conv_net.state_dict(keep_vars=True).items()}
    needed = [parameter.requires_grad for parameter in conv_net.parameters()]
    offline = offline_sensitivity(conv_net, images[:STEPS], fold_batchnorm)
    small = compiled(conv_net, factors="sensitivity", fold_batchnorm=fold_batchnorm)
    with torch.no_grad():
        for batch in images[:STEPS]:
            assert torch.equal(small(batch), conv_net(batch))
        torch.testing.assert_close(small(images[3]), offline(images[3]))
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(offline))
    plain = ranks(balf_fx.report(balf_fx.compile(conv_net, images[:STEPS], flops=0.5, effort="fast", progress=False)))
    assert ranks(balf_fx.report(small)) != plain
    assert [parameter.requires_grad for parameter in conv_net.parameters()] == needed
    assert all(value is conv_net.state_dict(keep_vars=True)[name] for name, (value, _) in before.items())
    assert all(torch.equal(value, earlier) for value, earlier in before.values())
    assert all(parameter.grad is None for parameter in conv_net.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_sensitivity_is_that_of_compile_for_a_transformer(tokens, mode):
    model = Transformer().eval()
    offline = offline_sensitivity(model, tokens[:STEPS])
    small = compiled(model, factors="sensitivity")
    with mode():
        for batch in tokens[:STEPS]:
            small(batch)
        torch.testing.assert_close(small(tokens[3]), offline(tokens[3]))
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(offline))


def test_sensitivity_across_graph_breaks(tokens):
    model = Broken().eval()
    small = calibrated(model, tokens, factors="sensitivity")
    with torch.no_grad():
        error = (small(tokens[3]) - model(tokens[3])).square().sum()
    assert balf_fx.report(small).flops_kept <= 0.5
    assert 0 < error < model(tokens[3]).square().sum()


def test_without_gradients_sensitivity_is_the_plain_output_error(tokens, caplog):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x):
            return self.second(self.first(x).relu()).detach().sign()

    model = Detached().eval()
    small, plain = (calibrated(model, tokens, factors=factors) for factors in ("sensitivity", "activations"))
    with torch.no_grad():
        torch.testing.assert_close(small(tokens[3]), plain(tokens[3]))
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(plain))


def test_sensitivity_restarts_with_the_weights(conv_net, images):
    small = compiled(conv_net, factors="sensitivity")
    with torch.no_grad():
        small(images[3])
        next(conv_net.parameters()).mul_(2)
        for batch in images[:STEPS]:
            assert torch.equal(small(batch), conv_net(batch))
        offline = offline_sensitivity(conv_net, images[:STEPS])
        torch.testing.assert_close(small(images[3]), offline(images[3]))


def computed(model: nn.Module) -> nn.Module:
    """Computes the weights of its layers anew in every call."""
    return nn.Sequential(*(parametrizations.weight_norm(layer) for layer in model)).eval()


def test_computed_weights_have_factors_as_well():
    model = computed(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)))
    x = torch.randn(16, 8)
    small = torch.compile(model, backend=balf, options={"flops": 0.8, "calibration_steps": 2, "inner": "eager"})
    with torch.no_grad():
        assert torch.equal(small(x), model(x))
        model[0].bias += 1.0  # calibration starts again
        model[0].parametrizations.weight.original0 *= 2.0
        for _ in range(2):
            assert torch.equal(small(x), model(x))
        small(x)
        expected = balf_fx.compile(model, x, flops=0.8, progress=False, effort="fast")
        torch.testing.assert_close(small(x), expected(x))
        assert [row.rank for row in balf_fx.report(small).sites] == [r.rank for r in balf_fx.report(expected).sites]
        factorized = [row.name for row in balf_fx.report(small).sites if row.rank is not None]
        assert factorized
        assert small(x[:5]).shape == (5, 8)  # another shape: the factors are found by what the weights are made of
        layer = model.get_submodule(factorized[0])
        layer.parametrizations.weight.original1 += 1.0
        with pytest.raises(WeightsChangedError, match="source"):
            small(x)


def test_the_log_tells_the_switch(conv_net, images, caplog):
    caplog.set_level(logging.INFO, "balf_fx.backend")
    small = calibrated(conv_net, images)
    assert not messages(caplog)
    with torch.no_grad():
        small(images[0])
        small(images[1])
    which, how_much = messages(caplog)
    assert "call 4 is the first compressed one" in which
    assert f"block.0: {ranks(balf_fx.report(small))['block.0']}" in which
    assert "% kept" in how_much


def test_the_model_is_not_touched(conv_net, images):
    before = {name: (tensor, tensor.clone()) for name, tensor in conv_net.state_dict(keep_vars=True).items()}
    small = calibrated(conv_net, images)
    with torch.no_grad():
        small(images[0])
    after = conv_net.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is tensor and torch.equal(tensor, copied) for name, (tensor, copied) in before.items())


def test_a_report_before_the_switch_says_how_far_calibration_is(conv_net, images):
    small = compiled(conv_net)
    with pytest.raises(NotCalibratedError, match="once it has been called"):
        balf_fx.report(small)
    with torch.no_grad():
        small(images[0])
    with pytest.raises(NotCalibratedError, match="1 of 3 calls"):
        balf_fx.report(small)


@pytest.mark.parametrize("way", ["function", "in place", "decorator"])
def test_every_way_to_compile(way, tokens):
    model = Broken().eval()
    if way == "in place":
        model.compile(backend=balf, options=options())
        small = model
    elif way == "function":
        small = torch.compile(lambda x: model(x), backend=balf, options=options())
    else:

        @torch.compile(backend=balf, options=options())
        def small(x):
            return model(x)

    with torch.no_grad():
        for batch in tokens:
            small(batch)
    assert balf_fx.report(small).flops_kept <= 0.5


def test_a_function_of_weights():
    weight = nn.Parameter(torch.randn(32, 64))
    small = torch.compile(lambda x, w: torch.relu(x @ w), backend=balf, options=options())
    with torch.no_grad():
        for _ in range(STEPS + 1):
            small(torch.randn(8, 32), weight)
    assert list(ranks(balf_fx.report(small))) == ["w"]


# Graph breaks, recompilation, sharing.


def test_graph_breaks_share_one_budget(tokens):
    model = Broken().eval()
    small = calibrated(model, tokens)
    with torch.no_grad():
        small(tokens[0])
    report = balf_fx.report(small)
    offline = balf_fx.compile(
        nn.Sequential(model.first, nn.ReLU(), model.second), tokens[:STEPS], flops=0.5, effort="fast"
    )
    assert list(ranks(report).values()) == list(ranks(balf_fx.report(offline)).values())
    assert list(ranks(report)) == ["first", "second"]
    assert report.flops_before == 2 * 2 * 40 * 32 * 64


def test_layers_that_share_a_graph_have_factors_of_their_own(tokens):
    model = Looped().eval()
    small = compiled(model)
    with torch.no_grad():
        for batch in tokens[:STEPS]:
            torch.testing.assert_close(small(batch), model(batch), rtol=0, atol=0)
        got = small(tokens[3])
        assert torch.equal(got, small(tokens[3]))
    report = balf_fx.report(small)
    assert len(report.sites) == len(set(ranks(report))) == 6
    assert report.flops_before == 3 * 2 * 2 * 40 * 32 * 64
    offline = balf_fx.compile(copy.deepcopy(model), tokens[:STEPS], flops=0.5, capture="symbolic_trace", effort="fast")
    assert sorted(map(str, ranks(report).values())) == sorted(map(str, ranks(balf_fx.report(offline)).values()))
    torch.testing.assert_close(got, offline(tokens[3]))


def test_new_shapes_after_the_switch_reuse_the_factors(conv_net, images, caplog):
    offline = balf_fx.compile(conv_net, images[:STEPS], flops=0.5, progress=False, effort="fast")
    small = calibrated(conv_net, images)
    with torch.no_grad():
        small(images[0])
        before = balf_fx.report(small)
        caplog.set_level(logging.INFO, "balf_fx.backend")
        for shape in ((3, 3, 20, 24), (1, 3, 12, 12)):
            batch = torch.randn(shape)
            torch.testing.assert_close(small(batch), offline(batch))
    assert not messages(caplog)
    assert balf_fx.report(small) is before


def test_new_shapes_before_the_switch_merge_their_statistics(conv_net):
    batches = [torch.randn(shape) for shape in ((8, 3, 12, 12), (4, 3, 16, 16), (2, 3, 12, 12))]
    small = calibrated(conv_net, batches)
    with torch.no_grad():
        small(batches[0])
    offline = balf_fx.compile(conv_net, batches, flops=0.5, progress=False, effort="fast")
    report, expected = balf_fx.report(small), balf_fx.report(offline)
    assert report.flops_before > expected.flops_before  # all shapes count, not the first alone
    kept = {row.name: row.energy_kept for row in expected.sites}
    assert all(row.energy_kept == pytest.approx(kept[row.name]) for row in report.sites if row.rank is not None)


def test_weights_that_calibration_has_not_seen_stay_dense(tokens, caplog):
    seen, unseen = nn.Linear(32, 32), nn.Linear(32, 32)
    small = torch.compile(lambda layer, x: layer(x), backend=balf, options=options())
    caplog.set_level(logging.INFO, "balf_fx.backend")
    with torch.no_grad():
        for batch in tokens:
            small(seen, batch)
        assert torch.equal(small(unseen, tokens[0]), unseen(tokens[0]))
        assert not torch.allclose(small(seen, tokens[0]), seen(tokens[0]))
    assert "calibration has not seen" in messages(caplog)[-1]


def test_a_tied_weight_is_kept_for_the_embedding():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(64, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x).relu())

    model = Tied().eval()
    ids = torch.randint(64, (4, 6))
    small = calibrated(model, [ids] * STEPS)
    with torch.no_grad():
        output = small(ids)
        features = model.embedding(ids).relu()
    assert output.shape == (4, 6, 64)
    report = balf_fx.report(small)
    assert report.params_after > report.params_before
    assert (output - features @ model.head.weight.T).norm() < 0.7 * output.norm()


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
        offline = balf_fx.compile(model, tokens[:STEPS], flops=0.5, progress=False, effort="fast")
        assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(offline))
        torch.testing.assert_close(output, offline(tokens[3]))


def test_one_model_compiled_twice_has_two_budgets(conv_net, images):
    smalls = [calibrated(conv_net, images, flops=flops) for flops in (0.7, 0.3)]
    with torch.no_grad():
        for small in smalls:
            small(images[0])
    assert [round(balf_fx.report(small).flops_kept, 1) for small in smalls] == [0.7, 0.3]


# Release.


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


# Threads.


def test_calls_from_several_threads(conv_net, images):
    small = compiled(conv_net, calibration_steps=12)
    dense = [conv_net(batch).detach() for batch in images]
    outputs = [[] for _ in range(4)]

    def work(index):
        with torch.no_grad():
            for _ in range(8):
                outputs[index].append(small(images[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        final = [small(batch) for batch in images]
    exact = [[torch.equal(output, dense[index]) for output in found] for index, found in enumerate(outputs)]
    assert sum(map(sum, exact)) == 12
    for found, same, compressed in zip(outputs, exact, final, strict=True):
        for output in (output for output, calibrated in zip(found, same, strict=True) if not calibrated):
            torch.testing.assert_close(output, compressed)


# Gradients and changing weights.


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
    offline = balf_fx.compile(conv_net, images[:STEPS], flops=0.5, progress=False, effort="fast")
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(offline))


def test_a_new_parameter_in_place_of_an_old_one_stays_dense(conv_net, images):
    small = calibrated(conv_net, images)
    with torch.no_grad():
        compressed = small(images[0])
        conv_net.block[0].weight = nn.Parameter(2 * conv_net.block[0].weight)
        changed = small(images[0])
    assert not torch.allclose(changed, compressed)


# Modes, layouts and types.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_modes(conv_net, images, mode):
    offline = balf_fx.compile(conv_net, images[:STEPS], flops=0.5, progress=False, effort="fast")
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


def test_dynamic_shapes():
    model = Transformer(depth=1).eval()
    batches = [torch.randn(size, length, 32) for size, length in ((4, 10), (3, 7), (6, 12))]
    offline = balf_fx.compile(model, batches, flops=0.5, progress=False, effort="fast")
    small = compiled(model, dynamic=True, inner="aot_eager")
    with torch.no_grad():
        for batch in batches:
            assert torch.equal(small(batch), model(batch))
        for batch in (*batches, torch.randn(5, 9, 32)):
            torch.testing.assert_close(small(batch), offline(batch))


def test_dynamic_shapes_of_a_conv_net(conv_net, images):
    small = compiled(conv_net, dynamic=True)
    with torch.no_grad():
        for batch in images[:STEPS]:
            assert torch.equal(small(batch), conv_net(batch))
        for size in (2, 5):
            assert small(images[0][:size]).shape == (size, 10)


def test_a_number_among_the_inputs(tokens):
    model = nn.Linear(32, 32)
    small = torch.compile(lambda x, n: model(x) * n, backend=balf, options=options())
    with torch.no_grad():
        for n, batch in enumerate(tokens[:STEPS]):
            assert torch.equal(small(batch, n), model(batch) * n)
        torch.testing.assert_close(small(tokens[0], 7), small(tokens[0], 1) * 7)


# Inner backends.


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
    offline = balf_fx.compile(model, tokens[:STEPS], flops=0.5, progress=False, effort="fast")
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


# Options.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"flop": 0.5}, "no option 'flop'"),
        ({"calibration_steps": 4}, "exactly one budget"),
        ({"flops": 0.5, "params": 0.5}, "exactly one budget"),
        ({"flops": 55}, "fraction"),
        ({"flops": 0.5, "calibration_steps": 0}, "calibration_steps"),
        ({"flops": 0.5, "inner": "balf"}, "inner"),
        ({"flops": 0.5, "inner": "nonsense"}, "nonsense"),
        ({"flops": 0.5, "mode": "reduce-overhead", "inner_options": {}}, "one of them"),
        ({"flops": 0.5, "factors": "magic"}, "factors"),
        ({"flops": 0.5, "factors": "air"}, "needs the gradients of weights"),
        ({"plan": 3}, "plan is"),
    ],
)
def test_wrong_options_fail_at_compile_time(conv_net, images, given, message):
    small = torch.compile(conv_net, backend=balf, options=given)
    with pytest.raises(OptionError, match=message) as caught, torch.no_grad():
        small(images[0])
    assert "flops, params, factors" in str(caught.value)


def test_no_options_at_all(conv_net, images):
    with pytest.raises(OptionError, match="exactly one budget"), torch.no_grad():
        torch.compile(conv_net, backend=balf)(images[0])


def test_errors_of_the_switch_come_back_at_every_call(conv_net, images):
    small = calibrated(conv_net, images, flops=0.01)
    for _ in range(2):
        with pytest.raises(BudgetError, match="strict=False"), torch.no_grad():
            small(images[0])
    closest = calibrated(conv_net, images, flops=0.01, strict=False)
    with torch.no_grad():
        closest(images[0])
    assert max(row.rank or 0 for row in balf_fx.report(closest).sites) == 1


def test_include_and_exclude(conv_net, images):
    small = calibrated(conv_net, images, flops=0.9, include=["block.*"], exclude=["block.4"])
    with torch.no_grad():
        small(images[0])
    assert list(ranks(balf_fx.report(small))) == ["block.0"]
    small = calibrated(conv_net, images, exclude=["blocks.*"])
    with pytest.raises(UnknownSiteError, match=r"'blocks\.\*' matches no site"), torch.no_grad():
        small(images[0])


def test_patterns_may_match_in_one_graph_only(tokens):
    small = calibrated(Broken().eval(), tokens, flops=0.9, include=["second"])
    with torch.no_grad():
        small(tokens[0])
    assert list(ranks(balf_fx.report(small))) == ["second"]


def test_explicit_ranks_and_weights_alone(conv_net, images):
    small = calibrated(conv_net, images, flops=None, allocation={"block.0": 5})
    with torch.no_grad():
        small(images[0])
    assert ranks(balf_fx.report(small))["block.0"] == 5
    small = calibrated(conv_net, images, factors="svd")
    offline = balf_fx.compile(conv_net, images[:1], flops=0.5, factors="svd", progress=False, effort="fast")
    with torch.no_grad():
        torch.testing.assert_close(small(images[0]), offline(images[0]))


def test_a_model_without_sites():
    strict, lenient = compiled(nn.ReLU()), compiled(nn.ReLU(), strict=False)
    with torch.no_grad():
        for small in (strict, lenient):
            for _ in range(STEPS):
                small(torch.randn(4))
        with pytest.raises(NoSiteError, match="nothing in the compiled graphs"):
            strict(torch.randn(4))
        assert lenient(torch.ones(4)).sum() == 4


def test_an_inner_backend_that_fails_may_succeed_the_next_time(conv_net, images):
    attempts = []

    def inner(graph_module, example_inputs):
        attempts.append(graph_module)
        if len(attempts) == 1:
            raise RuntimeError("not now")
        return graph_module

    offline = balf_fx.compile(conv_net, images[:STEPS], flops=0.5, progress=False, effort="fast")
    small = calibrated(conv_net, images, inner=inner)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="not now"):
            small(images[0])
        torch.testing.assert_close(small(images[0]), offline(images[0]))


@pytest.mark.parametrize("factors", ["activations", "sensitivity"])
def test_side_effects_and_randomness_happen_once_per_call(factors):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            x.mul_(2)
            return self.layer(x) + torch.rand_like(x)

    model = Counting().eval()
    twin = copy.deepcopy(model)
    small = compiled(model, inner="aot_eager", factors=factors)
    with torch.no_grad():
        for call in range(STEPS + 2):
            given, expected = torch.ones(8, 32), torch.ones(8, 32)
            torch.manual_seed(call)
            output = small(given)
            torch.manual_seed(call)
            wanted = twin(expected)
            assert torch.equal(given, expected)
            if call < STEPS:
                assert torch.equal(output, wanted)
    assert model.calls == twin.calls == STEPS + 2


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_with_and_without_their_fast_path(tokens, fast_path, norm_first):
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    offline = balf_fx.compile(model, tokens[:STEPS], flops=0.6, progress=False, effort="fast")
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        small = compiled(model, flops=0.6)
        with torch.no_grad():
            for batch in tokens[:STEPS]:
                torch.testing.assert_close(small(batch), model(batch))
            torch.testing.assert_close(small(tokens[3]), offline(tokens[3]), rtol=1e-4, atol=1e-4)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert list(ranks(balf_fx.report(small)).values()) == list(ranks(balf_fx.report(offline)).values())


@pytest.mark.parametrize("average", [True, False])
def test_attention_weights_of_the_fast_path(tokens, average):
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    small = torch.compile(
        lambda x: model(x, x, x, average_attn_weights=average), backend=balf, options=options(flops=0.9)
    )
    with torch.no_grad():
        for batch in tokens[:STEPS]:
            torch.testing.assert_close(small(batch), model(batch, batch, batch, average_attn_weights=average))
        small(tokens[3])
    assert len(balf_fx.report(small).sites) == 2


def test_cross_attention_stays_as_it_is(tokens):
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    small = torch.compile(lambda x, y: model(x, y, y)[0], backend=balf, options=options(strict=False))
    with torch.no_grad():
        for batch in tokens:
            torch.testing.assert_close(small(batch, tokens[0]), model(batch, tokens[0], tokens[0])[0])


def test_a_call_with_nan_returns_nan_and_does_not_count(tokens, caplog):
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    small = compiled(model)
    with torch.no_grad():
        small(tokens[0])
        assert small(torch.full((4, 10, 32), torch.nan)).isnan().all()
        small(tokens[1])
        small(tokens[2])
    assert "does not count" in caplog.text
    offline = balf_fx.compile(model, tokens[:2], flops=0.5, progress=False, effort="fast")
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(offline))


# Plans.


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


# Where symbolic tracing ends.


def test_a_hugging_face_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(100, (2, 12))
    small = compiled(model)
    with torch.no_grad():
        for _ in range(STEPS):
            assert torch.equal(small(ids).last_hidden_state, model(ids).last_hidden_state)
        output = small(ids).last_hidden_state
        assert not torch.equal(output, model(ids).last_hidden_state)
    report = balf_fx.report(small)
    assert report.flops_kept <= 0.5
    assert "encoder.layer.0.attention.self.query" in ranks(report)


def test_a_timm_model():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=10
    ).eval()
    batch = torch.randn(2, 3, 32, 32)
    small = compiled(model)
    with torch.no_grad():
        for _ in range(STEPS):
            assert torch.equal(small(batch), model(batch))
        small(batch)
    assert balf_fx.report(small).flops_kept <= 0.5


# What Dynamo and Python packaging need.


def test_dynamo_finds_the_installed_backend_and_its_log(tmp_path):
    root = Path(__file__).parents[2]
    group, name = "torch_dynamo_backends", 'balf = "balf_fx.backend:balf"'
    assert f"[project.entry-points.{group}]\n{name}\n" in (root / "pyproject.toml").read_text()
    installed = tmp_path / "balf_fx-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: balf-fx\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(f"[{group}]\n{name.replace(chr(34), '')}\n")
    code = """
        import torch
        model = torch.nn.Linear(32, 32)
        options = {"flops": 0.5, "calibration_steps": 1, "inner": "eager"}
        small = torch.compile(model, backend="balf", options=options)
        with torch.no_grad():
            print(*(torch.equal(small(x), model(x)) for x in torch.randn(2, 4, 32)))
        """
    path = os.pathsep.join([str(tmp_path), str(root)])
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_LOGS": "balf_fx.backend"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "True False\n", result.stderr
    assert "call 2 is the first compressed one" in result.stderr


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['head']._parameters['weight']", "head.weight"),
        ("L['self']._modules['layers']._modules['0']._buffers['mean']", "layers.0.mean"),
        ("L['self'].layers[0].weight", "layers.0.weight"),
        ("G['model']._modules['head']._parameters['bias']", "model.head.bias"),
        ("L['fn'].__closure__[0].cell_contents._modules['a']._parameters['weight']", "a.weight"),
        ("L['self']._modules['graph']._parameters['weight']", "graph_.weight"),
        ("L['w']", "w"),
    ],
)
def test_weight_names(source, name):
    assert weight_name(source) == name
