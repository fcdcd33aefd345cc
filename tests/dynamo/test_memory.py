"""Inputs that calibration keeps wait in files once they take more than `memory`."""

from __future__ import annotations

import tempfile

import pytest
import torch
from dynamo.helpers import STEPS, Mlps, calibrated, compiled, make_offline, ranks, rows, run

import balf_fx


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_inputs_beyond_the_memory_wait_in_files_until_the_switch(conv_net, images, folder):
    small = compiled(conv_net, memory=images[0].nbytes + 1)
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
    assert not files(folder)


def test_memory_changes_nothing(conv_net, images, folder):
    outputs = [run(calibrated(conv_net, images, memory=memory), images[STEPS]) for memory in (0, "1G")]
    assert torch.equal(*outputs)
    expected = make_offline(conv_net, images[:STEPS])
    torch.testing.assert_close(outputs[0], run(expected, images[STEPS]))


def test_refits_read_inputs_and_what_parts_hand_over_from_files(folder):
    model, batches = Mlps().double().eval(), rows()
    plan = {"first.0": 6, "first.2": 6, "second.0": 12, "second.2": 12}
    given = {"flops": None, "allocation": plan, "factors": "activations", "refit": "up"}
    small, expected = (calibrated(model, batches, memory=memory, **given) for memory in ("20K", "1G"))
    assert files(folder)
    torch.testing.assert_close(run(small, batches[STEPS]), run(expected, batches[STEPS]))
    assert ranks(balf_fx.report(small)) == ranks(balf_fx.report(expected))
    assert not files(folder)
