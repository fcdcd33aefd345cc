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


def test_the_file_has_what_was_measured_and_what_follows(scaling, tmp_path, load_benchmark, monkeypatch):
    stages = [scaling.Stage(name, 2, 8.0, 5.0, 0.8) for name in ("calibration", "linear algebra")]
    found = {"stages": [vars(stage) for stage in stages], "costs": [1.0] * 16, "batches": 16}
    asked = []
    monkeypatch.setattr(scaling, "run", lambda processes, options: (asked.append((processes, options)), found)[1])
    output = tmp_path / "scaling.json"
    result = load_benchmark("click.testing").CliRunner().invoke(scaling.main, ["--width", "64", "--json", str(output)])
    assert result.exit_code == 0, result.output
    assert asked == [(2, ["--layers", "4", "--width", "64", "--samples", "128", "--rounds", "3"])]
    written = json.loads(output.read_text())
    assert written["measured"] == found["stages"]
    assert [(row["name"], row["processes"], row["seconds"]) for row in written["simulated"]] == [
        ("calibration", 8, 4.0),
        ("calibration", 64, 6.125),
        ("linear algebra", 8, 4.0),
        ("linear algebra", 64, 6.5),
    ]
