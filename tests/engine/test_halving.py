import copy
from functools import partial

import pytest
import torch
from architectures import make
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import balf_fx
from balf_fx.calibration.batches import Calibration, forward_for
from balf_fx.calibration.observers import SensitivityObserver
from balf_fx.engine import compress
from balf_fx.engine.halving import fits_samples, half_of, use_first_half
from balf_fx.engine.program import whole_program
from balf_fx.engine.settings import Settings
from balf_fx.graph.annotation import annotation, graph_record, sites
from balf_fx.graph.curves import RankCurve, fits
from balf_fx.passes import Score

FEW = 24


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x):
        return 3 * self.head(x + self.down(torch.relu(self.up(x))))


def scored(model, batches, **options):
    """A scored program, and a copy in which the first half of the samples chooses."""
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False)
    calibration = Calibration(batches, forward_for(model))
    program = whole_program(prepared, calibration.forward)
    with torch.no_grad():
        compress.score(program, Settings(flops=0.5, **options), calibration)
    first = program.copy()
    use_first_half(first.graph_modules)
    return program, first


def directions(program, name):
    (own,) = (annotation(n[0]).curve.spectrum for s, n in sites(program.graph_modules[0]).items() if s.name == name)
    left, right = own.maps(6)
    return left @ right


def covariance(program):
    """That by which a width's features predict each other, in the unit of its mean."""
    (curve,) = graph_record(program.graph_modules[0]).width_curves
    return curve.covariances[0] / curve.covariances[0].diagonal().mean()


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_halves_share_all_samples(sizes):
    batches = list(torch.arange(float(sum(sizes))).split(sizes))
    weights = [batch + 0.5 for batch in batches]
    parts = [half_of(Calibration(batches, None, weights=weights), half) for half in (0, 1)]
    found = torch.cat([batch for part in parts for batch in part.batches])
    assert torch.equal(found.sort().values, torch.arange(float(sum(sizes))))
    for part in parts:
        assert [weight.tolist() for weight in part.weights] == [(batch + 0.5).tolist() for batch in part.batches]


@pytest.mark.parametrize("sizes", [(6, 4, 8), (1, 1, 1, 1), (5,)])
def test_halves_are_those_of_the_observers(sizes):
    model = Net().eval()
    batches = list(torch.randn(sum(sizes), 16).split(sizes))
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False)
    observer = next(
        each for each in prepared.modules() if isinstance(each, SensitivityObserver) and each.site.name == "down"
    )
    counts = [sum(map(len, half_of(Calibration(batches, None), half).batches)) for half in (0, 1)]
    assert [half.gradients.samples for half in observer.halves] == counts
    if len(sizes) == 1:  # all have one weight
        for half, seen in enumerate(observer.halves):
            (own,) = half_of(Calibration(batches, None), half).batches
            hidden = model.up(own).relu().double().mean(0)
            torch.testing.assert_close(seen.features.mean[0], hidden, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_what_the_second_half_holds_does_not_choose():
    """With one batch, positions have one weight, which changes no directions."""
    generator, model = torch.Generator().manual_seed(1), Net().eval()
    batch, changed = torch.randn(FEW, 16, generator=generator), torch.randn(FEW, 16, generator=generator)
    changed[::2] = batch[::2]
    (whole, first), (other, again) = scored(model, [batch]), scored(model, [changed])
    for found in (partial(directions, name="up"), covariance):  # only the unit of the damping is that of both halves
        assert (found(first) - found(again)).norm() < 0.05 * (found(whole) - found(other)).norm()


@pytest.mark.parametrize("name", ["up", "down"])  # with statistics of inputs, and of outputs
def test_the_first_half_chooses_as_if_it_were_alone(name, monkeypatch):
    monkeypatch.setattr(RankCurve, "fits_samples", True)
    model, batches = Net().eval(), list(torch.randn(4, 100, 16))
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False)
    observers = {each.site.name: each for each in prepared.modules() if isinstance(each, SensitivityObserver)}
    curves = []
    for _ in range(2):
        with torch.no_grad():
            Score("sensitivity", damping=0.0, only={name})(prepared)
        curves += [annotation(n[0]).curve for site, n in sites(prepared).items() if site.name == name]
        observers[name].halves = [observers[name].halves[0], None]
    whole, alone = curves
    (left, right), (own, other) = whole.half.spectrum.maps(6), alone.spectrum.maps(6)
    torch.testing.assert_close(left @ right, own @ other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.half.spectrum.mean, alone.spectrum.mean)
    left, right = whole.spectrum.maps(6)
    assert (left @ right - own @ other).norm() > 0.01


def test_the_scores_of_all_samples_stay():
    model, batch = Net().eval(), torch.randn(FEW, 16)
    program, first = scored(model, [batch])
    assert fits_samples(program.graph_modules)
    before = directions(program, "up"), covariance(program)
    assert (before[0] - directions(first, "up")).norm() > 0.1
    use_first_half(program.copy().graph_modules)
    assert torch.equal(directions(program, "up"), before[0])
    assert torch.equal(covariance(program), before[1])


def test_costs_do_not_change():
    program, first = scored(Net().eval(), [torch.randn(FEW, 16)])
    for own, other in zip(*(sites(each.graph_modules[0]).values() for each in (program, first)), strict=True):
        assert annotation(own[0]).curve.candidates == annotation(other[0]).curve.candidates


@pytest.mark.parametrize(
    ("samples", "options"), [(4096, {}), (1, {}), (FEW, {"effort": "fast"}), (FEW, {"factors": "activations"})]
)
def test_many_samples_or_one_or_no_gradients_have_no_halves(samples, options):
    program, _ = scored(Net().eval(), [torch.randn(samples, 16)], **options)
    assert not fits_samples(program.graph_modules)


def test_what_loses_a_quarter_more_fits_its_samples():
    assert fits(1.3, 0.3)
    assert not fits(1.2, 0.2)
    assert not fits(0.0, 0.0)


@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_conversions_do_not_affect_each_other(effort):
    model, batches = make("mlp")
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False)
    options = {"flops": 0.6, "effort": effort, "batches": batches, "progress": False}
    first, second = (balf_fx.convert(prepared, **options) for _ in range(2))
    once = balf_fx.compile(copy.deepcopy(model), batches, flops=0.6, effort=effort, progress=False)
    with torch.no_grad():
        assert torch.equal(first(batches[0]), second(batches[0]))
        assert torch.equal(first(batches[0]), once(batches[0]))
