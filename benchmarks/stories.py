"""TinyStories and a language model of Llama's shape with 260,032 parameters.

The folder of data holds stories260K.pth, the weights of karpathy/tinyllamas under the names used here, its tokenizer
tok512.bin, and tinystories_sample.json, a list of 256 stories. The first 64 are to judge by, each by itself and cut to
512 tokens; the others are to calibrate with. As in training, these follow each other in one stream, each behind a token
that begins a story, in an order that depends on the seed. The stream is cut into sequences of 512 tokens, so that
nothing is padded; what is left over at the end is dropped.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from task import Source, Task, random_sample
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_SIZE = 8
LENGTH = 512
EVALUATION_STORIES = 64
BUDGETS = (0.8, 0.6, 0.4)
_BEGIN = 1  # the token that begins a story
_FIRST_BYTE = 3  # the token of byte 0


class Rotation(nn.Module):
    """Rotary position embedding: pair k of a head's channels is turned by position / 10000^(2k / channels)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        speeds = 10000.0 ** (-torch.arange(0, channels, 2) / channels)
        angles = torch.outer(torch.arange(LENGTH), speeds)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, heads, T, channels] -> the same."""
        # Symbolic tracing can follow `narrow`, and with it sequences of any length, but not a slice of a buffer.
        cos, sin = (table.narrow(0, 0, x.shape[2]) for table in (self.cos, self.sin))
        real, imaginary = x[..., 0::2], x[..., 1::2]
        return torch.stack((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1).flatten(-2)


class Block(nn.Module):
    """Attention in which several query heads share one of keys and values, then a gated feed-forward layer."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.channels, self.shared_by = width // heads, heads // kv_heads
        self.rotation = Rotation(self.channels)
        self.attn_norm = nn.RMSNorm(width, eps=1e-5)
        self.wq = nn.Linear(width, heads * self.channels, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.channels, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.channels, bias=False)
        self.wo = nn.Linear(heads * self.channels, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """[B, T, width] -> the same; `seen` [B, 1, T, T] says which keys a query sees, None for all up to its own."""
        x = x + self._attend(self.attn_norm(x), seen)
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))

    def _attend(self, y: Tensor, seen: Tensor | None) -> Tensor:
        query, key, value = (layer(y).unflatten(-1, (-1, self.channels)).transpose(1, 2) for layer in self._projections)
        key, value = (part.repeat_interleave(self.shared_by, dim=1) for part in (self.rotation(key), value))
        query = self.rotation(query)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=seen is None)
        return self.wo(attended.transpose(1, 2).flatten(-2))

    @property
    def _projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.wq, self.wk, self.wv


class Llama(nn.Module):
    """Llama 2 at the size of stories260K; the head is tied to the embedding."""

    causal: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("causal", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), persistent=False)
        self.tok = nn.Embedding(512, 64)
        self.blocks = nn.Sequential(*(Block(64, hidden=172, heads=8, kv_heads=4) for _ in range(5)))
        self.norm = nn.RMSNorm(64, eps=1e-5)
        self.head = nn.Linear(64, 512, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T] -> [B, T, 512]; the mask [B, T] is 0 for padding, which no token sees but itself."""
        seen = None if attention_mask is None else self._seen(attention_mask)
        x = self.tok(tokens)
        for block in self.blocks:
            x = block(x, seen)
        return self.head(self.norm(x))

    def _seen(self, mask: Tensor) -> Tensor:
        causal = self.causal.narrow(0, 0, mask.shape[1]).narrow(1, 0, mask.shape[1])
        own = causal & causal.mT  # a row of padding alone has no softmax
        return own | (causal & (mask > 0)[:, None, None, :])


class Tokenizer:
    """Byte-pair encoding: of two neighbours that make a known piece, those of the highest score are merged first.

    The file has, after one number, each piece as its score (float32), its length (int32) and its bytes. No piece has a
    space but at its beginning, so that words are encoded one by one.
    """

    def __init__(self, path: Path) -> None:
        raw, at = path.read_bytes(), 4
        self.scores: list[float] = []
        self.pieces: list[bytes] = []
        while at < len(raw):
            score, length = struct.unpack_from("<fi", raw, at)
            at += 8 + length
            self.scores.append(score)
            self.pieces.append(raw[at - length : at])
        self.tokens = {piece: token for token, piece in reversed(list(enumerate(self.pieces)))}
        self._word = functools.cache(self._encode_word)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, which is taken to follow a space, behind the one that begins a story."""
        words = re.findall(r" [^ ]*", f" {text}")
        return [_BEGIN, *itertools.chain.from_iterable(map(self._word, words))]

    def _encode_word(self, word: str) -> list[int]:
        tokens = list(itertools.chain.from_iterable(map(self._encode_character, word)))
        while True:
            merged = [self.tokens.get(self.pieces[a] + self.pieces[b]) for a, b in itertools.pairwise(tokens)]
            known = [(self.scores[token], -at, token) for at, token in enumerate(merged) if token is not None]
            if not known:
                return tokens
            _, at, token = max(known)
            tokens[-at : 2 - at] = [token]

    def _encode_character(self, character: str) -> list[int]:
        piece = character.encode()
        return [self.tokens[piece]] if piece in self.tokens else [byte + _FIRST_BYTE for byte in piece]


def load(source: Source) -> Task:
    """The language model, calibrated on all sequences unless `source.images` says how many.

    Raises:
        click.ClickException: something is missing; says what to pass.
    """
    model = source.load_weights(Llama(), "stories260K.pth")
    texts: list[str] = json.loads(source.file("tinystories_sample.json").read_text())
    encode = Tokenizer(source.file("tok512.bin")).encode
    sequences = cut([encode(text) for text in texts[EVALUATION_STORIES:]], source.seed)
    count = source.images or len(sequences)
    if count > len(sequences):
        raise click.ClickException(f"--images {count} is more than the {len(sequences)} sequences there are")
    stories = [torch.tensor([encode(text)[:LENGTH]]) for text in texts[:EVALUATION_STORIES][: source.evaluate]]
    return Task(
        title="stories260K, TinyStories",
        model=model,
        calibration=sequences[:count].split(BATCH_SIZE),
        samples=count,
        evaluation=[(story[:, :-1], story[:, 1:]) for story in stories],
        metric="perplexity",
        measure="params",
        budgets=BUDGETS,
    )


def cut(stories: Sequence[Sequence[int]], seed: int) -> Tensor:
    """[N, LENGTH], all stories in a random order, one after the other."""
    order = random_sample(len(stories), len(stories), seed).tolist()
    stream = torch.tensor(list(itertools.chain.from_iterable(stories[i] for i in order)))
    return stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
