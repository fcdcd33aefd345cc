"""How long a call takes: the dense model beside the compressed one, eager and compiled by inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from subjects import FLOPS, Subject
from timing import Measure, Task
from torch import nn

import balf_fx

Compiler = Literal["eager", "inductor"]
Pair = tuple[str, Subject, nn.Module]
ROUNDS = 30

pytestmark = pytest.mark.parametrize("compiler", ["eager", "inductor"])


@pytest.fixture(scope="module", params=["ResNet-20", "ResNet-18", "ViT-Tiny"])
def pair(request: pytest.FixtureRequest, subject: Callable[[str], Subject]) -> Pair:
    """A model and the same compressed with effort "fast": time depends on shapes, which are much the same otherwise."""
    torch.compiler.reset()
    found = subject(request.param)
    small = balf_fx.compile(found.model, found.calibration, flops=FLOPS, effort="fast", progress=False)
    return request.param, found, small


def _call(model: nn.Module, subject: Subject, compiler: Compiler) -> Task:
    compiled = torch.compile(model) if compiler == "inductor" else model
    return lambda: compiled(subject.batch)


def test_dense(pair: Pair, compiler: Compiler, measure: Measure) -> None:
    """The model as it is."""
    name, subject, _ = pair
    measure(f"latency, {name}, {compiler}", _call(subject.model, subject, compiler), ROUNDS)


def test_compressed(pair: Pair, compiler: Compiler, measure: Measure) -> None:
    """The compressed model in turn with the dense one."""
    name, subject, small = pair
    dense = {"dense": _call(subject.model, subject, compiler)}
    measure(f"latency, {name}, {compiler}", _call(small, subject, compiler), ROUNDS, dense)
