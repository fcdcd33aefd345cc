"""BALF on ResNet-20 matches its reference implementation at every budget."""

import importlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Import a benchmark as Python does when it is run as a script."""
    for module in ("click", "numpy", "torchvision"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.mark.slow
def test_balf_matches_the_reference(benchmark, data_folder, tmp_path):
    accuracy, output = benchmark("accuracy"), tmp_path / "results.json"
    arguments = ["--method", "balf", "--data", str(data_folder), "--json", str(output)]
    result = CliRunner().invoke(accuracy.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    results = json.loads(output.read_text())
    assert results["test_images"] == 9979
    assert results["dense_top1"] == pytest.approx(91.73, abs=0.05)
    assert [row["flops"] for row in results["results"]] == list(accuracy.REFERENCE)
    for row in results["results"]:
        assert row["top1"] == pytest.approx(accuracy.REFERENCE[row["flops"]], abs=1.0)
        assert row["flops_kept"] <= row["flops"]


def test_missing_data_is_a_clean_error(benchmark, tmp_path):
    result = CliRunner().invoke(benchmark("accuracy").main, ["--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "--data" in result.output
    assert "Traceback" not in result.output


def test_resnet20_has_the_published_size(benchmark):
    model = benchmark("cifar").ResNet20()
    convolutions_and_head = sum(p.numel() for name, p in model.named_parameters() if "bn" not in name)
    assert convolutions_and_head == 268_346
