import copy

import pytest
import torch
from architectures import make
from hypothesis import given
from hypothesis import strategies as st

import balf_fx
from balf_fx.calibration.batches import forward_for
from balf_fx.engine.trials import Trial, _samples, allocate_faithfully, plan_trial
from balf_fx.graph.annotation import graph_record
from balf_fx.passes import Allocate, Score, ScoreWidths


def scored(name="transformer", count=4, **options):
    model, batches = make(name, count=count)
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity", **options)
    balf_fx.calibrate(prepared, batches, progress=False)
    with torch.no_grad():
        Score("sensitivity")(prepared)
        ScoreWidths()(prepared)
    return model, prepared, batches


def trial_of(model, prepared, batches, refit):
    with torch.no_grad():
        return plan_trial(prepared, batches, forward_for(model), refit, 1 << 30, None)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_samples_are_those_in_between(sizes, data):
    batches = list(torch.arange(float(sum(sizes))).split(sizes))
    start = data.draw(st.integers(0, sum(sizes)))
    stop = data.draw(st.integers(start, sum(sizes)))
    found = _samples(batches, start, stop)
    assert torch.equal(torch.cat([torch.zeros(0), *found]), torch.arange(float(start), float(stop)))
    assert all(len(batch) for batch in found)


def test_a_refit_is_measured_on_samples_of_its_own():
    model, prepared, batches = scored()
    with_refit, without = (trial_of(model, prepared, batches, refit) for refit in (True, False))
    samples = torch.cat(batches)
    fit, judge = torch.cat(list(with_refit.fit)), torch.cat(list(with_refit.judge))
    assert len(fit) == len(judge) == min(len(samples) // 2, 128)
    assert torch.equal(torch.cat([fit, judge]), samples[: 2 * len(fit)])
    assert not without.fit
    assert torch.equal(torch.cat(list(without.judge)), samples[:128])
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(with_refit.references), model(judge))


def test_one_sample_is_enough():
    model, prepared, batches = scored()
    trial = trial_of(model, prepared, [batches[0][:1]], True)
    assert not trial.fit
    assert len(trial.judge) == 1


def test_a_graph_of_one_batch_size_is_measured_on_whole_batches():
    model, batches = make("mlp", count=3)

    def forward(module, batch):
        if len(batch) != len(batches[0]):
            raise RuntimeError("this batch size is not what I was made for")
        return module(batch)

    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity", forward=forward)
    for refit, sizes in ((True, (1, 2)), (False, (0, 3))):
        with torch.no_grad():
            trial = plan_trial(prepared, batches[:3], forward, refit, 1 << 30, None)
        assert (len(trial.fit), len(trial.judge)) == sizes
    narrow = balf_fx.compile(model, batches, flops=0.6, forward=forward, progress=False)
    assert balf_fx.report(narrow).flops_kept <= 0.6


@pytest.mark.parametrize("refit", [True, False])
def test_the_least_of_what_was_measured_is_taken(refit, monkeypatch):
    model, prepared, batches = scored()
    measured = []
    measure = Trial.measure

    def spy(self, allocated):
        before = [parameter.clone() for parameter in allocated.parameters()]
        lost = measure(self, allocated)
        assert all(torch.equal(a, b) for a, b in zip(before, allocated.parameters(), strict=True))
        measured.append((lost, graph_record(allocated).allocation))
        return lost

    monkeypatch.setattr(Trial, "measure", spy)
    with torch.no_grad():
        chosen = allocate_faithfully(prepared, Allocate(flops=0.5), trial_of(model, prepared, batches, refit))
    assert len(measured) > 1
    least, allocation = min(measured, key=lambda pair: pair[0])
    assert graph_record(chosen).allocation == allocation
    assert 0 < least < float("inf")
    assert graph_record(prepared).allocation is None


def test_caution_spares_widths():
    _, prepared, _ = scored()
    sizes = []
    for caution in (1.0, 1e9):
        graph_module = copy.deepcopy(prepared)
        Allocate(flops=0.6, importance=0.6, caution=caution)(graph_module)
        allocation, widths = graph_record(graph_module).allocation, graph_record(graph_module).widths
        sizes.append([allocation.sizes[width.key] < width.features for width in widths])
    assert any(sizes[0])
    assert sum(sizes[1]) < sum(sizes[0])
