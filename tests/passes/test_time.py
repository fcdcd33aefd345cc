import copy
import dataclasses
import functools
import itertools
from typing import get_args

import pytest
import torch
from expert_models import INPUTS, Batched
from small_models import ConvNet
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import balf_fx
from balf_fx import passes
from balf_fx.calibration.observers import CovarianceObserver
from balf_fx.errors import PassError
from balf_fx.graph.annotation import annotation, graph_record, sites
from balf_fx.graph.curves import Divided
from balf_fx.graph.flops import flop_counter, profile
from balf_fx.latency import table as module
from balf_fx.latency.table import Table
from balf_fx.passes import (
    Allocate,
    Annotate,
    Factorize,
    FindPivots,
    InsertObservers,
    Narrow,
    RemoveObservers,
    Score,
    Time,
)
from balf_fx.ranks.costs import useful_ranks


@functools.cache
def flops_of_one(operation):
    """The FLOPs of an operation from one feature to one; others are in proportion to both numbers."""
    with torch.no_grad(), flop_counter() as counter:
        operation.task(1, 1)()
    return counter.get_total_flops()


@pytest.fixture(autouse=True)
def flops_as_times(monkeypatch):
    """An operation takes a nanosecond for each FLOP."""

    def seconds(run):
        return 1e-9 * run.inputs * run.outputs * flops_of_one(run.operation)

    monkeypatch.setattr(module, "_seconds", seconds)


def scored(model, batches, pivot=False):
    graph_module = balf_fx.prepare(model, batches[0], pivot=pivot)
    for batch in batches:
        graph_module(batch)
    Score()(graph_module)
    return graph_module


@pytest.fixture
def graph_module():
    return scored(ConvNet().eval(), list(torch.randn(2, 4, 3, 8, 8)))


def test_every_candidate_has_the_time_of_its_operations(graph_module):
    Time([torch.randn(4, 3, 8, 8)], Table())(graph_module)
    for nodes in sites(graph_module).values():
        curve, measured = annotation(nodes[0]).curve, sum(annotation(node).nanoseconds for node in nodes)
        assert len(curve.candidates) > 1
        for candidate in curve.candidates:
            if candidate.rank is None or candidate.rank >= 4:  # lower ranks take as long
                share = candidate.flops / curve.dense.flops
                assert candidate.latency / measured == pytest.approx(share, rel=1e-2)


def test_every_node_has_a_time_and_observers_see_nothing(graph_module):
    observers = [each for each in graph_module.modules() if isinstance(each, CovarianceObserver)]
    counts = [float(observer.moments.count) for observer in observers]
    state = copy.deepcopy(graph_module.state_dict())
    Time([torch.randn(4, 3, 8, 8)], Table())(graph_module)
    assert [float(observer.moments.count) for observer in observers] == counts
    assert all(torch.equal(value, state[name]) for name, value in graph_module.state_dict().items())
    times = [annotation(node).nanoseconds for node in graph_module.graph.nodes]
    assert sum(times) == pytest.approx(graph_record(graph_module).nanoseconds, rel=1e-3)
    assert all(annotation(node).nanoseconds > 0 for nodes in sites(graph_module).values() for node in nodes)


@pytest.mark.parametrize("whole", [1e-9, 10.0])
def test_what_is_not_a_site_has_the_rest_of_a_compiled_graph(graph_module, monkeypatch, whole):
    names = {node.name for nodes in sites(graph_module).values() for node in nodes}
    times = {node.name: 1e-3 for node in graph_module.graph.nodes}
    monkeypatch.setattr(passes.time, "node_seconds", lambda *arguments: (times, whole))
    Time([torch.randn(4, 3, 8, 8)], Table(), compiled=lambda: None)(graph_module)
    found = {node.name: 1e-9 * annotation(node).nanoseconds for node in graph_module.graph.nodes}
    assert all(found[name] == pytest.approx(1e-3) for name in names)
    assert sum(found.values()) == pytest.approx(max(whole, 1e-3 * len(names)))
    others = [seconds for name, seconds in found.items() if name not in names]
    assert max(others) == pytest.approx(min(others), abs=1e-9)


@pytest.mark.parametrize("pivot", [True, False])
def test_every_form_has_a_time_at_every_size(pivot):
    model = nn.Sequential(nn.Conv2d(32, 48, 1), nn.ReLU(), nn.Conv2d(48, 32, 1)).eval()
    graph_module = scored(model, list(torch.randn(2, 4, 32, 6, 6)), pivot=pivot)
    FindPivots(pivot)(graph_module)
    Score()(graph_module)
    Time([torch.randn(4, 32, 6, 6)], Table())(graph_module)
    for site, nodes in sites(graph_module).items():
        clock = annotation(nodes[0]).curve.clock
        for outputs, inputs, move in itertools.product((8, 20, site.out_features), (12, site.in_features), (0, 9, 128)):
            small = dataclasses.replace(site, out_features=outputs, in_features=inputs, move=move)
            assert all(clock(small, rank) > 0 for rank in (None, *useful_ranks(small)))


def test_experts_take_time_in_proportion_to_flops():
    model, batches = Batched().eval(), list(torch.randn(2, 64, INPUTS))
    graph_module = scored(model, batches)
    values = [batches[0]] if isinstance(batches[0], torch.Tensor) else list(batches[0].values())
    Time(values, Table())(graph_module)
    found = [nodes for site, nodes in sites(graph_module).items() if site.has_experts]
    assert found
    for nodes in found:
        curve = annotation(nodes[0]).curve
        for candidate in curve.candidates[:-1]:
            share = candidate.flops / curve.dense.flops
            assert candidate.latency / curve.dense.latency == pytest.approx(share, rel=0.02)


def test_a_budget_of_time_in_a_pass_manager():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    batches = torch.randn(2, 32, 64)
    graph_module = fx.symbolic_trace(model)
    profile(graph_module, [batches[0]])
    graph_module = PassManager([Annotate(), InsertObservers()])(graph_module).graph_module
    for batch in batches:
        graph_module(batch)
    passes = [Score(), Time([batches[0]], Table()), Allocate(latency=0.9), RemoveObservers(), Narrow(), Factorize()]
    small = PassManager(passes)(graph_module).graph_module
    found = graph_record(small).allocation
    assert found.measure == "latency"
    saved = sum(choice.dense.latency - choice.chosen.latency for choice in found.choices)
    assert saved >= 0.1 * graph_record(small).nanoseconds - 1


@pytest.mark.parametrize("slower", [1, 20])
def test_a_convolution_takes_the_form_that_loses_less_in_its_time(monkeypatch, slower):
    conv = nn.Conv2d(16, 16, 3, padding=1)
    columns, rows = torch.randn(16, 16, 3, 1), torch.randn(1, 1, 1, 3)
    conv.weight = nn.Parameter(columns * rows / 10)
    batches = list(torch.randn(2, 8, 16, 6, 6))
    graph_module = balf_fx.prepare(nn.Sequential(conv).eval(), batches[0], factors="sensitivity", separable=True)
    balf_fx.calibrate(graph_module, batches, progress=False)
    plain = module._seconds

    def seconds(run):
        along_an_axis = run.operation.conv is not None and run.operation.conv.kernel_size in ((3, 1), (1, 3))
        return plain(run) * (slower if along_an_axis else 1)

    monkeypatch.setattr(module, "_seconds", seconds)
    chosen = []
    for _ in range(2):  # again, from what was chosen before
        Score(factors="sensitivity", divisions=get_args(Divided), by_time=True)(graph_module)
        Time([batches[0]], Table())(graph_module)
        ((site, (node,)),) = sites(graph_module).items()
        chosen.append((site, annotation(node).curve))
        others = annotation(node).others
        assert {site.divided, *(other.divided for other, _ in others)} == {None, *get_args(Divided)}
        assert all(chosen[-1][1].least_at_half("latency") < curve.least_at_half("latency") for _, curve in others)
    assert chosen[0][0] == chosen[1][0]
    assert (chosen[0][0].divided == "separable") is (slower == 1)
    assert (chosen[0][1].strips is not None) is (chosen[0][0].divided is not None)


def test_time_comes_after_scores_and_before_its_budget(graph_module):
    with pytest.raises(PassError, match="run Time first"):
        Allocate(latency=0.5)(graph_module)
    fresh = balf_fx.prepare(ConvNet().eval(), torch.randn(4, 3, 8, 8))
    with pytest.raises(PassError, match="run Score first"):
        Time([torch.randn(4, 3, 8, 8)], Table())(fresh)
