"""BALF on ResNet-20 matches its reference implementation, and results files can be continued."""

import json

import pytest
from click.testing import CliRunner


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_balf_matches_the_reference(load_benchmark, data_folder, tmp_path):
    accuracy, output = load_benchmark("accuracy"), tmp_path / "results.json"
    printed = run(accuracy.main, "--method", "balf", "--flops", 0.6, "--data", data_folder, "--json", output)
    assert "BALF reference" in printed
    results, reference = json.loads(output.read_text()), accuracy.REFERENCE["resnet20"]
    assert results["answers"] == 9979
    assert results["dense"]["top1"] == pytest.approx(91.73, abs=0.05)
    (row,) = results["results"]
    assert row["top1"] == pytest.approx(reference[0.6], abs=1.0)
    assert row["flops_kept"] <= 0.6


def test_a_results_file_is_continued(load_benchmark, data_folder, tmp_path):
    accuracy, output = load_benchmark("accuracy"), tmp_path / "results.json"
    arguments = ["--method", "svd", "--images", 8, "--data", data_folder, "--json", output]
    run(accuracy.main, *arguments, "--evaluate", 20, "--flops", 0.9)
    (first,) = json.loads(output.read_text())["results"]
    run(accuracy.main, *arguments, "--evaluate", 20, "--flops", 0.9, "--params", 0.5, "--resume")
    again, second = json.loads(output.read_text())["results"]
    assert again == first
    assert (second["measure"], second["budget"]) == ("params", 0.5)
    assert second["params_kept"] <= 0.5
    other = [str(argument) for argument in (*arguments, "--evaluate", 21, "--resume")]
    assert "write elsewhere" in CliRunner().invoke(accuracy.main, other).output


def test_the_table_shows_what_each_method_reaches_and_costs(load_benchmark):
    accuracy = load_benchmark("accuracy")

    def row(method, budget, top1, seconds):
        return accuracy.Row(method, "flops", budget, 8, 0, top1, 2.0, 0.1, budget - 1e-4, 0.7, seconds, 2.0)

    rows = [row("a", 0.9, 80.0, 4.0), row("a", 0.5, 60.0, 8.0), row("b", 0.9, 81.0, 5.0)]
    _, _, first, second, reference = accuracy.table(rows, "top1", {0.9: 79.0, 0.8: 70.0}).splitlines()
    assert first.split() == ["a", "80.00", "(0.8999)", "60.00", "(0.4999)", "3.0"]
    assert second.split() == ["b", "81.00", "(0.8999)", "2.5"]
    assert reference.split() == ["BALF", "reference", "79.00"]
