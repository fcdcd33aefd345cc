"""The tables of benchmarks/README.md are those of the results."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(load_benchmark):
    return load_benchmark("readme_tables")


def test_the_readme_shows_the_results(tables):
    text = tables.README.read_text()
    assert tables.filled(text) == text


def test_a_figure_is_that_of_its_row(tables):
    found = tables._read("accuracy_resnet20")
    (row,) = (
        row
        for row in found["results"]
        if (row["method"], row["budget"], row["images"], row["seed"]) == ("ours", 0.5, 1024, 0)
    )
    headers, _, *lines = tables.accuracy("resnet20", 1024).splitlines()
    column = [cell.strip() for cell in headers.split("|")].index("0.5")
    (ours,) = (line for line in lines if "**balf_fx**" in line)
    assert ours.split("|")[column].strip() == f"{row['top1']:.2f}"


def test_a_table_without_a_place_is_an_error(tables, load_benchmark):
    with pytest.raises(load_benchmark("click").ClickException, match="no place for the table resnet20"):
        tables.filled("")


def test_every_file_of_results_and_every_command_is_in_the_readme(tables):
    text = tables.README.read_text()
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert path.name in text
        assert f"{'--benchmark-json=' if path.stem == 'timings' else '--json '}benchmarks/results/{path.name}" in text
    for script in re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / script).exists()
