"""Budgets of time, with clocks that follow a law: what is chosen can then be checked."""

import copy
import functools
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import ConvNet, randomise_batchnorm
from torch import nn

import balf_fx
from balf_fx.engine import certify
from balf_fx.engine import timing as module
from balf_fx.engine.settings import Settings
from balf_fx.engine.timing import Line, nearest_line, next_target
from balf_fx.engine.units import share_of
from balf_fx.errors import BudgetError, OptionError
from balf_fx.graph.annotation import annotation
from balf_fx.graph.flops import count_flops, flop_counter
from balf_fx.latency import table
from balf_fx.latency.stopwatch import Race
from balf_fx.passes import time
from balf_fx.reporting.report import timing_in_words


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return randomise_batchnorm(ConvNet(16)).eval()


@pytest.fixture(scope="module")
def batches():
    return list(torch.randn(3, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


class Counted(types.SimpleNamespace):
    """A task that is not run."""

    def __call__(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    """Operations take a nanosecond for each FLOP; models take what `law` makes of the share of FLOPs that they keep."""
    found = types.SimpleNamespace(law=lambda share: share, compiled=0, apart=1.0)

    def task(program, trace, runner):
        found.compiled += runner == "inductor"
        graph_module = program.graph_modules[0]
        apart = any(name.endswith("_bias") for name, _ in graph_module.named_parameters())
        flops = count_flops(graph_module, *trace[0].args)
        return Counted(flops=flops, runner=runner, apart=apart)

    def race(first, second, device):
        if first.runner != second.runner:  # of the original
            return Race(1.0, found.inductor, found.inductor)
        if first.apart != second.apart and first.flops == second.flops:
            return Race(1.0, 1 / found.apart, 1 / found.apart)
        share = second.flops / first.flops
        return Race(1e-9 * first.flops, 1e-9 * first.flops * found.law(share), found.law(share))

    def node_seconds(graph_module, inputs, device, skipped, compiled):
        times = {node.name: 1e-9 * (annotation(node).flops or 0) for node in graph_module.graph.nodes}
        return times, None if compiled is None else 1e-9 * compiled.flops

    monkeypatch.setattr(module, "_task", task)
    monkeypatch.setattr(module, "_race", race)
    monkeypatch.setattr(table, "_seconds", counted_seconds)
    monkeypatch.setattr(time, "node_seconds", node_seconds)
    monkeypatch.setattr(module, "open_table", lambda device, group: table.Table())
    return found


@functools.cache
def counted_seconds(run):
    with torch.no_grad(), flop_counter() as counter:
        run.operation.task(run.inputs, run.outputs)()
    return 1e-9 * counter.get_total_flops()


def fast(model, batches, **options):
    runner = {"runner": "eager"} if "latency" in (*options, options.get("minimise")) else {}
    return balf_fx.compile(model, batches, **{"effort": "fast", "progress": False, **runner, **options})


@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.floats(0.1, 1.5))
def test_the_next_target_hits_where_savings_are_in_proportion(asked, by_operations, scale):
    measured = 1 - scale * (1 - by_operations)
    found = next_target(asked, [(by_operations, measured)])
    assert 0 < found <= 1
    if measured < 1 and 1 - (1 - asked) / scale > 1e-3:
        assert 1 - scale * (1 - found) == pytest.approx(asked)
        assert nearest_line(asked, [(by_operations, measured)]).measured(found) == pytest.approx(asked)


def test_without_other_models_times_are_those_of_their_operations():
    assert Line().measured(0.7) == Line().by_operations(0.7) == 0.7


def test_models_of_the_same_operations_are_expected_to_take_as_long_as_the_faster_one():
    assert Line((0.5, 0.7), (0.5, 0.6)).measured(0.5) == 0.6


def test_no_model_is_expected_to_take_less_than_no_time():
    assert Line((1.0, 1.0), (0.8, 0.4)).measured(0.5) == 0


def test_a_model_that_gained_nothing_is_followed_by_a_smaller_one():
    assert next_target(0.9, [(0.8, 1.1)]) == 0.4
    assert next_target(0.9, [(0.8, 1.1), (0.4, 1.2)]) == 0.2


def test_the_next_target_lies_between_the_nearest_models():
    tried = [(0.33, 0.65), (0.8, 0.95), (0.26, 0.4), (0.1, 0.3)]
    assert next_target(0.6, tried) == pytest.approx(0.26 + 0.07 * 0.2 / 0.25)
    assert next_target(0.6, tried[::-1]) == next_target(0.6, tried)


def test_models_that_are_still_too_slow_are_followed_by_smaller_ones():
    tried = [(0.6, 0.631), (0.566, 0.619), (0.545, 0.627)]
    assert next_target(0.6, tried) < 0.545
    assert next_target(0.6, tried) == next_target(0.6, tried[::-1])


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_times_in_proportion_to_flops_give_the_model_of_that_budget(net, batches, clock, effort):
    small = fast(net, batches, latency=0.6, effort=effort)
    found = balf_fx.report(small)
    assert found.measure == "latency"
    assert found.timing.measured == pytest.approx(found.flops_kept)
    assert 0.9 * 0.6 <= found.flops_kept <= 1.03 * 0.6


@pytest.mark.parametrize("asked", [0.7, 0.9])
def test_the_target_is_corrected_where_half_of_the_savings_are_real(net, batches, clock, asked):
    clock.law = lambda share: 1 - 0.5 * (1 - share) if share < 1 else 1.0
    report = balf_fx.report(fast(net, batches, latency=asked))
    kept = report.timing
    assert report.target == asked
    assert kept.measured == pytest.approx(asked, rel=0.03)
    assert kept.by_operations == pytest.approx(1 - 2 * (1 - kept.measured))
    assert kept.predicted == pytest.approx(kept.measured)


@pytest.mark.parametrize("asked", [0.6, 0.7, 0.8])
def test_the_target_is_corrected_where_only_small_models_save_time(net, batches, clock, asked):
    clock.law = lambda share: 1 - 0.2 * (1 - share) if share > 0.5 else 1.7 * share + 0.05  # the line misses at first
    kept = balf_fx.report(fast(net, batches, latency=asked)).timing
    assert kept.measured == pytest.approx(asked, rel=0.03)


def test_no_model_that_is_slower_than_the_original_is_used(net, batches, clock):
    clock.law = lambda share: 2 - share
    small = fast(net, batches, latency=0.9, strict=False)
    assert set(balf_fx.plan(small).ranks.values()) == {None}
    torch.testing.assert_close(small(batches[0]), net(batches[0]))


def test_a_time_out_of_reach_names_the_fastest_model(net, batches, clock, caplog):
    clock.law = lambda share: 1 - 0.2 * (1 - share)
    with pytest.raises(BudgetError, match="out of reach: at its smallest ranks and widths the model takes") as error:
        fast(net, batches, latency=0.5)
    assert 0.8 < error.value.minimum < 0.9
    assert "was asked for" not in caplog.text
    small = fast(net, batches, latency=0.5, strict=False)
    assert balf_fx.report(small).timing.measured == pytest.approx(error.value.minimum, rel=1e-3)
    assert "0.5 was asked for" in caplog.text


def test_seconds_are_a_share_of_the_original_time(net, batches, clock):
    dense = count_flops(net, batches[0]) * 1e-9
    small = fast(net, batches, latency=f"{700 * dense:.9f}ms")
    assert balf_fx.report(small).timing.asked == pytest.approx(0.7, rel=1e-4)
    generous = fast(net, batches, latency="10s")
    assert set(balf_fx.plan(generous).ranks.values()) == {None}


@pytest.mark.parametrize(("inductor", "runner"), [(0.5, "inductor"), (2.0, "eager")])
def test_the_faster_runner_of_the_original_is_used(net, batches, clock, inductor, runner):
    clock.inductor = inductor
    assert balf_fx.report(fast(net, batches, latency=0.7, runner=None)).timing.runner == runner


@pytest.mark.parametrize(("apart", "pivot"), [(0.9, True), (1.1, True), (1.1, False)])
def test_biases_are_added_apart_where_that_is_not_slower(clock, apart, pivot):
    clock.apart = apart  # the time with biases apart, as a share of that with biases in products
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    batches = list(torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)))
    small = fast(net, batches, latency=0.5, pivot=pivot)
    plan = balf_fx.plan(small)
    assert plan.timing.biases_apart == (pivot and apart <= 1)
    assert any(layer.apart for layer in plan.layers) == plan.timing.biases_apart
    again = fast(net, batches, allocation=plan)
    assert balf_fx.plan(again).layers == plan.layers
    assert balf_fx.plan(fast(net, batches, allocation=balf_fx.plan(again))).layers == plan.layers
    torch.testing.assert_close(again(batches[0]), small(batches[0]))


def test_the_report_and_the_plan_have_the_times(net, batches, clock):
    plan = balf_fx.plan(fast(net, batches, latency=0.7))
    assert type(plan).from_json(plan.to_json()) == plan
    words = timing_in_words(plan.timing)
    assert "eager" in words
    report = balf_fx.report(fast(net, batches, latency=0.7))
    assert words in str(report)
    assert 0.5 < report.flops_in_sites < 1
    assert plan.timing.in_sites == pytest.approx(report.flops_in_sites)
    assert f"{report.flops_in_sites:.0%} in sites" in words


def test_another_budget_has_no_times(net, batches):
    assert balf_fx.plan(fast(net, batches, flops=0.7, runner=None)).timing is None


def test_a_plan_made_for_a_time_is_followed_without_a_clock(net, batches, clock, monkeypatch):
    small = fast(net, batches, latency=0.7)
    monkeypatch.setattr(module, "_race", None)
    again = fast(net, batches, allocation=balf_fx.plan(small))
    torch.testing.assert_close(again(batches[0]), small(batches[0]))


def test_convert_needs_a_batch(net, batches):
    graph = balf_fx.prepare(net, batches[0])
    graph(batches[0])
    with pytest.raises(OptionError, match="batches="):
        balf_fx.convert(graph, latency=0.7, runner="eager", progress=False)


def test_limits_of_mistakes_minimise_the_time(net, batches, clock, monkeypatch):
    monkeypatch.setattr(certify, "_SHARES", (0.9, 0.7))
    others = list(torch.randn(4, 50, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    small = fast(net, batches, divergence=0.5, validation=others, minimise="latency")
    found = balf_fx.plan(small)
    assert found.certificate.measure == "latency"
    assert found.timing.measured <= 1.03 * found.certificate.chosen.share


@pytest.mark.parametrize("latency", [0, 1.5, -1, 10**400, True, "fast", "12", "0ms", "-1ms", "ms", [0.5]])
def test_a_wrong_latency_is_an_error(latency):
    with pytest.raises(OptionError, match="latency"):
        Settings(latency=latency).allocate()


@pytest.mark.parametrize(("written", "seconds"), [("12ms", 0.012), (" 1.5 s", 1.5), ("250us", 250e-6), (".5MS", 5e-4)])
def test_times_are_written_with_their_unit(written, seconds):
    assert share_of(written, 1.0) == pytest.approx(seconds)


def test_one_budget_at_a_time():
    with pytest.raises(OptionError, match="flops, latency"):
        Settings(latency=0.5, flops=0.5).allocate()


def test_a_runner_that_fails_here_is_left_out_or_refused(net, batches, monkeypatch, caplog):
    def broken(graph_module, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    small = fast(net, batches, latency=0.99, runner=None, strict=False)
    assert balf_fx.report(small).timing.runner == "eager"
    assert "torch.compile fails here" in caplog.text
    with pytest.raises(OptionError, match=r"(?s)torch.compile fails here.*runner='eager'"):
        fast(net, batches, latency=0.99, runner="inductor")


@pytest.mark.slow
def test_real_clocks_leave_the_model_as_it_was(net, batches):
    before = copy.deepcopy(net.state_dict())
    small = fast(net, batches, latency=0.9, strict=False)
    timing = balf_fx.report(small).timing
    assert min(timing.dense, timing.compressed, timing.measured) > 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert isinstance(small, nn.Module)
