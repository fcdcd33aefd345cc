"""Models and shorthands for the tests of the backend; "eager" as the inner backend, so that only Dynamo takes time."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.backend import balf

STEPS = 3
WIDTH = 24


def options(**changes):
    """Of torch.compile; with the least effort, which is fast and has no widths."""
    return {"flops": 0.5, "effort": "fast", "calibration_steps": STEPS, "inner": "eager", "progress": False, **changes}


def make_offline(model, batches, **changes):
    """What balf_fx.compile makes of the model with the same options."""
    given = {"flops": 0.5, "effort": "fast", "progress": False, **changes}
    return balf_fx.compile(model, batches, **given)


def compiled(model, dynamic=None, fullgraph=False, **changes):
    return torch.compile(model, backend=balf, dynamic=dynamic, fullgraph=fullgraph, options=options(**changes))


def calibrated(model, batches, **changes):
    """Compiled, and called once for each of STEPS batches."""
    small = compiled(model, **changes)
    with torch.no_grad():
        for batch in batches[:STEPS]:
            small(batch)
    return small


def run(small, *batches):
    with torch.no_grad():
        return [small(batch) for batch in batches][-1]


def messages(caplog):
    """What the backend has logged, without what Dynamo traces in between."""
    return [record.getMessage() for record in caplog.records if record.name == "balf_fx.backend"]


def ranks(report):
    return {row.name: row.rank for row in report.sites}


class Attention(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.attention = Attention(width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, width=32, depth=2):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 48)

    def forward(self, x):
        return self.head(self.blocks(x))


class Broken(nn.Module):
    """Two graphs, with a break between them."""

    def __init__(self, width=32):
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x):
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)


class Looped(nn.Module):
    """Layers with a break inside: Dynamo runs all of them through the same graphs."""

    def __init__(self, width=32, depth=3):
        super().__init__()
        self.layers = nn.ModuleList([Broken(width) for _ in range(depth)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class Mlps(nn.Module):
    """Two residual blocks with features between their layers, and a break between the blocks or none."""

    def __init__(self, broken=True):
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(2)
        )
        self.broken = broken

    def forward(self, x):
        x = x + self.first(x)
        if self.broken:
            torch._dynamo.graph_break()
        return x + self.second(x)


def rows(count=STEPS + 1, samples=64):
    """Batches of correlated features, so that low ranks do well."""
    mixed = torch.randn(WIDTH, WIDTH, dtype=torch.float64) * torch.logspace(0, -1, WIDTH, dtype=torch.float64)[:, None]
    return [torch.randn(samples, WIDTH, dtype=torch.float64) @ mixed for _ in range(count)]
