"""Times of more processes follow from those of one and of two."""

import json

import pytest


@pytest.fixture
def scaling(load_benchmark):
    return load_benchmark("scaling")


def test_the_largest_share_is_that_of_the_largest_item(scaling):
    assert scaling.largest_share([2.0, 1.0, 1.0], 2) == 0.5
    assert scaling.largest_share([6.0, 1.0, 1.0], 4) == 0.75


def test_without_an_exchange_time_falls_with_the_largest_share(scaling):
    stage = scaling.Stage("calibration", 2, 8.0, 4.0, 1.0)
    assert scaling.simulate(stage, [1.0] * 64, 8) == scaling.Simulated("calibration", 8, 1.0, 1.0)
    assert scaling.simulate(stage, [1.0] * 4, 8).seconds == 2.0, "there are fewer items than processes"


def test_the_exchange_grows_with_the_logarithm(scaling):
    stage = scaling.Stage("calibration", 2, 8.0, 4.5, 8 / 9)
    assert scaling.simulate(stage, [1.0] * 64, 64).seconds == 8 / 64 + 6 * 0.5


@pytest.mark.slow
def test_two_processes_are_measured(scaling, tmp_path, load_benchmark):
    pytest.importorskip("transformers")
    output = tmp_path / "scaling.json"
    sizes = ["--layers", "1", "--width", "32", "--samples", "4", "--rounds", "1"]
    result = load_benchmark("click.testing").CliRunner().invoke(scaling.main, [*sizes, "--json", str(output)])
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert [(row["name"], row["processes"]) for row in found["measured"]] == [("calibration", 2), ("linear algebra", 2)]
    assert [row["processes"] for row in found["simulated"]] == [8, 64, 8, 64]
    for row in found["measured"]:
        assert row["alone"] > 0
        assert row["efficiency"] > 0
