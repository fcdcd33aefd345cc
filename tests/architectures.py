"""Small models with features between layers, and the rewriting of them by hand, for the tests of widths."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

import balf_fx
from balf_fx.graph.annotation import graph_record, record_graph
from balf_fx.graph.flops import count_flops as count_flops
from balf_fx.graph.widths import Width
from balf_fx.passes import Allocate, Factorize, Narrow, Score, ScoreWidths
from balf_fx.passes.observe import remove_observers

DIM, HEADS, HEAD = 24, 2, 12


class Mlp(nn.Module):
    def __init__(self, activation: nn.Module | None = None, hidden: int = 32) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(12, hidden), activation or nn.GELU(), nn.Linear(hidden, 10)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class GatedMlp(nn.Module):
    """silu(w1 x) * w3 x, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(12, 32, bias=False), nn.Linear(12, 32, bias=False)
        self.w2 = nn.Linear(32, 10, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ScaledMlp(nn.Module):
    """A parameter with one entry for each hidden feature."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 10)
        self.gamma = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)) * self.gamma)


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, stride=2)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        return self.head(self.second(F.relu(self.first(x))).abs().mean((2, 3)))


class Transposed(nn.Module):
    """A transposed convolution with strides: no two neighbouring outputs read the same taps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.ConvTranspose2d(16, 7, 4, stride=2, padding=1)
        self.head = nn.Linear(7, 10)

    def forward(self, x):
        return self.head(self.second(F.relu(self.first(x))).abs().mean((2, 3)))


class InvertedResidual(nn.Module):
    """A depthwise convolution in the middle, and a residual connection around it all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = nn.Sequential(
            nn.Conv2d(8, 32, 1),
            nn.ReLU6(inplace=True),
            nn.Conv2d(32, 32, 3, padding=1, groups=32),
            nn.ReLU6(inplace=True),
            nn.Conv2d(32, 8, 1),
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """The gate reads the features that it scales."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 12, 1)
        self.reduce, self.expand = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = F.silu(self.first(x))
        gate = torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.head(F.relu(self.last(x * gate)).mean((2, 3)))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 32, 3), nn.Linear(32, 10)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.head(torch.flatten(self.pool(F.relu(self.conv(x))), 1))


class _Block(nn.Module):
    """Attention among tokens between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(32, DIM), nn.Linear(DIM, 10)

    def attend(self, x):
        raise NotImplementedError

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.attend(F.layer_norm(x, (DIM,)))).mean(1))


class Fused(_Block):
    """As timm writes it: one layer for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * HEADS * HEAD), nn.Linear(HEADS * HEAD, DIM)

    def norm(self, q):
        return q

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.norm(q), k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, HEADS * HEAD))


class FusedNorm(Fused):
    """With a norm on the queries: these cannot be narrowed, and what shares their layer neither."""

    def norm(self, q):
        return F.layer_norm(q, (HEAD,))


class Unfused(_Block):
    """Products, with the queries scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, HEADS * HEAD) for _ in range(3))
        self.proj = nn.Linear(HEADS * HEAD, DIM)

    def turn(self, x):
        return x

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, HEADS, HEAD).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (self.turn(q) * HEAD**-0.5) @ self.turn(k).transpose(-2, -1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, HEADS * HEAD))


class Rotary(Unfused):
    """Positions turn queries and keys, so that no other basis would do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.arange(6)[:, None] * torch.rand(HEAD))

    def turn(self, x):
        first, second = x.chunk(2, -1)
        return x * self.angles.cos() + torch.cat([-second, first], -1) * self.angles.sin()


class FusedKeysAndValues(_Block):
    """As pyramid vision transformers write it: a layer for queries, another one for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(DIM, HEADS * HEAD), nn.Linear(DIM, 2 * HEADS * HEAD)
        self.proj = nn.Linear(HEADS * HEAD, DIM)

    def attend(self, x):
        b, n, _ = x.shape
        q = self.q(x).reshape(b, n, HEADS, HEAD).permute(0, 2, 1, 3)
        k, v = self.kv(x).reshape(b, n, 2, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1) * HEAD**-0.5).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, HEADS * HEAD))


class Grouped(_Block):
    """Two heads of queries for each of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.proj = nn.Linear(DIM, 2 * HEADS * HEAD), nn.Linear(2 * HEADS * HEAD, DIM)
        self.k, self.v = nn.Linear(DIM, HEADS * HEAD), nn.Linear(DIM, HEADS * HEAD)

    def attend(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 2 * HEADS, HEAD).transpose(1, 2)
        k, v = (layer(x).view(b, n, HEADS, HEAD).transpose(1, 2) for layer in (self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))


class Multihead(_Block):
    """torch's own module."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
        nn.init.normal_(self.attention.in_proj_bias)

    def attend(self, x):
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        x = self.attention(x, x, x, need_weights=False)[0]
        return x if self.attention.batch_first else x.transpose(0, 1)


class Transformer(Fused):
    """Attention, then a gated block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 40), nn.Linear(40, DIM)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.attend(F.layer_norm(x, (DIM,)))
        x = x + self.down(F.gelu(self.up(F.layer_norm(x, (DIM,)))))
        return self.head(x.mean(1))


def branch(inputs: int, outputs: int, size: int) -> nn.Sequential:
    """A convolution, and behind it a normalisation that cannot be folded into it."""
    norm = nn.BatchNorm2d(outputs)
    for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(value, 0.5, 1.5)
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=size // 2), nn.ReLU(), norm)


class Joined(nn.Module):
    """Branches of different sizes, whose features are concatenated, as in SqueezeNet and Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = branch(3, 8, 1)
        self.one, self.three = branch(8, 10, 1), branch(8, 14, 3)
        self.wide, self.last = nn.Conv2d(24, 10, 3), nn.Conv2d(24, 10, 1)

    def forward(self, x):
        x = self.squeeze(x)
        x = torch.cat([self.one(x), self.three(x)], 1)
        return self.wide(F.max_pool2d(x, 2)).mean((2, 3)) + self.last(x).mean((2, 3))


class Skip(nn.Module):
    """Features that are read twice, alone and with others, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = branch(3, 12, 3), branch(12, 16, 3)
        self.up, self.last = nn.Conv2d(16, 10, 1), nn.Conv2d(22, 10, 3)

    def forward(self, x):
        x = self.down(x)
        return self.last(torch.cat([F.relu(self.up(self.middle(x))), x], dim=1)).mean((2, 3))


class Aggregated(nn.Module):
    """Layers that read some features and output others of the same set, as in VoVNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = branch(3, 8, 3), branch(8, 10, 3), branch(10, 12, 3)
        self.last = nn.Conv2d(30, 10, 1)

    def forward(self, x):
        first = self.first(x)
        second = self.second(first)
        return self.last(torch.cat([first, second, self.third(second)], 1)).mean((2, 3))


class Chain(nn.Module):
    """Layers whose widths are chosen together."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (12, 16, 24, 16, 10)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        return self.layers[-1](x)


class Normalised(nn.Module):
    """Groups of features are normalised, by a module and by a function (Wu & He 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 32, 3), nn.GroupNorm(8, 32)
        self.second, self.head = nn.Conv2d(32, 24, 3), nn.Linear(24, 10)
        self.gain, self.offset = nn.Parameter(torch.linspace(0.5, 2, 24)), nn.Parameter(torch.linspace(-1, 1, 24))

    def forward(self, x):
        x = self.second(F.silu(self.norm(self.first(x))))
        return self.head(F.relu(F.group_norm(x, 4, self.gain, self.offset)).mean((2, 3)))


class GroupedConvs(nn.Module):
    """The middle layer of a bottleneck has groups (Xie et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32)
        self.middle, self.last = nn.Conv2d(32, 32, 3, padding=1, groups=8), nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.last(F.relu(self.middle(F.relu(self.norm(self.first(x))))))
        return self.head(x.relu().mean((2, 3)))


IMAGES, ROWS, TOKENS = (3, 7, 7), (12,), (6, 32)
CHANNELS = {
    "mlp": (Mlp, ROWS),
    "gated mlp": (GatedMlp, ROWS),
    "scaled mlp": (ScaledMlp, ROWS),
    "convs": (Convs, IMAGES),
    "transposed": (Transposed, IMAGES),
    "inverted residual": (InvertedResidual, IMAGES),
    "squeeze and excite": (SqueezeExcite, IMAGES),
    "pooled": (Pooled, IMAGES),
    "joined": (Joined, IMAGES),
    "skip": (Skip, IMAGES),
    "aggregated": (Aggregated, IMAGES),
    "chain": (Chain, ROWS),
    "normalised": (Normalised, IMAGES),
    "grouped convs": (GroupedConvs, IMAGES),
}
ATTENTIONS = {
    "fused": (Fused, TOKENS),
    "unfused": (Unfused, TOKENS),
    "fused keys and values": (FusedKeysAndValues, TOKENS),
    "grouped": (Grouped, TOKENS),
    "multihead": (Multihead, TOKENS),
    "multihead, sequence first": (lambda: Multihead(False), TOKENS),
}
EVERYTHING = {**CHANNELS, **ATTENTIONS, "transformer": (Transformer, TOKENS)}


def make(name: str, dtype: torch.dtype = torch.float32, count: int = 2) -> tuple[nn.Module, list[torch.Tensor]]:
    """A model and batches for it."""
    build, shape = {**EVERYTHING, "rotary": (Rotary, TOKENS), "fused norm": (FusedNorm, TOKENS)}[name]
    model = build().to(dtype).eval().requires_grad_(False)
    return model, list(torch.randn(count, 48, *shape, dtype=dtype))


def widths(model: nn.Module, x: torch.Tensor, capture: str = "auto", **options: Any) -> dict[str, Width]:
    """The widths that are found, by their names."""
    prepared = balf_fx.prepare(model, x, factors="sensitivity", capture=capture, **options)
    return {width.name: width for width in graph_record(prepared).widths}


def scored(
    model: nn.Module, batches: list[torch.Tensor], capture: str = "auto", centred: bool = True
) -> fx.GraphModule:
    """A calibrated graph with scores for its ranks and widths."""
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity", capture=capture)
    balf_fx.calibrate(prepared, batches, progress=False)
    Score("sensitivity", centred)(prepared)
    ScoreWidths()(prepared)
    return prepared


def rewritten(
    prepared: fx.GraphModule, sizes: Mapping[str, int], ranks: Mapping[str, balf_fx.graph.curves.Rank] | None = None
) -> fx.GraphModule:
    """The graph with widths of these sizes, by their keys, and otherwise dense."""
    graph_module = copy.deepcopy(prepared)
    Allocate(ranks=ranks or {})(graph_module)
    allocation = graph_record(graph_module).allocation
    assert allocation is not None
    record_graph(graph_module, allocation=dataclasses.replace(allocation, sizes=dict(sizes)))
    remove_observers(graph_module)
    Narrow()(graph_module)
    Factorize()(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module.requires_grad_(False)


def count_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
