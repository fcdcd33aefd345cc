"""Limits of mistakes: what is certified holds as often as it says, on data where the truth is known."""

import importlib.util

import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.budget.bounds import clopper_pearson, empirical_bernstein
from balf_fx.calibration.batches import Calibration, forward_for
from balf_fx.checkpoint.journal import NO_JOURNAL
from balf_fx.engine import certify
from balf_fx.engine.program import whole_program
from balf_fx.engine.settings import Settings
from balf_fx.errors import CalibrationError, MissingExtraError, OptionError
from balf_fx.progress import SILENT


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(count, seed=0):
    """Sixteen features, of which the last ones hardly vary."""
    return randn(count, 16, seed=seed) * 0.6 ** torch.arange(16)


class Classifier(nn.Module):
    """Ten classes of which the network is sure for most inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10))

    def forward(self, x):
        return 4 * self.net(x)


@pytest.fixture(scope="module")
def model():
    return Classifier().eval()


@pytest.fixture(scope="module")
def batches():
    return [inputs(64, i) for i in range(4)]


def certified(model, batches, **options):
    options = {"effort": "fast", "progress": False, **options}
    return balf_fx.compile(model, batches, **options)


def disagreement(model, other, x):
    with torch.no_grad():
        return float((model(x).argmax(-1) != other(x).argmax(-1)).double().mean())


class Remembered:
    """`convert`, run once for each budget."""

    def __init__(self):
        self.convert, self.found = certify.convert, {}

    def __call__(self, program, settings, calibration, progress=SILENT, journal=NO_JOURNAL):
        if settings.flops not in self.found:
            self.found[settings.flops] = self.convert(program, settings, calibration, progress, journal)
        return self.found[settings.flops]


def test_the_limit_is_missed_as_rarely_as_the_confidence_says(model, batches, monkeypatch):
    """200 draws of validation data from 20,000 inputs, on which the mistakes of every budget are known."""
    convert, population = Remembered(), inputs(20_000, 99)
    monkeypatch.setattr(certify, "convert", convert)
    prepared = balf_fx.prepare(model, batches[0])
    balf_fx.calibrate(prepared, batches, progress=False)
    forward = forward_for(model)
    calibration, program = Calibration(batches, forward), whole_program(prepared, forward)

    def certificate(limit, validation):
        settings = Settings(disagreement=limit, validation=[validation], effort="fast")
        with torch.no_grad():
            compressed, plan = certify.certify(program, settings, calibration)
        chosen = plan.certificate.chosen
        assert compressed is convert.found[1.0 if chosen is None else chosen.share][0]
        return plan.certificate

    certificate(0.5, population)
    truth = {
        share: disagreement(model, compressed.module, population) for share, (compressed, _) in convert.found.items()
    }
    limit = 0.95 * min(value for value in truth.values() if value > 0.04)  # which this budget just misses
    draws = [torch.randint(len(population), (400,), generator=torch.Generator().manual_seed(i)) for i in range(200)]
    found = [certificate(limit, population[draw]) for draw in draws]
    own = [0.0 if each.chosen is None else truth[each.chosen.share] for each in found]
    assert sum(value > limit for value in own) <= 0.05 * len(found)
    assert sum(value > 0.2 * limit for value in own) > 0.5 * len(found)  # so it is not merely timid
    # Without the bound, all budgets whose observed mistakes keep the limit would do.
    careless = [min((each.share for each in one.tried if each.observed <= limit), default=1.0) for one in found]
    assert sum(truth.get(share, 0.0) > limit for share in careless) > 0.1 * len(found)


def test_the_answer_carries_what_was_tried(model, batches, tmp_path):
    validation, before = inputs(500, 7), [parameter.clone() for parameter in model.parameters()]
    small = certified(model, batches, disagreement=0.05, validation=validation)
    found = balf_fx.plan(small).certificate
    assert (found.mistakes, found.limit, found.confidence) == ("disagreement", 0.05, 0.95)
    assert (found.measure, found.samples) == ("flops", 500)
    assert [each.share for each in found.tried] == [share / 100 for share in range(95, 0, -5)][: len(found.tried)]
    assert found.tried[-1].bound > 0.05 >= found.chosen.bound == found.tried[-2].bound
    assert found.chosen.observed == pytest.approx(disagreement(model, small, validation))
    assert found.chosen.bound == clopper_pearson(round(500 * found.chosen.observed), 500, 0.95)
    assert balf_fx.report(small).flops_kept <= found.chosen.share
    assert f"disagreement 0.05: {found.chosen.observed:.2%} on 500 samples, at most" in str(balf_fx.report(small))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    balf_fx.save(small, tmp_path / "small.safetensors")
    assert balf_fx.plan(tmp_path / "small.safetensors").certificate == found
    plain = balf_fx.compile(model, batches, flops=found.chosen.share, effort="fast", progress=False)
    assert torch.equal(plain(validation), small(validation))
    assert balf_fx.plan(plain).certificate is None


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_parameters_can_be_minimised_at_any_effort(model, batches, effort):
    options = {"disagreement": 0.05, "validation": [inputs(100, 7)], "minimise": "params", "confidence": 0.8}
    small = certified(model, batches, effort=effort, **options)
    found = balf_fx.plan(small).certificate
    assert (found.measure, found.confidence) == ("params", 0.8)
    assert balf_fx.report(small).params_kept <= found.chosen.share < 0.9


@pytest.mark.parametrize("preset", [balf_fx.BALF, balf_fx.AIR, {"factors": "svd"}], ids=["BALF", "AIR", "SVD"])
def test_published_methods_can_be_certified(model, batches, preset):
    validation = inputs(400, 7)
    small = certified(model, batches, disagreement=0.2, validation=[validation], **preset)
    found = balf_fx.plan(small).certificate
    assert found.chosen.bound <= 0.2
    alone = certified(model, batches, flops=found.chosen.share, **preset)
    assert torch.equal(small(validation), alone(validation))
    assert found.chosen.observed == pytest.approx(disagreement(model, alone, validation))


def test_a_limit_that_no_budget_keeps_changes_nothing(batches):
    torch.manual_seed(0)
    random = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 8)).eval()
    with torch.no_grad():
        for layer in random:
            layer.weight.copy_(torch.linalg.qr(torch.randn(16, 16))[0][: layer.out_features, : layer.in_features])
    validation = inputs(4000, 7)
    small = certified(random, batches, disagreement=0.001, validation=validation, pivot=False)
    found = balf_fx.plan(small).certificate
    assert found.chosen is None
    assert len(found.tried) == 1
    torch.testing.assert_close(small(validation), random(validation))
    assert "no budget keeps it" in str(balf_fx.report(small))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(20, 24), nn.Linear(24, 48), nn.Linear(48, 20)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids) * attention_mask.unsqueeze(-1)
        return 3 * self.down(torch.tanh(self.up(x)))


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (count, 6), generator=generator)
    lengths = torch.randint(1, 7, (count, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(6) < lengths).long()}


def test_tokens_count_by_sequence_and_without_padding():
    model, validation = Tokens().eval(), tokens(600, 9)
    small = certified(model, [tokens(64, seed) for seed in range(3)], disagreement=0.1, validation=[validation])
    found = balf_fx.plan(small).certificate
    with torch.no_grad():
        wrong = (model(**validation).argmax(-1) != small(**validation).argmax(-1)).double()
    mask = validation["attention_mask"].double()
    shares = ((wrong * mask).sum(1) / mask.sum(1)).tolist()
    assert found.chosen.observed == pytest.approx(sum(shares) / len(shares))
    assert found.chosen.bound == pytest.approx(empirical_bernstein(shares, 0.95))


def test_pixels_choose_among_channels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 5, 1)).eval()
    with torch.no_grad():
        model[0].weight[6:], model[0].bias[6:] = model[0].weight[:6].repeat(3, 1, 1, 1), model[0].bias[:6].repeat(3)
    validation = randn(300, 3, 6, 6, seed=8)
    small = certified(model, [randn(16, 3, 6, 6)], disagreement=0.1, validation=validation)
    with torch.no_grad():
        wrong = (model(validation).argmax(1) != small(validation).argmax(1)).double().mean()
    assert balf_fx.plan(small).certificate.chosen.observed == pytest.approx(float(wrong))


def test_divergence_is_the_relative_error_of_each_sample(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 6)).eval()
    validation = inputs(900, 8)
    small = certified(model, batches, divergence=0.2, validation=validation)
    found = balf_fx.plan(small).certificate
    with torch.no_grad():
        wanted, given = model(validation).double(), small(validation).double()
    errors = ((given - wanted).norm(dim=1) / wanted.norm(dim=1)).clamp_max(1).tolist()
    assert found.mistakes == "divergence"
    assert found.chosen.observed == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert found.chosen.bound == pytest.approx(empirical_bernstein(errors, 0.95), rel=1e-5)


def test_too_few_samples_say_how_many_would_do(model, batches):
    with pytest.raises(OptionError, match=r"100 samples, too few for disagreement=0.02 .* pass at least 149"):
        certified(model, batches, disagreement=0.02, validation=inputs(100))


def test_outputs_without_classes_are_told_apart(batches):
    model = nn.Sequential(nn.Linear(16, 16), nn.Unflatten(1, (4, 4))).eval()
    with pytest.raises(OptionError, match=r"choice among classes.* not \[500, 4, 4\]. Use divergence="):
        certified(model, batches, disagreement=0.05, validation=inputs(500))

    class Total(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(x).sum()

    with pytest.raises(CalibrationError, match="divergence= requires outputs whose first dimension"):
        certified(Total().eval(), batches, divergence=0.05, validation=inputs(500))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disagreement": 0.05}, "pass some as validation="),
        ({"validation": [], "flops": 0.5}, "validation= is for disagreement= or divergence="),
        ({"disagreement": 0.05, "divergence": 0.05, "validation": []}, "give one limit"),
        ({"disagreement": 0.05, "validation": [], "flops": 0.5}, "takes the place of a budget: drop flops"),
        ({"divergence": 0.05, "validation": [], "allocation": {"a": 3}}, "drop allocation"),
        ({"disagreement": 1.5, "validation": []}, "disagreement must be a number between 0 and 1"),
        ({"disagreement": 0.05, "validation": [], "confidence": 1}, "confidence must be a number between 0 and 1"),
        ({"disagreement": 0.05, "validation": [], "confidence": None}, "such as 0.95, not None"),
        ({"disagreement": 1e-320, "validation": []}, "disagreement=1e-320 would need too many samples to test"),
        ({"disagreement": 0.05, "validation": [], "minimise": "time"}, "minimise must be one of 'flops', 'params'"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_told_before_any_work(options, message):
    with pytest.raises(OptionError, match=message):
        balf_fx.compile(nn.Identity(), [], **options)


class Rating(nn.Module):
    """One number for each sample, which transformers calls logits, too."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x):
        return {"logits": self.net(x)}


def test_one_number_is_no_choice_among_classes(batches):
    with pytest.raises(OptionError, match=r"choice among classes.* not \[500, 1\]. Use divergence="):
        certified(Rating().eval(), batches, disagreement=0.05, validation=inputs(500))


def test_pixels_without_weight_do_not_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 5, 1)).eval()
    validation = randn(300, 3, 6, 6, seed=8)
    small = certified(
        *(model, [randn(16, 3, 6, 6)]),
        disagreement=0.6,
        validation=validation,
        weights=lambda batch: (torch.arange(len(batch)) % 2).double(),
    )
    found = balf_fx.plan(small).certificate
    with torch.no_grad():
        wrong = (model(validation).argmax(1) != small(validation).argmax(1)).double()[1::2].mean()
    assert found.samples == 150
    assert found.chosen.observed == pytest.approx(float(wrong))


@pytest.mark.parametrize("options", [{}, {"allocation": "uniform"}, balf_fx.AIR], ids=["budget", "uniform", "AIR"])
def test_without_a_budget_that_keeps_the_limit_what_is_free_is_removed(batches, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.linalg.qr(torch.randn(16, 16))[0][: layer.out_features])
        model[1].weight[14:] = 0
    validation = inputs(4000, 7)
    free = balf_fx.compile(model, batches, progress=False)
    given = {"disagreement": 0.001, "confidence": 0.5, "validation": validation, **options}
    small = certified(model, batches, **given)
    found = balf_fx.plan(small)
    assert found.certificate.chosen is None
    assert found.ranks == balf_fx.plan(free).ranks or options
    torch.testing.assert_close(small(validation), model(validation))


def test_what_is_missing_is_told_before_any_work(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="certify"):
        balf_fx.compile(nn.Identity(), [], disagreement=0.05, validation=[])
