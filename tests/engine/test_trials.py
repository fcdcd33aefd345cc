import copy
import math

import pytest
import torch
from architectures import make
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.budget.problem import Loss, pose, predicted_loss
from balf_fx.calibration.batches import Calibration, forward_for, samples_of
from balf_fx.engine.program import whole_program
from balf_fx.engine.trials import Trial, _Attempt, _best, _samples, best_allocation, plan_trial
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


def trial_of(model, prepared, batches, refit, forward=None):
    forward = forward or forward_for(model)
    with torch.no_grad():
        return plan_trial(whole_program(prepared, forward), Calibration(batches, forward), refit)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_samples_are_those_in_between(sizes, data):
    batches = list(torch.arange(float(sum(sizes))).split(sizes))
    start = data.draw(st.integers(0, sum(sizes)))
    stop = data.draw(st.integers(start, sum(sizes)))
    calibration = Calibration(batches, None)
    found = _samples(calibration, calibration.numbered()[0], start, stop).batches
    assert torch.equal(torch.cat([torch.zeros(0), *found]), torch.arange(float(start), float(stop)))
    assert all(len(batch) for batch in found)


def test_a_refit_is_measured_on_samples_of_its_own():
    model, prepared, batches = scored()
    with_refit, without = (trial_of(model, prepared, batches, refit) for refit in (True, False))
    samples = torch.cat(batches)
    fit, evaluation = torch.cat(list(with_refit.fit.batches)), torch.cat(list(with_refit.evaluation.batches))
    half = len(samples) // 2
    assert (len(fit), len(evaluation)) == (min(half, 64), min(half, 128))
    assert torch.equal(torch.cat([fit, evaluation]), samples[: len(fit) + len(evaluation)])
    assert not without.fit.batches
    assert torch.equal(torch.cat(list(without.evaluation.batches)), samples[:128])
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(with_refit.references), model(evaluation))


class Tagger(nn.Module):
    """Logits of each token; tokens after the first `counted` of a sequence are padding."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, tokens, attention_mask=None):
        hidden = torch.relu(self.up(self.embed(tokens)))
        return self.head(hidden if attention_mask is None else hidden * attention_mask.unsqueeze(-1))


@pytest.mark.parametrize(
    ("length", "counted", "fit", "evaluation", "alone"),
    [
        (4, 4, 48, 48, 96),  # few tokens: half of all samples for each, or all of them
        (1_024, 1_024, 16, 8, 8),  # 16,384 tokens to refit on, and no fewer than 8 samples to measure on
        (1_024, 128, 48, 16, 16),  # 2,048 tokens that count
    ],
)
def test_sequences_of_many_tokens_are_fewer(length, counted, fit, evaluation, alone):
    model = Tagger().eval()
    tokens = torch.zeros(96, length, dtype=torch.int64)
    mask = (torch.arange(length) < counted).long().expand_as(tokens)
    batches = [{"tokens": tokens[at : at + 12], "attention_mask": mask[at : at + 12]} for at in range(0, 96, 12)]
    prepared = balf_fx.prepare(model, batches[0])
    for refit, sizes in ((True, [fit, evaluation]), (False, [0, alone])):
        trial = trial_of(model, prepared, batches, refit)
        assert [sum(map(samples_of, each.batches)) for each in (trial.fit, trial.evaluation)] == sizes
        assert len(trial.references) == len(trial.evaluation.batches)


def test_one_sample_is_enough():
    model, prepared, batches = scored()
    trial = trial_of(model, prepared, [batches[0][:1]], True)
    assert not trial.fit.batches
    assert [len(batch) for batch in trial.evaluation.batches] == [1]


def test_a_graph_of_one_batch_size_is_measured_on_whole_batches():
    model, batches = make("mlp", count=3)

    def forward(module, batch):
        if len(batch) != len(batches[0]):
            raise RuntimeError("this batch size is not what I was made for")
        return module(batch)

    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity", forward=forward)
    for refit, sizes in ((True, (1, 2)), (False, (0, 3))):
        trial = trial_of(model, prepared, batches, refit, forward)
        assert (len(trial.fit.batches), len(trial.evaluation.batches)) == sizes
    many = batches * 10
    trial = trial_of(model, prepared, many, True, forward)
    few = [math.ceil(most / len(batches[0])) for most in (64, 128)]
    assert max(few) < len(many) // 2
    assert [len(trial.fit.batches), len(trial.evaluation.batches)] == few
    narrow = balf_fx.compile(model, batches, flops=0.6, forward=forward, progress=False)
    assert balf_fx.report(narrow).flops_kept <= 0.6


@pytest.mark.parametrize("refit", [True, False])
def test_what_should_lose_least_on_other_samples_is_taken(refit, monkeypatch):
    model, prepared, batches = scored()
    program = whole_program(prepared, forward_for(model))
    problem, allocate, measured = pose(program.counted, program.totals()), Allocate(flops=0.5), []
    measure = Trial.measure

    def spy(self, given, posed, allocation):
        before = [parameter.clone() for parameter in prepared.parameters()]
        lost = measure(self, given, posed, allocation)
        assert given is program
        assert all(torch.equal(a, b) for a, b in zip(before, prepared.parameters(), strict=True))
        measured.append((lost, allocation))
        return lost

    monkeypatch.setattr(Trial, "measure", spy)
    with torch.no_grad():
        option, chosen = best_allocation(program, problem, allocate, trial_of(model, prepared, batches, refit))
    assert len(measured) > 1
    expected = {id(allocation): predicted_loss(problem, allocation) for _, allocation in measured}
    unit = sum(lost for lost, _ in measured) / sum(expected[id(allocation)].fitted for _, allocation in measured)
    least, allocation = min(measured, key=lambda pair: pair[0] + unit * expected[id(pair[1])].optimism)
    assert chosen is allocation
    assert option.solve(problem) == chosen
    assert 0 < least < float("inf")
    assert graph_record(prepared).allocation is None


def test_the_original_loses_nothing():
    model, prepared, batches = scored()
    program = whole_program(prepared, forward_for(model))
    problem, trial = pose(program.counted, program.totals()), trial_of(model, prepared, batches, False)
    with torch.no_grad():
        assert trial.measure(program, problem, Allocate(ranks={}).solve(problem)) == pytest.approx(0, abs=1e-6)
        lost = trial.measure(program, problem, Allocate(flops=0.5, importance=0.6).solve(problem))
    narrow = balf_fx.convert(prepared, flops=0.5, factors="sensitivity", pivot=False, progress=False)
    with torch.no_grad():
        given, wanted = (net(torch.cat(trial.evaluation.batches)).log_softmax(-1) for net in (narrow, model))
    expected = F.kl_div(given, wanted, reduction="batchmean", log_target=True)  # batches of several sizes
    assert lost == pytest.approx(float(expected), rel=1e-3)


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


@pytest.mark.parametrize(("best", "beside"), [(0.3, 0.15), (0.6, 0.8), (1.0, 0.8)])
def test_one_more_power_is_tried_beside_the_best(best, beside, monkeypatch):
    model, prepared, batches = scored()
    program = whole_program(prepared, forward_for(model))
    problem, tried = pose(program.counted, program.totals()), []
    solve = Allocate.solve

    def spy(self, posed):
        tried.append((self.importance, self.caution))
        return solve(self, posed)

    monkeypatch.setattr(Allocate, "solve", spy)
    monkeypatch.setattr(Trial, "measure", lambda *_: float(abs(tried[-1][0] - best) + tried[-1][1]))
    trial = trial_of(model, prepared, batches, False)
    monkeypatch.setattr("balf_fx.engine.trials._chosen", lambda _: len(tried))  # no two are the same
    option, _ = best_allocation(program, problem, Allocate(flops=0.5, importance=0.6), trial)
    assert tried == [(0.6, 1.0), (0.6, 2.0), (0.3, 1.0), (1.0, 1.0), (beside, 1.0)]
    assert option.importance == best


def attempts(*rows):
    """Attempts with a distance, the loss that was fitted, and the optimism."""
    return [_Attempt(distance, Loss(fitted, optimism), None, None) for distance, fitted, optimism in rows]


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([(3.0, 1.0, 0.0), (2.0, 1.0, 0.0)], 1),
        ([(3.0, 1.0, 0.0), (2.0, 1.0, 0.3)], 1),  # 2.75: each unit of loss was measured as 2.5
        ([(3.0, 1.0, 0.0), (2.0, 1.0, 0.5)], 0),
        ([(math.inf, 1.0, 0.0), (math.nan, 1.0, 0.0), (2.0, 1.0, 1.0), (2.5, 1.0, 0.0)], 3),
        ([(-2e-8, 1e-4, 0.3), (-1e-8, 1e-4, 0.1)], 1),
        ([(0.0, 0.0, 0.0), (-1e-9, 0.0, 0.2)], 0),
        ([(math.nan, 1.0, 0.0)], 0),
    ],
)
def test_the_best_attempt(rows, best):
    tried = attempts(*rows)
    assert _best(tried, seen=True) is tried[best]


def test_what_was_measured_on_other_samples_is_not_corrected():
    tried = attempts((3.0, 1.0, 0.0), (2.0, 1.0, 5.0), (math.nan, 1.0, 0.0))
    assert _best(tried, seen=True) is tried[0]
    assert _best(tried, seen=False) is tried[1]


class Pooled(nn.Module):
    """A classifier that sees one vector of many features for each sample, behind layers that see many tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.head, self.classifier = nn.Linear(16, 192), nn.Linear(192, 12)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x)))
        return 4 * self.classifier(torch.relu(self.head(x.mean(1))))


@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_few_samples_are_not_taken_for_all(effort):
    """Fewer samples than features: any few features predict all others, but only on these samples."""
    generator, model = torch.Generator().manual_seed(1), Pooled().eval()
    mixed = torch.randn(16, 16, generator=generator) * torch.linspace(2, 0.05, 16)
    drawn = (torch.randn(n, 6, 16, generator=generator) + torch.randn(n, 1, 16, generator=generator) for n in (32, 512))
    seen, unseen = (each @ mixed for each in drawn)
    small = balf_fx.compile(model, [seen[:16], seen[16:]], flops=0.7, effort=effort, progress=False)
    with torch.no_grad():
        given, wanted = (net(unseen).log_softmax(-1) for net in (small, model))
    assert balf_fx.report(small).flops_kept <= 0.7
    assert F.kl_div(given, wanted, reduction="batchmean", log_target=True) < 0.03
