"""The first calls: exact, recorded, and counted."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from dynamo.helpers import STEPS, WIDTH, Broken, calibrated, compiled, make_offline, options, ranks, rows, run
from torch import nn

import balf_fx
from balf_fx.backend import balf
from balf_fx.errors import NotCalibratedError
from balf_fx.graph.flops import count_flops


def test_calibration_returns_what_the_model_returns_bit_for_bit(conv_net, images):
    small = compiled(conv_net)
    with torch.no_grad():
        for batch in images[:STEPS]:
            assert torch.equal(small(batch), conv_net(batch))
        assert not torch.equal(small(images[0]), conv_net(images[0]))


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


def test_a_call_with_nan_returns_nan_and_does_not_count(tokens, caplog):
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    small = compiled(model)
    with torch.no_grad():
        small(tokens[0])
        assert small(torch.full((4, 10, 32), torch.nan)).isnan().all()
        small(tokens[1])
        small(tokens[2])
    assert "not used for calibration" in caplog.text
    offline = make_offline(model, tokens[:2])
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(offline))


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
        for output in (output for output, is_exact in zip(found, same, strict=True) if not is_exact):
            torch.testing.assert_close(output, compressed)


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


def test_flops_are_those_of_one_call_where_graphs_run_on_some_calls_only(conv_net, images):
    batches = [*images[: STEPS - 1], images[0][: len(images[0]) // 2]]  # which makes a second graph
    small = compiled(conv_net, dynamic=False)
    with torch.no_grad():
        for batch in [*batches, images[0]]:
            small(batch)
    found = balf_fx.report(small)
    mean = sum(count_flops(conv_net, batch) for batch in batches) / len(batches)
    assert found.flops_before == int(mean)
    assert balf_fx.plan(small).flops_after == pytest.approx(found.flops_kept * mean)
    assert 0.45 < found.flops_kept <= 0.5 + 1e-6
    assert sum(site.flops_before for site in found.sites) < mean


def test_a_function_of_weights():
    weight = nn.Parameter(torch.randn(32, 64))
    small = torch.compile(lambda x, w: torch.relu(x @ w), backend=balf, options=options())
    with torch.no_grad():
        for _ in range(STEPS + 1):
            small(torch.randn(8, 32), weight)
    assert list(ranks(balf_fx.report(small))) == ["w"]


def test_a_number_among_the_inputs(tokens):
    model = nn.Linear(32, 32)
    small = torch.compile(lambda x, n: model(x) * n, backend=balf, options=options())
    with torch.no_grad():
        for n, batch in enumerate(tokens[:STEPS]):
            assert torch.equal(small(batch, n), model(batch) * n)
        torch.testing.assert_close(small(tokens[0], 7), small(tokens[0], 1) * 7)


class Gate(nn.Module):
    """Has no weights."""

    def forward(self, x):
        return x * torch.sigmoid(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class Loop(nn.Module):
    """Dynamo leaves a loop with a break alone, and compiles what it calls."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Layer(), Gate(), Layer(), Gate(), Layer(), Gate()])

    def forward(self, x):
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        return x


def test_frames_without_weights_may_run_several_times_in_one_call():
    model, batches = Loop().double().eval(), rows()
    small = compiled(model, flops=0.6)
    for batch in batches[:STEPS]:
        assert torch.equal(run(small, batch), run(model, batch))
    assert not torch.equal(run(small, batches[0]), run(model, batches[0]))
    assert len(balf_fx.report(small).sites) == 3
