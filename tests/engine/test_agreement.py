"""Processes that compress different things are told what differs."""

import copy

import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.distributed.group import Group
from balf_fx.engine.agreement import check_alike
from balf_fx.engine.settings import Settings
from balf_fx.errors import ModelError, OptionError


class Two(Group):
    """A process and another one, which tells what it was told by a process before."""

    size = 2

    def __init__(self, before=None):
        self.told, self.before = [], before

    def gathered(self, value):
        self.told.append(value)
        return [value, value if self.before is None else self.before.told[len(self.told) - 1]]


def compare(one, other):
    """Check that two pairs of a model and settings are alike."""
    before = Two()
    check_alike(*one, before)
    check_alike(*other, Two(before))


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


def test_plans_are_compared_by_what_they_hold(model):
    options = {"effort": "fast", "progress": False}
    plans = [
        balf_fx.plan(balf_fx.compile(model, torch.randn(32, 12), allocation={"0": rank}, **options)) for rank in (2, 3)
    ]
    one, other = ((model, Settings(allocation=plan)) for plan in plans)
    compare(one, one)
    with pytest.raises(OptionError, match="give all of them the same allocation"):
        compare(one, other)


def test_tensors_that_differ_are_quoted(model):
    changed = copy.deepcopy(model)
    changed[2] = nn.Linear(24, 8)
    with pytest.raises(ModelError, match=r"different models: '2\.weight', '2\.bias' differ"):
        compare((model, Settings()), (changed, Settings()))
