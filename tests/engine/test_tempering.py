"""Logits of a compressed language model get one factor, at every door; other outputs do not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.calibration.temperature import FACTORS
from balf_fx.engine import tempering

WORDS, WIDTH, LENGTH = 30, 16, 12


class Text(nn.Module):
    """A language model, whose head may be its table; with other classes, an encoder."""

    def __init__(self, tied=True, classes=WORDS):
        super().__init__()
        self.table, self.norm = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.head = nn.Linear(WIDTH, classes, bias=False)
        nn.init.normal_(self.head.weight)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        return self.head(self.norm(x + 12 * self.down(F.gelu(self.up(x)))))


def texts(count=3, samples=16):
    return list(torch.randint(WORDS, (count, samples, LENGTH)))


def compiled(model, batches, **options):
    options = {"params": 0.4, "effort": "balanced", "progress": False, **options}
    return balf_fx.compile(model.eval(), batches, **options)


def divergence(model, small, batches):
    with torch.no_grad():
        wanted, given = (torch.cat([each(batch) for batch in batches]).log_softmax(-1) for each in (model, small))
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def text(request):
    return Text(request.param)


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
@pytest.mark.parametrize("result", ["graph", "module"])
def test_logits_are_multiplied_by_a_factor_that_brings_them_closer(text, effort, result):
    batches, others = texts(), texts()
    before = copy.deepcopy(text.state_dict())
    plain = compiled(text, batches, effort=effort, result=result, temperature=False)
    small = compiled(text, batches, effort=effort, result=result)
    assert balf_fx.plan(plain).logit_factor == 1
    factor = balf_fx.plan(small).logit_factor
    assert factor in FACTORS
    assert factor < 1
    torch.testing.assert_close(small(others[0]), factor * plain(others[0]), rtol=1e-4, atol=1e-4)
    assert divergence(text, small, others) < divergence(text, plain, others)
    assert f"multiplied by {factor:.3g}" in str(balf_fx.report(small))
    assert "multiplied" not in str(balf_fx.report(plain))
    assert all(torch.equal(value, before[name]) for name, value in text.state_dict().items())
    if result == "module":
        assert isinstance(small, Text)
        assert (small.head.weight is small.table.weight) == (text.head.weight is text.table.weight)


@pytest.mark.parametrize("result", ["graph", "module"])
def test_files_hold_it(text, result, tmp_path):
    batches = texts()
    small = compiled(text, batches, result=result)
    balf_fx.save(small, tmp_path / "small.safetensors")
    again = balf_fx.load(tmp_path / "small.safetensors", Text(text.head.weight is text.table.weight).eval())
    assert torch.equal(again(batches[0]), small(batches[0]))
    assert balf_fx.plan(again).logit_factor == balf_fx.plan(small).logit_factor < 1
    followed = compiled(text, batches, params=None, allocation=balf_fx.plan(small), result=result)
    assert balf_fx.plan(followed).logit_factor == balf_fx.plan(small).logit_factor


def test_prepared_graphs_take_it_with_batches(text):
    batches = texts()
    prepared = balf_fx.prepare(text.eval(), batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False)
    options = {"params": 0.4, "effort": "balanced", "progress": False}
    small = balf_fx.convert(prepared, batches=batches, **options)
    assert torch.equal(small(batches[0]), compiled(text, batches)(batches[0]))
    assert balf_fx.plan(balf_fx.convert(prepared, **options)).logit_factor == 1


def test_block_by_block_is_the_same(text):
    batches = texts(count=12, samples=4)
    small, paged = (compiled(text, batches, memory=memory) for memory in ("1GiB", 40_000))
    assert balf_fx.plan(small).logit_factor == balf_fx.plan(paged).logit_factor < 1
    assert torch.equal(small(batches[0]), paged(batches[0]))


@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_backend_multiplies_heads_that_are_not_tied(tied, effort):
    model, batches = Text(tied).eval(), texts(count=4)
    options = {"params": 0.4, "calibration_steps": 3, "inner": "eager", "progress": False, "effort": effort}
    small = torch.compile(model, backend="balf", options=options)
    with torch.no_grad():
        for batch in batches:
            found = small(batch)
        plan = balf_fx.plan(small)
        assert (plan.logit_factor == 1) == tied
        again = small(batches[0][:5])  # another shape
        other = compiled(model, batches[:3], effort=effort)
        torch.testing.assert_close(again, small(batches[0])[:5])
    if not tied:
        torch.testing.assert_close(found, other(batches[-1]), rtol=1e-3, atol=1e-3)


def test_padding_does_not_count():
    class Masked(Text):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids) + 0 * attention_mask.unsqueeze(-1)

    model, ids = Masked(False), torch.cat(texts(2))
    mask = (torch.arange(LENGTH) < 6).expand(len(ids), -1).long()
    small = compiled(model, [{"input_ids": ids, "attention_mask": mask}])
    assert balf_fx.plan(small).logit_factor == 1  # something is added


@pytest.mark.parametrize("classes", [WORDS - 1, WORDS])
def test_features_of_an_encoder_keep_their_scale(classes):
    small = compiled(Text(False, classes), texts())
    assert (balf_fx.plan(small).logit_factor == 1) == (classes != WORDS)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)
        nn.init.normal_(self.head.weight)

    def forward(self, x):
        return self.head(x + 12 * self.down(F.gelu(self.up(x))))


def test_those_of_samples_only_if_asked_for():
    model, batches = Classifier(), list(torch.randn(3, 128, WIDTH))
    plain, asked = (compiled(model, batches, params=0.3, temperature=each) for each in (None, True))
    assert balf_fx.plan(plain).logit_factor == 1
    assert balf_fx.plan(asked).logit_factor < 1
    assert divergence(model, asked, batches) < divergence(model, plain, batches)
    assert torch.equal(asked(batches[0]).argmax(-1), plain(batches[0]).argmax(-1))
    few = compiled(model, [batch[:30] for batch in batches], params=0.3, temperature=True)
    assert balf_fx.plan(few).logit_factor == 1


class Several(Text):
    """`pick` makes the model's outputs of logits and of other values of their shape."""

    def __init__(self, pick):
        super().__init__(False)
        self.other, self.pick = nn.Linear(WIDTH, WORDS), pick

    def forward(self, ids):
        x = self.table(ids)
        x = self.norm(x + 12 * self.down(F.gelu(self.up(x))))
        return self.pick(self.head(x), self.other(x), x)


OUTPUTS = {
    "features beside": (lambda y, other, x: {"logits": y, "features": x}, True),
    "others of their shape": (lambda y, other, x: {"logits": y, "others": other}, False),
    "others that are multiplied in their place": (
        lambda y, other, x: {"logits": 9 * (y / 9).tanh(), "o": other},
        False,
    ),
    "another name": (lambda y, other, x: {"scores": y, "features": x}, False),
    "logits of the last word": (lambda y, other, x: y[:, -1], False),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_logits_are_told_apart_from_other_outputs(name):
    pick, known = OUTPUTS[name]
    model, batches = Several(pick), texts()
    plain, small = (compiled(model, batches, temperature=each) for each in (False, None))
    factor = balf_fx.plan(small).logit_factor
    assert (factor != 1) == known
    expected, found = (
        list(each(batches[0]).values()) if name != "logits of the last word" else [each(batches[0])]
        for each in (plain, small)
    )
    torch.testing.assert_close(found[0], factor * expected[0], rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, found[1:], expected[1:]))


def test_a_users_loss_is_not_that_of_probabilities(text):
    small = compiled(text, texts(), loss=lambda output, batch: output.square().mean())
    assert balf_fx.plan(small).logit_factor == 1


def test_outputs_within_a_divergence_are_compared_as_they_are(monkeypatch):
    called = []
    monkeypatch.setattr(tempering, "_measure", lambda *given: called.append(given))
    model, batches = Text(False).eval(), texts(count=8, samples=64)
    small = balf_fx.compile(
        model, batches[:2], divergence=0.9, validation=batches[2:], minimise="params", effort="fast", progress=False
    )
    assert balf_fx.plan(small).certificate is not None
    assert not called


@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_are_left_out_keep_their_weights(bias):
    model = Text(False)
    if bias:
        model.head.bias = nn.Parameter(torch.randn(WORDS))
    small = compiled(model, texts(), params=0.5, exclude=["head"])
    assert (balf_fx.plan(small).logit_factor < 1) == (not bias)  # the norm is scaled
    assert all(map(torch.equal, small.get_submodule("head").parameters(), model.head.parameters()))


def test_published_methods_stay_as_they_are(text):
    for preset in (balf_fx.BALF, {**balf_fx.AIR, "loss": None}):
        small = compiled(text, texts(), **preset)
        assert balf_fx.plan(small).logit_factor == 1
