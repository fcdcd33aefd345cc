"""The curve over budgets: each point is what a compression of its own gives, compared with the dense model."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import balf_fx
import balf_fx.cli.sweep
from balf_fx.cli.sweep import SweepData, run_sweep
from balf_fx.errors import BudgetError, CalibrationError, FileError, OptionError
from balf_fx.reporting.curve import Sweep


@pytest.fixture
def classifier():
    layers = nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 5)
    return nn.Sequential(*layers).eval()


@pytest.fixture
def batches():
    """To calibrate on, and others to compare on, the last of which is short."""
    seen, unseen = (torch.randn(count, 24) @ torch.randn(24, 24) / 5 for count in (128, 90))
    return seen.split(32), unseen.split(32)


def sweep(model, batches, budgets, **options):
    data = SweepData(*batches, options.pop("labels", None))
    return run_sweep(model, data, budgets, options.pop("measure", "flops"), progress=False, **options)


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_points_are_what_compile_gives(classifier, batches, effort):
    found = sweep(classifier, batches, [0.7, 0.5], effort=effort)
    evaluation = torch.cat(batches[1])
    with torch.no_grad():
        wanted = classifier(evaluation)
        for point in found.points:
            small = balf_fx.compile(classifier, batches[0], flops=point.budget, effort=effort, progress=False)
            given = small(evaluation)
            assert point.flops_kept == balf_fx.report(small).flops_kept <= point.budget
            assert point.params_kept == balf_fx.report(small).params_kept
            assert point.agreement == float((given.argmax(1) == wanted.argmax(1)).double().mean())
            divergence = F.kl_div(given.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
            assert point.divergence == pytest.approx(float(divergence), rel=1e-4)
    assert [point.budget for point in found.points] == [0.7, 0.5]
    assert found.samples == 90
    assert found.effort == effort


def test_labels_give_accuracies(classifier, batches):
    with torch.no_grad():
        right = classifier(torch.cat(batches[1])).argmax(1)
    wrong = (right + 1) % 5
    found = sweep(classifier, batches, [0.6], effort="fast", labels=right)
    assert found.accuracy == 1.0
    assert found.points[0].accuracy == found.points[0].agreement
    mixed = torch.where(torch.arange(90) < 45, right, wrong)
    assert sweep(classifier, batches, [0.6], effort="fast", labels=mixed).accuracy == 0.5
    bare = sweep(classifier, batches, [0.6], effort="fast")
    assert bare.accuracy is bare.points[0].accuracy is None
    with pytest.raises(OptionError, match="labels have shape"):
        sweep(classifier, batches, [0.6], effort="fast", labels=right[:50])


def test_models_without_classes_have_a_divergence_alone(batches):
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24), nn.Unflatten(1, (2, 3, 4))).eval()
    found = sweep(model, batches, [0.5], effort="fast")
    assert found.points[0].agreement is None
    assert 0 < found.points[0].divergence < 1
    with pytest.raises(OptionError, match="top-1 predictions none"):
        sweep(model, batches, [0.5], effort="fast", labels=torch.zeros(90, dtype=torch.int64))


def test_a_time_allows_what_it_allows_in_compile(monkeypatch):
    """Strips of a kernel, which preparation has to observe already."""
    given = []

    def spy(function):
        def spied(*args, **options):
            given.append(options.get("separable"))
            return function(*args, **options)

        return spied

    for function in (balf_fx.prepare, balf_fx.convert):
        monkeypatch.setattr(balf_fx.cli.sweep, function.__name__, spy(function))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()).eval()
    images = tuple(torch.randn(2, 4, 3, 8, 8))
    options = {"effort": "fast", "strict": False, "runner": "eager"}
    sweep(model, (images, images), [0.9], measure="latency", **options)
    sweep(model, (images, images), [0.9], measure="latency", separable=False, **options)
    sweep(model, (images, images), [0.9], effort="fast")
    assert given == [True, True, False, False, None, None]


def test_weights_may_be_in_files(classifier, batches, tmp_path):
    save_file(classifier.state_dict(), tmp_path / "net.safetensors")
    empty = copy.deepcopy(classifier).to("meta")
    found = sweep(empty, batches, [0.6], effort="fast", safetensors=tmp_path / "net.safetensors")
    assert found == sweep(classifier, batches, [0.6], effort="fast")


def test_parameters_can_be_the_measure(classifier, batches):
    found = sweep(classifier, batches, [0.5], effort="fast", measure="params")
    assert found.measure == "params"
    assert found.points[0].params_kept <= 0.5


def test_budgets_out_of_reach_are_set_apart(classifier, batches):
    found = sweep(classifier, batches, [0.6, 0.01], effort="fast")
    assert [point.budget for point in found.points] == [0.6]
    assert found.out_of_reach == (0.01,)
    assert 0.01 < found.minimum < 0.6
    assert f"out of reach: 0.01; the smallest is {found.minimum:.4f}" in str(found)
    with pytest.raises(BudgetError):
        sweep(classifier, batches, [0.01], effort="fast")


@pytest.mark.parametrize("missing", [0, 1])
def test_both_kinds_of_batches_are_needed(classifier, batches, missing):
    with pytest.raises(CalibrationError, match="others for evaluation"):
        sweep(classifier, [() if index == missing else each for index, each in enumerate(batches)], [0.6])


def test_the_model_and_the_random_state_stay_as_they_are(classifier, batches):
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    state = torch.get_rng_state()
    sweep(classifier, batches, [0.6])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_tables_and_plain_data_say_the_same(classifier, batches):
    labels = torch.zeros(90, dtype=torch.int64)
    found = sweep(classifier, batches, [0.6, 0.4], effort="fast", labels=labels)
    assert json.loads(found.to_json()) == json.loads(json.dumps(dataclasses.asdict(found)))
    table = str(found)
    for point in found.points:
        assert f"{100 * point.agreement:.2f} %" in table
        assert f"{100 * point.accuracy:.2f} %" in table
        assert f"{point.divergence:.4g}" in table
    assert "dense" in table
    assert "dense" not in str(dataclasses.replace(found, accuracy=None))
    assert Sweep.from_json(found.to_json()) == found


@pytest.mark.parametrize("text", ["", "{}", "[1]", b"\xff", '{"points": [{"budget": 0.5}], "out_of_reach": []}'])
def test_what_is_no_sweep_is_refused(text):
    with pytest.raises(FileError, match="not a sweep"):
        Sweep.from_json(text)


def test_each_budget_has_a_checkpoint_of_its_own(classifier, batches, tmp_path):
    options = {"effort": "fast", "checkpoint": tmp_path / "sweep"}
    found = sweep(classifier, batches, [0.7, 0.5], **options)
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["flops 0.5", "flops 0.7"]
    assert all((path / "model.safetensors").exists() for path in (tmp_path / "sweep").iterdir())
    assert sweep(classifier, batches, [0.7, 0.5], **options) == found
    assert found == sweep(classifier, batches, [0.7, 0.5], effort="fast")
