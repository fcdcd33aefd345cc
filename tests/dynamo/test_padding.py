"""Padding does not count in calls that the backend records, and all parts of a call share its mask."""

import functools
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.errors import CalibrationError

WIDTH, LENGTH, PADDED, CALLS = 8, 5, 8, 2


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    """Mixes tokens that are no padding; the second part sees no mask, the head reads one value a sample."""

    def __init__(self, breaks):
        super().__init__()
        self.tokens, self.first, self.second = nn.Embedding(24, WIDTH), Part(), Part()
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 24)
        self.breaks = breaks

    def forward(self, input_ids, attention_mask):
        x = self.first(self.tokens(input_ids))
        counted = attention_mask[..., None].to(x.dtype)
        x = x + self.mix((x * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.head(self.second(x))


def padded(ids, side):
    room = (0, PADDED - LENGTH) if side == "right" else (PADDED - LENGTH, 0)
    return F.pad(ids, room), F.pad(torch.ones_like(ids), room)


@pytest.fixture
def calls():
    return [torch.randint(1, 24, (12, LENGTH)) for _ in range(CALLS)]


def plan_of(model, batches, **options):
    torch.compiler.reset()
    options = {"params": 0.7, "calibration_steps": CALLS, "inner": "eager", "progress": False, **options}
    small = torch.compile(model, backend="balf", options=options)
    with torch.no_grad():
        for batch in (*batches, batches[0]):
            small(*batch)
    return balf_fx.backend.plan(small)


def assert_same(actual, expected):
    assert actual.plan.ranks == expected.plan.ranks
    torch.testing.assert_close(dict(actual.tensors), dict(expected.tensors), rtol=1e-7, atol=1e-9)


def the_mask(inputs):
    return next(each for each in inputs if each.max() == 1)


@pytest.mark.parametrize("breaks", [False, True], ids=["whole", "in parts"])
@pytest.mark.parametrize(("effort", "side"), [("fast", "left"), ("best", "right")])
def test_padding_changes_nothing(calls, effort, breaks, side):
    torch.manual_seed(0)
    model = Model(breaks).double().eval()
    plain = plan_of(model, [(ids, torch.ones_like(ids)) for ids in calls], effort=effort)
    assert_same(plan_of(model, [padded(ids, side) for ids in calls], effort=effort), plain)


def test_a_users_weights_are_those_of_the_first_graphs_inputs(calls):
    torch.manual_seed(0)
    model, batches = Model(True).double().eval(), [padded(ids, "left") for ids in calls]
    given = plan_of(model, batches, effort="fast", weights=the_mask)
    assert_same(given, plan_of(model, batches, effort="fast"))
    with pytest.raises(CalibrationError, match="must return a tensor"):
        plan_of(model, batches, effort="best", weights=lambda _: None)


def test_open_sizes_are_no_inputs_of_the_users():
    """From the second shape on, Dynamo's graphs take sizes, too."""
    model, seen = nn.Sequential(Part(), Part()).double().eval(), []

    def first_half(batch):
        seen.append(batch.shape)
        return (torch.arange(len(batch)) < len(batch) / 2).double()

    batches = [(torch.randn(size, WIDTH, dtype=torch.float64),) for size in (32, 48)]
    given = plan_of(model, batches, effort="best", weights=first_half)
    assert {(size, WIDTH) for size in (32, 48)} <= set(map(tuple, seen))
    other = [(torch.cat([x[: len(x) // 2], torch.randn(len(x) // 2, WIDTH, dtype=x.dtype)]),) for (x,) in batches]
    assert_same(plan_of(model, other, effort="best", weights=first_half), given)


def test_weights_may_meet_no_layer():
    model = nn.Sequential(nn.Tanh(), nn.LayerNorm(WIDTH)).eval()
    batches = [(torch.randn(4, WIDTH),) for _ in range(CALLS)]
    assert plan_of(model, batches, weights=lambda batch: torch.ones(len(batch)), strict=False).plan.ranks == {}


class Wrapped(Model):
    """Its `forward` is wrapped as those of transformers are."""

    @functools.wraps(Model.forward)
    def forward(self, *args, **kwargs):
        return Model.forward(self, *args, **kwargs)


class Unbound(Model):
    """The same, where the wrapper takes the module, too."""

    def forward(*args, **kwargs):
        return Model.forward(*args, **kwargs)


Unbound.forward.__signature__ = inspect.signature(Model.forward)


@pytest.mark.parametrize("kind", [Wrapped, Unbound])
def test_a_mask_that_a_wrapper_passes_on_is_known_by_its_position(calls, kind):
    torch.manual_seed(0)
    model, batches = Model(False).double().eval(), [padded(ids, "left") for ids in calls]
    wrapper = kind(False).double().eval()
    wrapper.load_state_dict(model.state_dict())
    assert_same(plan_of(wrapper, batches, effort="fast"), plan_of(model, batches, effort="fast"))  # with its names
