"""Inputs that calibration keeps wait in files once they take more than `memory`."""

from __future__ import annotations

import gc
import tempfile

import pytest
import torch
from dynamo.helpers import STEPS, Mlps, calibrated, compiled, make_offline, rows, run

from balf_fx.dynamo import recording
from balf_fx.engine.memory import KINDS
from balf_fx.refit.offload import Shelved


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_inputs_beyond_the_memory_wait_in_files_until_the_switch(conv_net, images, folder):
    small = compiled(conv_net, memory=KINDS * (images[0].nbytes + 1))
    run(small, images[0], images[1])
    assert not files(folder)
    run(small, images[2])
    assert [path.stat().st_size for path in files(folder)] == [images[1].nbytes]
    run(small, images[3])
    assert not list(folder.iterdir())


@pytest.mark.parametrize("ending", ["restart", "reset"])
def test_files_go_with_what_they_were_recorded_for(conv_net, images, folder, ending):
    small = calibrated(conv_net, images, memory=0)
    assert files(folder)
    if ending == "restart":
        with torch.no_grad():
            conv_net.head.weight.mul_(2)
        run(small, images[0])
    else:
        torch.compiler.reset()
        gc.collect()
    assert not files(folder)


def test_memory_changes_nothing(conv_net, images, folder):
    outputs = [run(calibrated(conv_net, images, memory=memory), images[STEPS]) for memory in (0, "1G")]
    assert torch.equal(*outputs)
    expected = make_offline(conv_net, images[:STEPS])
    torch.testing.assert_close(outputs[0], run(expected, images[STEPS]))


def test_refits_read_inputs_from_files(folder, monkeypatch):
    model, batches = Mlps().double().eval(), rows()
    plan = {"first.0": 6, "first.2": 6, "second.0": 12, "second.2": 12}
    given = {"flops": None, "allocation": plan, "factors": "activations", "refit": True}
    expected = calibrated(model, batches, **given)
    wanted = run(expected, batches[STEPS])
    monkeypatch.setattr(recording, "Shelved", lambda memory: Shelved(0))
    small = calibrated(model, batches, **given)
    assert len(files(folder)) >= 2 * (STEPS - 1)
    assert torch.equal(run(small, batches[STEPS]), wanted)
    assert not files(folder)
