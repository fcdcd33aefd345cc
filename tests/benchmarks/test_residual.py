"""The correction of what rounding loses is the best of its rank, and bytes are counted as they would be stored."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from balf_fx.calibration.moments import Moments


@pytest.fixture
def residual(load_benchmark):
    return load_benchmark("residual")


@pytest.fixture
def weight():
    return torch.randn(12, 20).double()


@pytest.fixture
def sample():
    return torch.randn(300, 20).double() @ torch.randn(20, 20).double() + 1


def moments_of(x):
    mean = x.mean(0)
    return Moments(len(x), mean.unsqueeze(0), ((x - mean).mT @ (x - mean)).unsqueeze(0))


@pytest.mark.parametrize(("bits", "group"), [(4, 0), (3, 8), (8, 7)])
def test_weights_are_rounded_to_the_nearest_level(residual, weight, bits, group):
    rounded, levels = residual.rounded(weight, bits, group), 2 ** (bits - 1) - 1
    for row, given in zip(rounded, weight, strict=True):
        for run, before in zip(row.split(group or 20), given.split(group or 20), strict=True):
            scale = float((before.abs().max() / levels).half())
            steps = run / scale
            torch.testing.assert_close(steps, steps.round())
            assert steps.abs().max() == pytest.approx(levels)
            assert (run - before).abs().max() <= scale * (0.5 + levels * 2**-10)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_the_correction_is_the_optimum_by_brute_force(residual, weight, sample, rank):
    error = weight - residual.rounded(weight, 3, 0)
    left, right = residual.correction(error, moments_of(sample), rank)
    assert left.shape == (12, rank)
    centred = sample - sample.mean(0)
    whitened = error @ centred.mT  # the best approximation of the errors themselves, in any basis
    best = torch.linalg.svdvals(whitened)[rank:].square().sum()
    found = ((error - left @ right) @ centred.mT).square().sum()
    torch.testing.assert_close(found, best, rtol=1e-9, atol=1e-9)


def test_a_correction_never_adds_to_the_error(residual, weight, sample):
    moments = moments_of(sample)
    errors = []
    for rank in (0, 1, 2, 4, 8, 12):
        stored, bias = residual.corrected(weight, moments, residual.Format(4, 0, rank))
        errors.append(float(((weight - stored) @ sample.mT - bias.unsqueeze(1)).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


@pytest.mark.parametrize(
    ("form", "size"),
    [
        ((4, 0, 0), 10 * (48 / 2 + 2)),
        ((8, 32, 0), 10 * (48 + 2 * 2)),
        ((4, 16, 3), 10 * (48 / 2 + 3 * 2) + 3 * (10 + 48) + 2 * (3 + 10)),
    ],
)
def test_bytes_are_those_of_weights_scales_and_factors(residual, form, size):
    assert residual.Format(*form).size(10, 48) == size


def test_shared_weights_stay_as_they_are(residual):
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 6, bias=False))
    model[2].weight = model[0].weight
    quantized, size = residual.Quantizer(model, [torch.arange(6).repeat(3, 1)]).quantized(residual.Format(8, 0, 0))
    assert torch.equal(quantized[2].weight, model[2].weight)
    assert not torch.equal(quantized[1].weight, model[1].weight)
    assert size == 4 * 24 + 4 * (4 + 2) + 4 * 4


def test_the_best_rows_are_those_that_nothing_smaller_beats(residual):
    rows = [residual.Row("", 4, 0, 0, size, kl, 0, 0) for size, kl in ((1, 5), (2, 6), (2, 3), (3, 3), (4, 1))]
    assert [(row.bytes, row.kl) for row in residual.best(rows)] == [(1, 5), (2, 3), (4, 1)]


@pytest.mark.slow
def test_the_benchmark_runs(residual, data_folder, tmp_path):
    output = tmp_path / "results.json"
    options = ["--model", "stories", "--params", "0.8", "--effort", "fast", "--images", "8", "--evaluate", "4"]
    forms = ["--bits", "4", "--bits", "8", "--group", "0", "--rank", "0", "--rank", "4"]
    arguments = [*options, *forms, "--data", str(data_folder), "--json", str(output)]
    result = CliRunner().invoke(residual.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = {(r["model"], r["bits"], r["rank"]): r for r in json.loads(output.read_text())["results"]}
    assert len(rows) == 8
    assert rows["dense", 4, 4]["kl"] < rows["dense", 4, 0]["kl"]
    assert rows["dense", 8, 0]["kl"] < rows["dense", 4, 0]["kl"]
    assert rows["params 0.8", 4, 0]["bytes"] < rows["dense", 4, 0]["bytes"] < rows["dense", 4, 4]["bytes"]
