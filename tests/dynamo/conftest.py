"""Fixtures of the tests of the backend."""

from __future__ import annotations

import pytest
import torch
from dynamo.helpers import STEPS


@pytest.fixture(autouse=True)
def _reset():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def tokens():
    return list(torch.randn(STEPS + 1, 4, 10, 32))
