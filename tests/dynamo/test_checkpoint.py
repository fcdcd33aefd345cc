"""A switch that is killed goes on from its checkpoint once the same calls have been made again."""

from __future__ import annotations

import pytest
import torch
from dynamo.helpers import STEPS, Broken, calibrated, run

import balf_fx
from balf_fx.checkpoint.folder import Folder
from balf_fx.errors import CheckpointError


class Killed(BaseException):
    pass


@pytest.fixture
def batches():
    return list(torch.randn(STEPS + 1, 64, 32))


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_a_switch_goes_on_and_a_complete_one_needs_no_compression(batches, tmp_path, monkeypatch, effort):
    model = Broken().eval()
    options = {"effort": effort, "checkpoint": tmp_path}
    expected = run(calibrated(model, batches, effort=effort), batches[STEPS])
    put = Folder.put

    def killed(self, stage, *args):
        put(self, stage, *args)
        if stage == "allocation":
            raise Killed

    torch.compiler.reset()
    with monkeypatch.context() as patched, pytest.raises(Killed):  # noqa: PT012
        patched.setattr(Folder, "put", killed)
        run(calibrated(model, batches, **options), batches[STEPS])
    torch.compiler.reset()
    small = calibrated(model, batches, **options)
    assert torch.equal(run(small, batches[STEPS]), expected)
    plan = balf_fx.plan(small)
    torch.compiler.reset()
    monkeypatch.setattr("balf_fx.dynamo.session.run", pytest.fail)
    again = calibrated(model, batches, **options)
    assert torch.equal(run(again, batches[STEPS]), expected)
    assert balf_fx.plan(again) == plan


def test_other_calls_are_refused(batches, tmp_path):
    model = Broken().eval()
    run(calibrated(model, batches, checkpoint=tmp_path), batches[STEPS])
    torch.compiler.reset()
    with pytest.raises(CheckpointError, match="calibration batch 1 differs"):
        run(calibrated(model, [batches[0], *batches], checkpoint=tmp_path), batches[STEPS])
