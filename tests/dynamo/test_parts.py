"""Several graphs are one program: refits and gradients cross the breaks between them, and shared weights are one.

In float64: the oracle is mostly the same model without the breaks.
"""

from __future__ import annotations

import logging

import pytest
import torch
from architectures import count_flops
from dynamo.helpers import STEPS, WIDTH, Mlps, calibrated, compiled, make_offline, messages, ranks, rows, run
from torch import nn

import balf_fx
from balf_fx import backend
from balf_fx.dynamo.recording import Recording


def graph_flops(graph, inputs):
    return count_flops(lambda given: graph(*given), inputs)


class Collector:
    """An inner backend that keeps the graphs that it is given, and the inputs they are compiled for."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph_module, example_inputs):
        self.graphs.append((graph_module, example_inputs))
        return graph_module

    def flops(self):
        return sum(graph_flops(graph, inputs) for graph, inputs in self.graphs)

    def parameters(self):
        return {id(value): value for graph, _ in self.graphs for value in graph.parameters()}


def whole(model):
    """The same layers without the break."""
    same = Mlps(broken=False).double().eval()
    same.load_state_dict(model.state_dict())
    return same


def error(model, small, batches):
    with torch.no_grad():
        return sum(float((small(batch) - model(batch)).square().sum()) for batch in batches)


def without_links(monkeypatch):
    """Every part is on its own."""
    monkeypatch.setattr(Recording, "_links", lambda recording, inputs: ())


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_one_budget_covers_what_all_parts_are_counted_to_do(effort):
    model, batches, inner = Mlps().double().eval(), rows(), Collector()
    small = calibrated(model, batches, effort=effort, flops=0.6, inner=inner)
    run(small, batches[STEPS])
    report = balf_fx.report(small)
    assert len(inner.graphs) == 2
    assert inner.flops() == report.flops_after <= 0.6 * count_flops(whole(model), batches[0])
    assert report.flops_before == count_flops(whole(model), batches[0])
    assert sum(value.numel() for value in inner.parameters().values()) == report.params_after


def test_layers_become_narrower_within_their_part():
    model, batches, inner = Mlps().double().eval(), rows(), Collector()
    small = calibrated(model, batches, effort="balanced", flops=0.5, inner=inner)
    run(small, batches[STEPS])
    plan = backend.plan(small).plan
    assert plan.widths
    assert {name.split(".")[0] for name in plan.widths[0].layers} in ({"first"}, {"second"})
    held = [module.weight.shape for graph, _ in inner.graphs for module in graph.modules() if hasattr(module, "weight")]
    assert all(width.features == 2 * WIDTH and any(width.size in shape for shape in held) for width in plan.widths)


@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_gradients_and_refits_cross_the_break_as_if_it_were_not_there(effort):
    model, batches = Mlps().double().eval(), rows()
    offline = make_offline(whole(model), batches[:STEPS], effort=effort, widths=False)
    small = calibrated(model, batches, effort=effort, widths=False)
    torch.testing.assert_close(run(small, batches[STEPS]), run(offline, batches[STEPS]))
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(offline))


def test_a_part_is_refitted_on_what_the_compressed_one_before_hands_over(monkeypatch):
    model, batches = Mlps().double().eval(), rows()
    plan = {"first.0": 6, "first.2": 6, "second.0": 12, "second.2": 12}
    given = {"flops": None, "allocation": plan, "factors": "activations", "refit": True}
    linked = calibrated(model, batches, **given)
    run(linked, batches[STEPS])
    offline = make_offline(whole(model), batches[:STEPS], **given)
    torch.testing.assert_close(run(linked, batches[STEPS]), run(offline, batches[STEPS]))
    without_links(monkeypatch)
    apart = calibrated(model, batches, **given)
    run(apart, batches[STEPS])
    assert error(model, linked, batches) < 0.9 * error(model, apart, batches)


def test_the_loss_of_the_answer_reaches_the_first_part(monkeypatch):
    """The second part reads a few features only, and the first one learns which from its gradients alone."""

    class Selective(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            with torch.no_grad():
                self.second.weight[:, 4:] = 0

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model, batches = Selective().double().eval(), rows()
    given = {"flops": None, "factors": "sensitivity", "allocation": {"first": 4}}
    linked = calibrated(model, batches, **given)
    run(linked, batches[STEPS])
    without_links(monkeypatch)
    apart = calibrated(model, batches, **given)
    run(apart, batches[STEPS])
    assert error(model, linked, batches) < 0.1 * error(model, apart, batches)


def test_a_value_written_to_between_the_parts_is_not_a_link():
    @torch._dynamo.disable
    def scale(x):
        x.mul_(3.0)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            x = self.first(x)
            scale(x)
            return self.second(x)

    model, batches = Scaled().double().eval(), rows()
    small = calibrated(model, batches, flops=None, allocation={"first": 11}, factors="activations", refit=True)
    wanted = run(model, batches[STEPS])
    assert (run(small, batches[STEPS]) - wanted).norm() < 0.5 * wanted.norm()


def test_a_module_that_is_called_in_a_loop_counts_with_every_run():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.layer(x)

    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = Mlps(), Head()

        def forward(self, x):
            for _ in range(3):
                x = self.block(x)
            return self.head(x)

    model, batches, inner = Repeated().double().eval(), rows(), Collector()
    small = calibrated(model, batches[:1], effort="best", flops=0.6, inner=inner)
    run(small, batches[STEPS])
    report = balf_fx.report(small)
    *block, head = [graph_flops(graph, inputs) for graph, inputs in inner.graphs]
    assert report.flops_before == 3 * count_flops(whole(model.block), batches[0]) + 2 * len(batches[0]) * WIDTH**2
    assert report.flops_after == 3 * sum(block) + head <= 0.6 * report.flops_before
    assert len(report.sites) == 5


class Shared(nn.Module):
    """The same layer in both parts."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.broken = True

    def forward(self, x):
        x = x + self.layer(x).tanh()
        if self.broken:
            torch._dynamo.graph_break()
        return self.last(x + self.layer(x).sigmoid())


class Tied(nn.Module):
    """An embedding in one part whose weight is the output projection in the other."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(40, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.broken = True

    def forward(self, ids):
        x = self.embedding(ids)
        if self.broken:
            torch._dynamo.graph_break()
        return self.head(self.middle(x).relu())


@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("build", [Shared, Tied])
def test_a_weight_in_two_parts_has_one_copy_and_is_counted_once(build, effort):
    model, inner = build().double().eval(), Collector()
    batches = rows() if build is Shared else list(torch.randint(40, (STEPS + 1, 16, 6)))
    budget = {"flops": None, "params": 0.7 if build is Shared else 0.9, "effort": effort, "widths": False}
    small = calibrated(model, batches, inner=inner, **budget)
    output = run(small, batches[STEPS])
    report = balf_fx.report(small)
    assert len(inner.graphs) == 2
    assert report.params_before == sum(value.numel() for value in model.parameters())
    assert sum(value.numel() for value in inner.parameters().values()) == report.params_after
    assert report.params_after <= budget["params"] * report.params_before
    assert inner.flops() == report.flops_after
    if build is Tied:
        assert any(value is model.embedding.weight for value in inner.parameters().values())
    model.broken = False
    offline = make_offline(model, batches[:STEPS], **budget)
    torch.testing.assert_close(output, run(offline, batches[STEPS]))


def test_a_part_without_layers_stays_as_it_is_and_the_log_says_so(caplog):
    def model(x, layer):
        x = layer(x)
        torch._dynamo.graph_break()
        return x.sin() * 2

    layer, batches, inner = nn.Linear(WIDTH, WIDTH).double(), rows(), Collector()
    small = compiled(lambda x: model(x, layer), inner=inner, effort="best")
    run(small, *batches[:STEPS])
    caplog.set_level(logging.INFO, "balf_fx.backend")
    output = run(small, batches[STEPS])
    (first, _), (second, inputs) = inner.graphs
    assert torch.equal(output, inputs[0].sin() * 2)
    assert list(first.parameters())
    assert not list(second.parameters())
    assert any("1 of 2 graphs" in message for message in messages(caplog))


class OneWeight(nn.Module):
    """Two parts that compute with the same weight, each in its own way."""

    def __init__(self, compute):
        super().__init__()
        self.compute, self.weight = compute, nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x):
        first, second = self.compute
        x = torch.tanh(nn.functional.linear(x, first(self.weight)))
        torch._dynamo.graph_break()
        return nn.functional.linear(x, second(self.weight))


@pytest.mark.parametrize(
    "compute",
    [
        (lambda w: w * 0.5, lambda w: w * 2.0),
        (lambda w: w * 2.0, lambda w: w * -2.0),
        (lambda w: w, lambda w: w[:16]),
        (lambda w: w.relu(), lambda w: w),
    ],
    ids=["scaled", "negative", "rows", "plain in one of them"],
)
def test_layers_that_are_computed_from_one_weight_are_not_one_layer(compute):
    model, batches = OneWeight(compute).double().eval(), rows()
    small = calibrated(model, batches, flops=1.0)
    for batch in batches:
        torch.testing.assert_close(run(small, batch), run(model, batch))
    model = OneWeight(compute).double().eval()
    small = calibrated(model, batches, flops=0.8, effort="best")
    assert error(model, small, batches) < 0.5 * sum(float(run(model, batch).square().sum()) for batch in batches)
    report = balf_fx.report(small)
    assert len({row.name for row in report.sites}) == 2
    assert report.flops_kept <= 0.8
    assert report.params_before == WIDTH * WIDTH
    collector = Collector()
    torch.compiler.reset()
    small = calibrated(model, batches, flops=0.8, inner=collector)
    run(small, batches[0])
    assert balf_fx.report(small).params_after == sum(value.numel() for value in collector.parameters().values())
