"""The tables of benchmarks/README.md are those of the results."""

import json
import re
from pathlib import Path

import pytest

import balf_fx

ROOT = Path(__file__).parents[2]
BUDGETS = ["0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3"]


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


def rows(text):
    """The rows of all Markdown tables by their first cell, without bold type."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]
    return {line[0]: line[1:] for line in cells}


def test_the_front_page_shows_the_results(tables):
    front = (ROOT / "README.md").read_text()
    shown, made = rows(front), rows(tables.accuracy("resnet20", 1024))
    methods = [title.strip("*") for title in tables.METHODS.values()]
    own = [title for title in methods if title in shown]
    assert len(own) == 6
    for title in own:
        assert shown[title] == made[title]
    dense = tables._read("accuracy_resnet20")["dense"]["top1"]
    assert f"(dense: {dense:.2f} %)" in front
    for _, method, measure, _, results in tables.PUBLISHED:
        name = method.removeprefix("ResNet-20: ")
        if name.startswith("torch-pruning"):
            losses = {f"{1 - saved / 100:g}": lost for saved, lost in results}
            for budget, cell in zip(BUDGETS, shown[name], strict=True):
                digits = len(cell.partition(".")[2])
                assert cell == (f"{dense - losses[budget]:.{digits}f}" if budget in losses else "")
        elif not method.startswith("MobileNet"):
            unit = "FLOPs" if measure == "flops" else "parameters"
            saved, lost = (" / ".join(f"{pair[side]:g}" for pair in results) for side in (0, 1))
            assert shown[name] == [f"{saved} % of the {unit}", lost]
    kept = [0.8, 0.7, 0.5, 0.3]
    lost = [round(dense - float(shown["balf_fx"][BUDGETS.index(f"{budget:g}")]), 1) + 0.0 for budget in kept]  # no -0
    assert f"loses {' / '.join(f'{points:.1f}' for points in lost)} points at -20 / -30 / -50 / -70 % FLOPs" in front


def test_what_an_effort_costs_is_what_was_measured(tables):
    costs = rows(tables.costs())
    titles = {"fast": tables.METHODS["fast"], "balanced": tables.METHODS["balanced"], "best": "balf_fx"}
    passes = {effort: f"{float(costs[title][0]):.0f}" for effort, title in titles.items()}
    shown = rows((ROOT / "README.md").read_text())
    found = {
        effort: cells[-1] for effort in titles for title, cells in shown.items() if title.startswith(f'`"{effort}"')
    }
    assert found == passes
    docstring = " ".join(balf_fx.compile.__doc__.split())
    assert "They take about {fast}, {balanced} and {best} times as long".format(**passes) in docstring


def test_a_table_without_a_place_is_an_error(tables, load_benchmark):
    with pytest.raises(load_benchmark("click").ClickException, match="no place for the table resnet20"):
        tables.filled("")


def test_every_file_of_results_and_every_command_is_in_the_readme(tables):
    text = tables.README.read_text()
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert path.name in text
        by_pytest = "machine_info" in json.loads(path.read_text())
        assert f"{'--benchmark-json=' if by_pytest else '--json '}benchmarks/results/{path.name}" in text
    for script in re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / script).exists()


def test_what_the_readme_says_of_other_calibration_data_follows_from_the_results(tables):
    dense, *rows = tables._read("representative")["results"]
    lost = {
        (row["calibration"], row["effort"]): (dense["seen"] - row["seen"], dense["others"] - row["others"])
        for row in rows
    }
    seen, others = lost["the first five classes", "best"]
    assert others > 3 * max(seen, 0)
    assert 10 < others < min(lost["the first five classes", effort][1] for effort in ("fast", "balanced"))
    third = (dense["seen"] / 3, dense["others"] / 3)
    for effort in ("fast", "balanced", "best"):
        assert all(points > least for points, least in zip(lost["noise", effort], third, strict=True))
