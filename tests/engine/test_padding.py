"""Padding does not count: what is calibrated on padded batches is what is calibrated without the padding."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.calibration.batches import forward_for
from balf_fx.calibration.calls import placeholder_values
from balf_fx.calibration.observers import CovarianceObserver, SensitivityObserver
from balf_fx.errors import CalibrationError, NotCalibratedError, OptionError
from balf_fx.passes import Allocate, Factorize, Refit, RemoveObservers, Score

WORDS, WIDTH, LENGTH, PADDED = 24, 8, 5, 8


class Block(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal = causal
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, mask):
        query, key, value = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in self._projections)
        seen = mask[:, None, None, :] > 0
        if self.causal:
            seen = seen & torch.ones_like(x[:, :, :1] @ x[:, :, :1].mT, dtype=torch.bool).tril()[:, None]
        scores = (query @ key.mT).masked_fill(~seen, -1e30)
        x = x + self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))

    @property
    def _projections(self):
        return self.query, self.key, self.value


class Text(nn.Module):
    """A language model, or a classifier whose answer is that of the first token that is no padding."""

    def __init__(self, causal, classes=0):
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH)
        self.block = Block(causal)
        self.pooler, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, classes or WORDS)
        self.classes = classes

    def forward(self, input_ids, attention_mask):
        x = self.block(self.tokens(input_ids), attention_mask)
        if self.classes:
            weights = attention_mask[..., None].to(x.dtype)
            x = self.pooler((x * weights).sum(1) / weights.sum(1)).tanh()
        return self.head(x)


MODELS = {"encoder": lambda: Text(False, 3), "decoder": lambda: Text(True)}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double().eval()


@pytest.fixture
def tokens():
    return [torch.randint(1, WORDS, (12, LENGTH)) for _ in range(2)]


def masked(ids, mask=None):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}


def padded(ids, side, filling=0):
    room = (0, PADDED - LENGTH) if side == "right" else (PADDED - LENGTH, 0)
    return masked(F.pad(ids, room, value=filling), F.pad(torch.ones_like(ids), room))


def compressed(model, batches, **options):
    return balf_fx.compile(model, batches, **{"params": 0.6, "progress": False, **options})


def refitted(model, batches, **options):
    return compressed(model, batches, params=None, allocation=RANKS, refit="full", **options)


def assert_same(actual, expected):
    chosen = [
        (plan.ranks, {width.name: width.kept for width in plan.widths})
        for plan in map(balf_fx.plan, (actual, expected))
    ]
    assert chosen[0] == chosen[1]
    torch.testing.assert_close(actual.state_dict(), expected.state_dict(), rtol=1e-7, atol=1e-9)


RANKS = {"block.up": 3, "block.down": 2, "head": 4}
OPTIONS = {
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
    "best": {"effort": "best"},
    "up": {"refit": "up"},
    "air": dict(balf_fx.AIR),
    "uncentred": {"effort": "fast", "centred": False},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_padding_changes_nothing(model, tokens, options):
    plain = compressed(model, [masked(ids) for ids in tokens], **OPTIONS[options])
    for side in ("left", "right"):
        found = compressed(model, [padded(ids, side) for ids in tokens], **OPTIONS[options])
        assert_same(found, plain)


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return MODELS["decoder"]().double().eval()


def observed(model, batches, **options):
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False, **options)
    return prepared


def statistics(prepared):
    for module in prepared.modules():
        if isinstance(module, CovarianceObserver):
            yield module.moments.count, module.moments.mean, module.moments.scatter
        elif isinstance(module, SensitivityObserver):
            sample = module.sample
            yield sample.gradients.samples, sample.gradients.scatter, sample.moments.scatter, module.positions


def test_a_mask_of_ones_changes_nothing_bit_for_bit(decoder, tokens):
    batches = [masked(padded(ids, "right")["input_ids"]) for ids in tokens]
    bare = [batch["input_ids"] for batch in batches]
    plain, *others = (
        balf_fx.compile(Fixed(decoder), given, params=0.6, progress=False, **options)
        for given, options in (
            (bare, {}),
            (bare, {"weights": torch.ones_like}),
            (bare, {"weights": lambda batch: torch.ones(len(batch), dtype=torch.bool)}),
            (batches, {"forward": lambda model, batch: model(batch["input_ids"])}),
        )
    )
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), plain.parameters(), strict=True))


class Fixed(nn.Module):
    """The model without an argument for a mask."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, torch.ones_like(input_ids))


class Translator(nn.Module):
    """An encoder and a decoder, each with a mask, and both with the same length."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.encoder, self.decoder = Block(False), Block(True)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
        hidden = self.encoder(self.tokens(input_ids), attention_mask)
        x = self.decoder(self.tokens(decoder_input_ids), decoder_attention_mask)
        scores = (self.query(x) @ self.key(hidden).mT).masked_fill(attention_mask[:, None] == 0, -1e30)
        return self.head(x + scores.softmax(-1) @ self.value(hidden))


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_an_encoder_and_a_decoder_have_a_mask_each(tokens, effort):
    torch.manual_seed(0)
    model, answers = Translator().double().eval(), [ids.flip(1) for ids in tokens]

    def pairs(read, write):
        for ids, answer in zip(tokens, answers, strict=True):
            yield read(ids) | {f"decoder_{name}": value for name, value in write(answer).items()}

    plain = compressed(model, pairs(masked, masked), effort=effort)
    found = compressed(model, pairs(lambda ids: padded(ids, "left"), lambda ids: padded(ids, "right")), effort=effort)
    assert_same(found, plain)


def test_a_mask_is_read_wherever_it_is(decoder, tokens):
    batches = [padded(ids, "right") for ids in tokens]
    expected = compressed(decoder, batches, factors="activations")
    positional = [tuple(batch.values()) for batch in batches]
    assert_same(compressed(decoder, positional, factors="activations"), expected)
    nested = [{"inputs": batch} for batch in batches]
    forward = lambda model, batch: model(**batch["inputs"]) * model.head.weight[0, 0]  # noqa: E731 (reads the model)
    assert_same(compressed(decoder, nested, factors="activations", forward=forward), expected)
    forward = lambda model, batch: model(batch["input_ids"])  # noqa: E731 (the model has no argument for it)
    right = compressed(Fixed(decoder), batches, factors="activations", forward=forward)
    states = [small.state_dict().items() for small in (right, expected)]
    states = [{name.removeprefix("model."): value for name, value in state} for state in states]
    torch.testing.assert_close(*states, rtol=1e-7, atol=1e-9)  # what is right of a token does not reach it


def test_a_plain_call_of_a_prepared_graph_leaves_padding_out(decoder, tokens):
    batches = [padded(ids, "left") for ids in tokens]
    called, calibrated = (balf_fx.prepare(decoder, batches[0]) for _ in range(2))
    for batch in batches:
        called(**batch)
    balf_fx.calibrate(calibrated, batches, progress=False)
    for plain, expected in zip(statistics(called), statistics(calibrated), strict=True):
        assert plain[0] == expected[0] == 2 * 12 * LENGTH
        assert all(torch.equal(a, b) for a, b in zip(plain[1:], expected[1:], strict=True))


def test_weights_take_the_place_of_a_mask(decoder, tokens):
    batch = padded(torch.cat(tokens), "right")  # trials take a half of it each
    mask, shown = batch["attention_mask"], masked(batch["input_ids"])
    expected = compressed(decoder, [batch], effort="best")
    for weights in (mask, 3.0 * mask):
        assert_same(compressed(decoder, [shown], effort="best", weights=lambda _, own=weights: own), expected)


def test_the_weights_of_samples_say_which_count(decoder, tokens):
    half = torch.tensor([1.0, 0.0] * 6)
    kept, whole = [masked(ids[::2]) for ids in tokens], [masked(ids) for ids in tokens]
    assert_same(refitted(decoder, whole, weights=lambda _: half), refitted(decoder, kept))


def test_the_weights_of_images_say_which_count():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.Flatten(), nn.Linear(54, 5)]
    model = nn.Sequential(*layers).double().eval()
    images, half = torch.randn(2, 16, 3, 8, 8, dtype=torch.float64), torch.tensor([1.0, 0.0] * 8)
    broken = images.masked_fill((half == 0)[:, None, None, None], torch.nan)  # what does not count is not read

    def small(batches, **options):
        return balf_fx.compile(model, list(batches), allocation={"0": 3, "2": 4, "4": 2}, progress=False, **options)

    for effort, given in (("best", images), ("fast", broken)):
        found = small(given, effort=effort, weights=lambda _: half)
        assert_same(found, small(images[:, ::2], effort=effort))


def test_a_weight_of_two_counts_as_the_sample_twice(decoder, tokens):
    twice = torch.tensor([1.0, 2.0] * 6)
    repeated = [masked(torch.repeat_interleave(ids, twice.long(), 0)) for ids in tokens]
    found = compressed(decoder, [masked(ids) for ids in tokens], effort="fast", weights=lambda _: twice)
    assert_same(found, compressed(decoder, repeated, effort="fast"))


def test_rows_of_padding_alone_do_not_count(decoder, tokens):
    def with_empty_rows(ids):
        batch = padded(torch.cat([ids, ids[:3]]), "right")
        batch["attention_mask"][-3:] = 0
        return batch

    plain, found = (
        observed(decoder, [make(ids) for ids in tokens]) for make in (lambda ids: padded(ids, "right"), with_empty_rows)
    )
    for expected, actual in zip(statistics(plain), statistics(found), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    empty = [masked(ids, torch.zeros_like(ids)) for ids in tokens]
    with pytest.raises(NotCalibratedError, match="no calibration data has reached site"):
        compressed(decoder, empty, effort="fast")


def test_pieces_and_files_keep_their_weights(decoder, tokens):
    batches = [padded(ids[:6], "left") for ids in tokens]
    plain = refitted(decoder, [masked(ids[:6]) for ids in tokens], memory=0)
    mask = batches[0]["attention_mask"]
    for given, options in ((batches, {}), (batches, {"weights": lambda _: mask})):
        assert_same(refitted(decoder, iter(given), memory=0, **options), plain)  # one sample at a time


def test_a_refit_by_itself_reads_the_masks_of_its_inputs(decoder, tokens):
    smaller = []
    for batches in ([masked(ids) for ids in tokens], [padded(ids, "left") for ids in tokens]):
        prepared = observed(decoder, batches)
        forward = forward_for(decoder)
        inputs = [placeholder_values(prepared, batch, forward) for batch in batches]
        with torch.no_grad():
            for each in (Score(), Allocate(params=0.6), Refit(inputs), RemoveObservers(), Factorize()):
                prepared = each(prepared).graph_module
        smaller.append(prepared.state_dict())
    torch.testing.assert_close(*smaller, rtol=1e-7, atol=1e-9)
    with pytest.raises(OptionError, match="weights has 1 batches, inputs has 2"):
        Refit(inputs, weights=[{}])


def test_what_fits_no_layer_is_refused(decoder, tokens):
    batches = [masked(ids) for ids in tokens]
    for effort in ("fast", "best"):
        with pytest.raises(CalibrationError, match=r"returned \[12, 7\] for batch 0, but no layer has these positions"):
            compressed(decoder, batches, effort=effort, weights=lambda _: torch.ones(12, 7))
        with pytest.raises(CalibrationError, match="no weight above 0 for sample 0"):
            compressed(decoder, batches, effort=effort, weights=lambda _: torch.zeros(12, LENGTH))
