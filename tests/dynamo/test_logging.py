"""What the backend logs, and its progress bar."""

from __future__ import annotations

import logging

import torch
from dynamo.helpers import STEPS, calibrated, compiled, messages, ranks, run
from torch import nn

import balf_fx


def test_the_log_tells_the_switch(conv_net, images, caplog):
    caplog.set_level(logging.INFO, "balf_fx.backend")
    small = calibrated(conv_net, images)
    assert not messages(caplog)
    with torch.no_grad():
        small(images[0])
        small(images[1])
    which, how_much = messages(caplog)
    assert "call 4 is the first compressed one" in which
    assert f"block.0: {ranks(balf_fx.report(small))['block.0']}" in which
    assert "% kept" in how_much


def test_a_progress_bar_at_the_switch_alone(conv_net, images, capsys):
    small = compiled(conv_net, progress=True)
    run(small, *images[:STEPS])
    assert capsys.readouterr().err == ""
    run(small, images[STEPS])
    assert "%" in capsys.readouterr().err
    run(small, images[STEPS])
    run(small, images[0][:2])
    assert capsys.readouterr().err == ""


def test_no_progress_bar(conv_net, images, capsys):
    run(compiled(conv_net, progress=False), *images)
    assert capsys.readouterr().err == ""


def test_errors_that_are_expected_are_not_printed(capsys):
    """Graphs of one batch size cannot run on a few samples, on which allocations are tried first."""

    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(12, 24), nn.Linear(8, 5)

        def forward(self, x):
            return self.last(self.first(x).view(x.shape[0], 3, 8).relu().sum(1))

    run(compiled(Sized().eval(), progress=False), *torch.randn(STEPS + 1, 16, 12))
    assert capsys.readouterr() == ("", "")
