"""The benchmark of the allocator's weightings runs, and sees that losses tell more than energies."""

import json

import pytest
from click.testing import CliRunner


@pytest.mark.slow
def test_weightings_are_compared(load_benchmark, data_folder, tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    allocation, output = load_benchmark("allocation"), tmp_path / "results.json"
    few = ("normalised energy", "times loss^0.6", "times loss^0.3, widths x 4")
    monkeypatch.setattr(allocation, "WEIGHTINGS", {name: allocation.WEIGHTINGS[name] for name in few})
    arguments = ["--images", "64", "--evaluate", "32", "--flops", "0.6", "--data", str(data_folder)]
    result = CliRunner().invoke(allocation.main, [*arguments, "--json", str(output)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    results = json.loads(output.read_text())
    rows = {(row["weighting"], row["refit"]): row for row in results["results"]}
    assert list(rows) == [(name, refit) for name in (*allocation.WEIGHTINGS, "as measured") for refit in (False, True)]
    assert all(rows[name, True]["kl"] < rows[name, False]["kl"] for name, _ in rows)
    assert all(row["flops_kept"] <= 0.6 for row in results["results"])
    assert len(results["sites"]) == 20
    assert results["spearman"]["times loss^0.6"] > max(results["spearman"]["normalised energy"], 0.5)


@pytest.mark.parametrize(("predicted", "correlation"), [([0.1, 1.0, 5.0], 1), ([3.0, 2.0, 1.0], -1)])
def test_predictions_are_compared_by_rank(load_benchmark, predicted, correlation):
    pytest.importorskip("scipy")
    allocation = load_benchmark("allocation")
    rows = [
        allocation.SiteRow("a site", 1, kl, dict.fromkeys(allocation.POWERS, value))
        for kl, value in zip([1.0, 2.0, 9.0], predicted, strict=True)
    ]
    assert list(allocation.correlations(rows).values()) == pytest.approx([correlation] * len(allocation.POWERS))
