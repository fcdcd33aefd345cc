import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.calibration import pieces
from balf_fx.calibration.batches import Calibration, forward_for
from balf_fx.calibration.pieces import pieces_for_gradients, pieces_for_walk
from balf_fx.engine.memory import KINDS

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
    return [piece for piece, _ in pieces(prepared, calibration).of((batch, None), 0)]


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


@pytest.mark.parametrize(("kind", "wanted"), [("images", 3), ("text", 5)])
def test_a_model_is_asked_once_whether_its_samples_and_positions_are_independent(kind, wanted, model, batch):
    """With some samples together and each apart, and with more and with fewer positions of one of them."""
    runs, batches = [], {"images": batch, "text": {"tokens": torch.randint(20, (2, 200))}}
    model = model if kind == "images" else Text(True).eval()
    prepared = balf_fx.prepare(model, batches["images"][:4] if kind == "images" else batches["text"])
    prepared.register_forward_hook(lambda *_: runs.append(1))
    pieces = pieces_for_walk(prepared, Calibration([], forward_for(model), memory=1))
    found = [len(list(pieces.of((batches[kind], None), index))) for index in range(3)]
    assert found == [found[0]] * 3
    assert len(runs) == wanted


@pytest.mark.parametrize("pieces", [pieces_for_walk, pieces_for_gradients])
def test_samples_that_depend_on_each_other_stay_together(pieces):
    batch = torch.randn(16, 8)
    assert [len(piece) for piece in cut(pieces, Centring().eval(), batch, 1)] == [16]


def test_pieces_for_gradients_leave_no_trace_of_the_samples_that_are_tried(model, batch):
    prepared = balf_fx.prepare(model, batch[:4], sensitivity=True)
    before = {name: module.moments for name, module in prepared.named_modules() if hasattr(module, "moments")}
    assert before
    pieces = pieces_for_gradients(prepared, Calibration([], forward_for(model), memory=1))
    assert len(list(pieces.of((batch, None), 0))) == BATCH
    assert before == {name: module.moments for name, module in prepared.named_modules() if hasattr(module, "moments")}


class Text(nn.Module):
    """Each token sees those before it, or all others too."""

    def __init__(self, causal):
        super().__init__()
        self.causal, self.embedding, self.head = causal, nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, tokens, attention_mask=None):
        x = self.embedding(tokens)
        x = torch.tanh(torch.cumsum(x, 1)) if self.causal else x + x.mean(1, keepdim=True)
        return self.head(x if attention_mask is None else x * attention_mask.unsqueeze(-1))


TOKEN = 4 * 20 * 8  # bytes that are counted for a walk over one token


def cut_text(model, batch, memory, *, masked=False, weights=None):
    example = {"tokens": torch.randint(20, (3, 50))}
    example |= {"attention_mask": torch.ones(3, 50)} if masked else {}
    prepared = balf_fx.prepare(model.eval(), example, sensitivity=True, widths=False)
    before = {module: module.moments for module in prepared.modules() if hasattr(module, "moments")}
    found = list(pieces_for_walk(prepared, Calibration([], forward_for(model), memory=memory)).of((batch, weights), 0))
    assert all(module.moments is moments for module, moments in before.items())
    return found


@pytest.mark.parametrize(
    ("samples", "length", "fitting", "count"), [(1, 400, 100, 4), (3, 400, 100, 12), (1, 70, 1, 2)]
)
def test_long_sequences_of_a_causal_model_are_cut(samples, length, fitting, count):
    tokens = torch.randint(20, (samples, length))
    found = [piece["tokens"] for piece, _ in cut_text(Text(True), {"tokens": tokens}, fitting * TOKEN)]
    assert len(found) == count
    parts = len(found) // samples
    assert torch.equal(torch.cat([torch.cat(found[i : i + parts], 1) for i in range(0, len(found), parts)]), tokens)
    assert {piece.shape[0] for piece in found} == {1}
    assert max(piece.shape[1] for piece in found) <= max(fitting, 63)  # half of less than 64 is not enough to see


def test_other_sequences_stay_whole():
    tokens = torch.randint(20, (1, 400))
    mask = torch.ones(1, 400, dtype=torch.int64)
    padded = mask.clone()
    padded[:, :30] = 0
    assert len(cut_text(Text(False), {"tokens": tokens}, TOKEN)) == 1
    assert len(cut_text(Text(True), {"tokens": tokens, "attention_mask": mask}, TOKEN, masked=True)) == 400 // 32
    assert len(cut_text(Text(True), {"tokens": tokens, "attention_mask": padded}, TOKEN, masked=True)) == 1
    assert len(cut_text(Text(True), {"tokens": tokens}, TOKEN, weights=mask.float())) == 1


def test_longer_sequences_than_the_example_take_more_memory():
    tokens = torch.randint(20, (6, 200))
    assert [len(piece["tokens"]) for piece, _ in cut_text(Text(False), {"tokens": tokens}, 2 * 200 * TOKEN)] == [2] * 3
    assert [len(piece["tokens"]) for piece, _ in cut_text(Text(False), {"tokens": tokens[:, :25]}, 150 * TOKEN)] == [6]


def test_a_conversion_takes_a_large_batch_as_it_takes_its_pieces(model, batch):
    prepared = balf_fx.prepare(model, batch[:4], factors="sensitivity")
    balf_fx.calibrate(prepared, [batch], progress=False)
    whole, cut_by_us, cut_by_hand = (
        balf_fx.convert(prepared, flops=0.5, batches=batches, memory=memory, progress=False).state_dict()
        for batches, memory in (([batch], 1 << 30), ([batch], KINDS * 12 * 8 * VALUE), (batch.split(12), 1 << 30))
    )
    assert all(torch.equal(value, cut_by_hand[name]) for name, value in cut_by_us.items())
    assert any(not torch.equal(value, whole[name]) for name, value in cut_by_us.items() if name in whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_that_differ_by_the_rounding_of_their_format_are_alike(dtype):
    whole = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype)
    rounding = max(4 * torch.finfo(dtype).eps, 1e-3)
    for share, alike in ((0.5, True), (2.0, False)):
        parts = (whole + share * rounding * 4).to(dtype).split(1)
        assert pieces._alike(whole, parts) == alike
