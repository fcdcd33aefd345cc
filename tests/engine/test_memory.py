"""The option `memory`: bytes, or a share of what the system and the control groups of a process leave."""

import os

import pytest
import torch
from architectures import make
from torch import nn

import balf_fx
from balf_fx.calibration import pieces
from balf_fx.calibration.batches import MEMORY, Calibration, forward_for
from balf_fx.calibration.observers import SensitivityObserver
from balf_fx.engine import allocating, memory
from balf_fx.engine.memory import KINDS, bytes_of, free_memory
from balf_fx.engine.settings import Settings

GIB = 1 << 30


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("2G", 2 * GIB),
        ("1.5 GiB", 3 << 29),
        ("4GiB", 4 * GIB),
        ("64mb", 64 << 20),
        ("3k", 3 << 10),
        ("512", 512),
        (0, 0),
        (7, 7),
        (0.25, 100),
        ("0.25", 100),
        (0.999, 399),
    ],
)
def test_it_is_a_number_of_bytes_or_a_share_of_what_is_free(given, count):
    assert bytes_of(given, free=400) == count


def test_a_share_is_taken_once_at_the_start_of_a_run(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "free_memory", lambda: asked.append(1) or 64 * GIB)
    seen = []
    monkeypatch.setattr(
        "balf_fx.engine.run.calibrate", lambda program, batches, calibration, *_: seen.append(calibration.memory) or [0]
    )
    with pytest.raises(balf_fx.errors.NotCalibratedError):
        balf_fx.compile(nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(4, 8), flops=0.5, progress=False)
    assert seen == [16 * GIB]
    assert asked == [1]


@pytest.fixture
def alive(monkeypatch):
    """Of each run, how many observers of gradients have statistics when allocations are tried."""
    found, plain = [], allocating.plan_trial

    def plan_trial(program, *args, **options):
        observers = [each for each in program.module.modules() if isinstance(each, SensitivityObserver)]
        assert len(observers) > 1
        found.append(sum(each.sample is not None for each in observers))
        return plain(program, *args, **options)

    monkeypatch.setattr(allocating, "plan_trial", plan_trial)
    return found


def test_statistics_of_gradients_are_deleted_once_they_are_scored(alive):
    model, batches = make("mlp")
    options = {"params": 0.6, "effort": "balanced", "progress": False}
    small = balf_fx.compile(model, batches, **options)
    assert alive == [0]
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False)
    again = [balf_fx.convert(prepared, batches=batches, **options) for _ in range(2)]
    assert all(alive[1:])
    for each in again:
        torch.testing.assert_close(each.state_dict(), small.state_dict(), rtol=0, atol=0)


@pytest.fixture
def root(tmp_path):
    """A file system of Linux."""

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        return tmp_path

    write("proc/meminfo", "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\n")
    return write


def test_without_limits_it_is_what_the_kernel_counts_as_available(root):
    assert free_memory(root("proc/self/cgroup", "0::/user.slice\n")) == 8 * GIB
    root("sys/fs/cgroup/user.slice/memory.max", "max\n")
    assert free_memory(root("sys/fs/cgroup/user.slice/memory.current", "4096\n")) == 8 * GIB


@pytest.mark.parametrize("limited", ["a/b", "a"])  # the group of the process, or one around it
@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups_count(root, limited, version):
    group = f"sys/fs/cgroup/{'memory/' if version == 1 else ''}{limited}"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    root("proc/self/cgroup", "5:cpu,cpuacct:/\n4:memory:/a/b\n0::/\n" if version == 1 else "0::/a/b\n")
    root(f"{group}/{names[0]}", f"{4 * GIB}\n")
    assert free_memory(root(f"{group}/{names[1]}", f"{3 * GIB}\n")) == GIB
    stat = "total_inactive_file" if version == 1 else "inactive_file"
    assert free_memory(root(f"{group}/memory.stat", f"anon 5\n{stat} {GIB}\n")) == 2 * GIB


def test_where_nothing_is_known_it_is_all_memory_or_four_times_the_constant(tmp_path, monkeypatch):
    sizes = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert free_memory(tmp_path) == 4_096_000
    monkeypatch.delattr(os, "sysconf")
    assert free_memory(tmp_path) == 4 * MEMORY
    assert bytes_of(Settings().memory, free=4 * MEMORY) == KINDS * MEMORY  # for each kind, the constant


def test_more_memory_than_the_constant_makes_no_larger_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "MEMORY", 3000)
    model, batch = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).eval(), torch.randn(24, 8)
    prepared = balf_fx.prepare(model, batch[:4])
    found = {}
    for limit in (1000, 3000, 1 << 40):
        calibration = Calibration([], forward_for(model), memory=limit)
        cut = pieces.pieces_for_walk(prepared, calibration).of((batch, None), 0)
        found[limit] = [len(piece) for piece, _ in cut]
    assert found[3000] == found[1 << 40]
    assert 1 < len(found[3000]) < len(found[1000])
