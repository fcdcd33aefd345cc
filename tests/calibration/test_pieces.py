import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.calibration.batches import Calibration, forward_for
from balf_fx.calibration.pieces import pieces_for_gradients, pieces_for_walk

BATCH = 24
VALUE = 4 * 16 * 12 * 12  # bytes of the largest value of one sample


class Centring(nn.Module):
    """What a sample gives depends on the others."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.first(x).relu()
        return self.second(y - y.mean(0))


@pytest.fixture
def model():
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 12 * 12, 10)).eval()


@pytest.fixture
def batch():
    return torch.randn(BATCH, 3, 12, 12)


def cut(pieces, model, batch, memory):
    prepared = balf_fx.prepare(model, batch[:4], sensitivity=True, widths=False)
    calibration = Calibration([], forward_for(model), memory=memory)
    return [piece for piece, _ in pieces(prepared, (batch, None), calibration, 0)]


@pytest.mark.parametrize(
    ("pieces", "alive"),
    [
        (pieces_for_walk, 8 * VALUE),
        (pieces_for_gradients, 2 * VALUE + 2 * VALUE // 2 + 4 * 10),  # both convolutions, ReLU, flatten, linear
    ],
)
@pytest.mark.parametrize("fitting", [1, 5, 12, 23, BATCH, 100])
def test_as_few_pieces_as_each_fit(model, batch, pieces, alive, fitting):
    found = cut(pieces, model, batch, fitting * alive)
    assert torch.equal(torch.cat(found), batch)
    assert max(map(len, found)) <= fitting
    assert len(found) == -(-BATCH // fitting)


@pytest.mark.parametrize("pieces", [pieces_for_walk, pieces_for_gradients])
def test_samples_that_depend_on_each_other_stay_together(pieces):
    batch = torch.randn(16, 8)
    assert [len(piece) for piece in cut(pieces, Centring().eval(), batch, 1)] == [16]


def test_pieces_for_gradients_leave_no_trace_of_the_samples_that_are_tried(model, batch):
    prepared = balf_fx.prepare(model, batch[:4], sensitivity=True)
    before = {name: module.moments for name, module in prepared.named_modules() if hasattr(module, "moments")}
    assert before
    assert (
        len(list(pieces_for_gradients(prepared, (batch, None), Calibration([], forward_for(model), memory=1), 0)))
        == BATCH
    )
    assert before == {name: module.moments for name, module in prepared.named_modules() if hasattr(module, "moments")}


def test_a_conversion_takes_a_large_batch_as_it_takes_its_pieces(model, batch):
    prepared = balf_fx.prepare(model, batch[:4], factors="sensitivity")
    balf_fx.calibrate(prepared, [batch], progress=False)
    whole, cut_by_us, cut_by_hand = (
        balf_fx.convert(prepared, flops=0.5, batches=batches, memory=memory, progress=False).state_dict()
        for batches, memory in (([batch], 1 << 30), ([batch], 12 * 8 * VALUE), (batch.split(12), 1 << 30))
    )
    assert all(torch.equal(value, cut_by_hand[name]) for name, value in cut_by_us.items())
    assert any(not torch.equal(value, whole[name]) for name, value in cut_by_us.items() if name in whole)
