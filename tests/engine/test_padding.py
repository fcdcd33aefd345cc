"""Padding does not count: what is calibrated on padded batches is what is calibrated without the padding."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx

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


def assert_same(actual, expected):
    chosen = [
        (plan.ranks, {width.name: width.kept for width in plan.widths})
        for plan in map(balf_fx.plan, (actual, expected))
    ]
    assert chosen[0] == chosen[1]
    torch.testing.assert_close(actual.state_dict(), expected.state_dict(), rtol=1e-7, atol=1e-9)


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
