import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balf_fx.latency import table as module
from balf_fx.latency.operations import Operation, Run
from balf_fx.latency.table import Table, interpolated, lines, open_table

LINEAR = Operation("linear", (10,), torch.float32, torch.device("cpu"))


def formula(run):
    """Seconds that a product takes if it is bound by arithmetic and memory."""
    return 1e-9 * (5 + 2 * run.inputs + 3 * run.outputs + 0.25 * run.inputs * run.outputs)


@pytest.fixture
def measured(monkeypatch):
    """The runs that were measured, with times by the formula."""
    runs = []
    monkeypatch.setattr(module, "_seconds", lambda run: (runs.append(run), formula(run))[1])
    return runs


@given(st.integers(1, 96), st.integers(1, 160))
def test_a_bilinear_time_is_exact_between_all_lines(inputs, outputs):
    grid = (lines({96}), lines({160, 100}))
    points = {point: 1e9 * formula(Run(LINEAR, *point)) for point in itertools.product(*grid)}
    own = Run(LINEAR, max(inputs, grid[0][0]), max(outputs, grid[1][0]))  # the smallest line is that of smaller sizes
    assert interpolated(points, grid, inputs, outputs) == pytest.approx(1e9 * formula(own))


def test_sizes_of_the_model_are_lines_of_the_grid():
    assert lines({100, 64}) == [4, 8, 16, 32, 64, 100]
    assert lines({40, 32}) == [4, 6, 8, 12, 16, 24, 32, 40]
    assert lines({64}) == [4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert lines({3}) == [3]


def test_nothing_is_measured_twice(measured):
    table = Table()
    table.measure([Run(LINEAR, 32, 48), Run(LINEAR, 16, 40)])
    first = len(set(measured))
    points = {(run.inputs, run.outputs) for run in measured}
    assert points > set(itertools.product(lines({32, 16}), lines({48, 40})))
    table.measure([Run(LINEAR, 32, 48)])
    assert len(set(measured)) == first
    assert table.nanoseconds(Run(LINEAR, 20, 44)) == pytest.approx(1e9 * formula(Run(LINEAR, 20, 44)))


def test_models_with_other_sizes_have_their_own_grids(measured):
    table = Table()
    table.measure([Run(LINEAR, 32, 48)])
    table.measure([Run(LINEAR, 24, 56)])  # no point (24, 48) is known
    assert table.nanoseconds(Run(LINEAR, 23, 48)) == pytest.approx(1e9 * formula(Run(LINEAR, 23, 48)))


def test_rounds_stop_at_the_limit(measured):
    table = Table(limit=0.0)
    table.measure([Run(LINEAR, 8, 8)])
    assert len(measured) == len(set(measured))


def test_times_are_kept_in_a_file(measured, tmp_path):
    path = tmp_path / "folder" / "times.json"
    one, other = Table(path=path), Table(path=path)
    one.measure([Run(LINEAR, 8, 8)])
    other.measure([Run(LINEAR, 8, 16)])  # as another process that has not seen what the first one wrote
    known = module._read(path)
    assert known[LINEAR.key].keys() >= {*itertools.product(lines({8}), lines({8, 16}))}
    measured.clear()
    Table(known, path=path).measure([Run(LINEAR, 8, 16), Run(LINEAR, 8, 8)])
    assert not measured


@pytest.mark.parametrize("text", ["", "[1]", '{"key": 3}', '{"key": [[1, 2]]}', "{"])
def test_a_damaged_file_is_the_same_as_none(text, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(text)
    assert module._read(path) == {}


def test_the_file_lies_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = open_table(torch.device("cpu")).path
    assert path.parent == tmp_path / "torch" / "balf_fx"
    assert torch.__version__.replace(".", "-").replace("+", "-") in path.name


@pytest.mark.parametrize("folder", [".", "/"])
def test_any_folder_may_be_torchs_own(monkeypatch, folder):
    monkeypatch.setenv("TORCH_HOME", folder)
    assert open_table(torch.device("cpu")).path.parent == Path(folder) / "balf_fx"


def test_machines_that_share_a_folder_have_tables_of_their_own(monkeypatch, tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nflags\t\t: fpu\n")
    assert module._processor(tmp_path) == "Some CPU @ 2.00GHz"
    assert module._processor(tmp_path / "none")
    own = open_table(torch.device("cpu")).path
    monkeypatch.setattr(module, "_processor", lambda: "Another CPU")
    assert open_table(torch.device("cpu")).path != own


def test_a_measured_time_is_that_of_the_operation():
    assert module._seconds(Run(LINEAR, 512, 512)) > module._seconds(Run(LINEAR, 1, 1)) > 0


def test_a_folder_that_cannot_be_written_costs_no_result(measured, tmp_path, caplog):
    (tmp_path / "file").touch()
    table = Table(path=tmp_path / "file" / "times.json")
    table.measure([Run(LINEAR, 32, 48)])
    assert table.nanoseconds(Run(LINEAR, 32, 48)) == pytest.approx(1e9 * formula(Run(LINEAR, 32, 48)))
    assert "not kept" in caplog.text
