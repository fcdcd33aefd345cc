"""torchrun starts the command line in several processes, of which the first writes and prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("PIL")

import numpy as np

import balf_fx
from balf_fx.cli import processes

ROOT = Path(__file__).parents[2]
FACTORY = """
import os
import torch
from torch import nn

def net():
    torch.manual_seed(os.getpid())  # other weights in each process
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 5))
"""


@pytest.mark.parametrize(("rank", "expected"), [(0, [0, 1, 4, 5, 8]), (1, [2, 3, 6, 7])])
def test_processes_take_batches_in_turn(monkeypatch, rank, expected):
    monkeypatch.setattr(processes, "_rank_and_size", lambda: (rank, 2))
    assert processes.own_share(range(9), 2) == expected


def test_one_process_takes_all():
    assert processes.own_share(range(5), 2) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_what_torchrun_has_not_started_is_alone(monkeypatch, environment):
    for name in processes._STARTED:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with processes.joined() as rank:
        assert rank == 0


@pytest.mark.slow
def test_torchrun_compresses_one_model(tmp_path):
    pytest.importorskip("torch.distributed.run")
    (tmp_path / "balf_fx_mine.py").write_text(FACTORY)
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(40, 24)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "balf_fx.cli", "compress", "balf_fx_mine:net", "--data", "data.npz", "--params", "0.6"]
    command += ["--effort", "fast", "--batch-size", "8", "-o", "small.safetensors"]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = balf_fx.report(tmp_path / "small.safetensors")
    printed, shown = done.stdout.strip(), str(found).strip()
    if torch.__version__ < (2, 9):  # it prints the ranks that are connected first
        printed = printed[printed.index(shown) :]
    assert printed == shown
    assert done.stderr.count("saved as small.safetensors") == 1
