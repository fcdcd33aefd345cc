"""What a call of `torch.compile(model, backend="balf")` takes, while it calibrates and after the switch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from subjects import FLOPS, Subject
from timing import Measure, Task
from torch import nn

import balf_fx
from balf_fx.backend import balf

ROUNDS = 30

pytestmark = pytest.mark.parametrize("name", ["ResNet-18"])


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    """Every case compiles anew, so that none meets another's calibration."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _online(model: nn.Module, calibration_steps: int) -> nn.Module:
    return torch.compile(model, backend=balf, options={"flops": FLOPS, "calibration_steps": calibration_steps})


def _call(model: nn.Module, subject: Subject) -> Task:
    return lambda: model(subject.batch)


def test_calibration_call(name: str, subject: Callable[[str], Subject], measure: Measure) -> None:
    """A call that is observed, in turn with one of the model alone."""
    found = subject(name)
    calibrating = _online(found.model, 1 << 30)
    measure(f"backend, {name}", _call(calibrating, found), ROUNDS, {"eager": _call(found.model, found)})


def test_after_the_switch(name: str, subject: Callable[[str], Subject], measure: Measure) -> None:
    """A call of the compressed model, in turn with others that inductor compiled: the dense one, and `compile`'s."""
    found = subject(name)
    switched = _online(found.model, 1)
    offline = balf_fx.compile(found.model, found.batch, flops=FLOPS, effort="fast", progress=False)
    rivals = {
        "plain inductor": _call(torch.compile(found.model), found),
        "torch.compile(balf_fx.compile(...))": _call(torch.compile(offline), found),
    }
    with torch.no_grad():
        switched(found.batch)
    measure(f"backend, {name}", _call(switched, found), ROUNDS, rivals)
