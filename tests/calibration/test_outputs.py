import pytest
import torch
from torch import nn
from torch.nn import functional as F

from balf_fx.calibration.batches import Calibration, forward_for
from balf_fx.calibration.outputs import divergence, find_logits, find_pixels, loss_and_weight, outputs_of
from balf_fx.errors import CalibrationError


class Outputs(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.linear, self.make = nn.Linear(6, 6), make

    def forward(self, x):
        return self.make(self.linear(x))


FORMS = {
    "logits": lambda y: y,
    "images": lambda y: y.reshape(-1, 1, 2, 3),
    "tuple": lambda y: (y[:, :2], y[:, 2:]),
    "mapping": lambda y: {"logits": y, "hidden": y + 1},
    "whole numbers": lambda y: y.argmax(-1),
}


def measured(model, other, batches, loss=None):
    forward = forward_for(model)
    with torch.no_grad():
        return divergence(other, Calibration(batches, forward, loss), outputs_of(model, batches, forward))


@pytest.mark.parametrize("form", FORMS)
def test_a_model_does_not_differ_from_itself(form):
    model = Outputs(FORMS[form]).eval()
    assert measured(model, model, list(torch.randn(2, 5, 6))) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("form", ["logits", "mapping"])
def test_logits_differ_by_their_divergence(form):
    model, other = (Outputs(FORMS[form]).eval() for _ in range(2))
    batches = list(torch.randn(3, 5, 6))
    given, wanted = ([net.linear(batch).detach().log_softmax(-1) for batch in batches] for net in (other, model))
    pairs = zip(given, wanted, strict=True)
    expected = sum(float(F.kl_div(a, b, reduction="batchmean", log_target=True)) for a, b in pairs) / 3
    assert measured(model, other, batches) == pytest.approx(expected, rel=1e-5)
    assert expected > 0


def test_a_constant_on_logits_is_no_difference():
    model = Outputs(FORMS["logits"]).eval()
    other = Outputs(lambda y: y + 3).eval()
    other.load_state_dict(model.state_dict())
    assert measured(model, other, [torch.randn(5, 6)]) == pytest.approx(0, abs=1e-6)


def test_logits_of_tokens_count_by_token():
    model, other = (nn.Sequential(nn.Embedding(7, 7)).eval() for _ in range(2))
    ids = torch.randint(7, (4, 5))
    a, b = (net(ids).detach().log_softmax(-1).flatten(0, 1) for net in (other, model))
    expected = float(F.kl_div(a, b, reduction="batchmean", log_target=True))
    assert measured(model, other, [ids]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["images", "tuple"])
def test_anything_else_differs_by_its_relative_square(form):
    model, other = (Outputs(FORMS[form]).eval() for _ in range(2))
    batch = torch.randn(5, 6)
    with torch.no_grad():
        pairs = (
            [(model(batch), other(batch))] if form == "images" else list(zip(model(batch), other(batch), strict=True))
        )
    expected = sum(float((a - b).square().sum() / a.square().sum()) for a, b in pairs)
    assert measured(model, other, [batch]) == pytest.approx(expected, rel=1e-5)


def test_the_scale_of_outputs_does_not_matter():
    model, other = (Outputs(FORMS["images"]).eval() for _ in range(2))
    batch = torch.randn(5, 6)
    before = measured(model, other, [batch])
    for net in (model, other):
        net.make = lambda y: 1000 * y.reshape(-1, 1, 2, 3)
    assert measured(model, other, [batch]) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("form", ["logits", "images"])
def test_not_a_number_is_infinite(form):
    model, other = (Outputs(FORMS[form]).eval() for _ in range(2))
    other.linear.bias.data[0] = torch.nan
    assert measured(model, other, [torch.randn(5, 6)]) == torch.inf


def test_a_users_loss_takes_the_place():
    model, other = (Outputs(FORMS["logits"]).eval() for _ in range(2))
    batches = list(torch.randn(2, 5, 6))
    loss = lambda output, batch: output.sum() * 0 + batch.sum()  # noqa: E731
    assert measured(model, other, batches, loss) == pytest.approx(float(sum(b.sum() for b in batches)) / 2)


@pytest.mark.parametrize("found", [None, 1.0, "one", torch.ones(3), torch.ones(1, dtype=torch.cfloat)])
def test_a_users_loss_must_be_a_scalar(found):
    model = Outputs(FORMS["logits"]).eval()
    with pytest.raises(CalibrationError, match="must return a scalar tensor, not"):
        measured(model, model, [torch.randn(5, 6)], lambda *_: found)


def test_no_batches_are_no_difference():
    model = Outputs(FORMS["logits"]).eval()
    assert measured(model, model, []) == 0


def test_rows_of_many_classes_are_compared_a_part_at_a_time(monkeypatch):
    wanted, given = torch.randn(2, 3, 40), torch.randn(2, 3, 40)
    ids = torch.zeros(2, 3, dtype=torch.long)
    whole, share = loss_and_weight(wanted, given, ids)
    assert float(whole) == pytest.approx(float(kl(wanted, given)))
    assert share == 6
    monkeypatch.setattr("balf_fx.calibration.outputs.CHUNK_ELEMENTS", 90)
    assert torch.equal(loss_and_weight(wanted, given, ids)[0], whole)


def kl(wanted, given):
    p = wanted.double().softmax(-1)
    return (p * (p.log() - given.double().log_softmax(-1))).sum(-1).mean()


@pytest.mark.parametrize("shape", [(6, 1), (6, 4, 1), (6,), (6, 5, 4, 4)], ids=str)
def test_logits_without_classes_along_the_last_dimension_are_other_outputs(shape):
    """As of regressions and segmentations of transformers."""
    wanted, given = torch.randn(shape), torch.randn(shape)
    assert find_logits({"logits": wanted}, None) is None
    lost, _ = loss_and_weight({"logits": wanted}, {"logits": given}, torch.zeros(6, 3))
    assert float(lost) == pytest.approx(float((wanted - given).square().sum() / wanted.square().sum()), rel=1e-5)


def test_pixels_have_classes_along_the_second_dimension():
    pixels = torch.randn(2, 5, 4, 4)
    assert find_pixels({"logits": pixels, "more": pixels}) is pixels
    assert find_pixels(pixels) is pixels
    assert find_pixels({"a": pixels, "b": pixels}) is None
    assert find_pixels(pixels[:, :1]) is None
