"""The ways in which models write gated blocks and attention, small, for the tests of widths."""

from __future__ import annotations

from collections.abc import Callable

import torch
from architectures import DIM, HEAD, HEADS, Rotary, Unfused, _Block
from torch import fx, nn
from torch.nn import functional as F

from balf_fx.graph.annotation import graph_record, record_graph
from balf_fx.graph.layers import read_layer
from balf_fx.graph.parameters import get_tensor
from balf_fx.graph.widths import Width, WidthCurve

HIDDEN, QUERIES = 16, 2 * HEADS


class Gated(nn.Module):
    """One layer for a gate and what it scales."""

    def __init__(self, gate: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(12, 2 * HIDDEN), nn.Linear(HIDDEN, 10)
        self.gate = gate

    def forward(self, x):
        return self.down(self.gate(self.gate_up(x)))


class SplitBias(Gated):
    """The bias of both halves is another parameter, and both are bounded before they part."""

    def __init__(self) -> None:
        super().__init__(lambda x: F.silu(x[..., ::2]) * x[..., 1::2])
        self.bias = nn.Parameter(torch.randn(2 * HIDDEN))

    def forward(self, x):
        return self.down(self.gate((self.gate_up(x) + self.bias).clamp(-2, 2)))


class SimpleGate(nn.Module):
    """As in networks that restore images: a depthwise convolution before the two halves are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 2 * HIDDEN, 1), nn.Conv2d(HIDDEN, 10, 1)
        self.middle = nn.Conv2d(2 * HIDDEN, 2 * HIDDEN, 3, padding=1, groups=2 * HIDDEN)

    def forward(self, x):
        a, b = self.middle(self.first(x)).chunk(2, dim=1)
        return self.last(a * b).mean((2, 3))


class MixedFeedForward(nn.Module):
    """As in SegFormer: tokens become an image for a depthwise convolution, and tokens again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, HIDDEN), nn.Linear(HIDDEN, 10)
        self.middle = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)

    def forward(self, x):
        b, n, _ = x.shape
        x = self.middle(self.up(x).transpose(1, 2).reshape(b, HIDDEN, n // 2, 2)).flatten(2).transpose(1, 2)
        return self.down(F.gelu(x)).mean(1)


class Conv1D(nn.Module):
    """As GPT-2 writes its layers: the weight [in, out], and all positions of all samples in one axis."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 5), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        shape = x.size()[:-1] + (self.outputs,)  # noqa: RUF005 (a proxy cannot be unpacked)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


class Conv1DMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(32, HIDDEN), Conv1D(HIDDEN, 10)

    def forward(self, x):
        return self.down(F.gelu(self.up(x))).mean(1)


class Conv1DAttention(_Block):
    """As GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(DIM, 3 * HEADS * HEAD), Conv1D(HEADS * HEAD, DIM)

    def attend(self, x):
        shape = x.size()[:-1] + (-1, HEAD)  # noqa: RUF005
        q, k, v = torch.split(self.c_attn(x), HEADS * HEAD, 2)
        q, k, v = (part.view(shape).transpose(1, 2) for part in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.c_proj(x.reshape(x.size()[:-2] + (-1,)).contiguous())  # noqa: RUF005


class GroupedQueries(_Block):
    """Two heads of queries for each head of keys and values."""

    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.proj = nn.Linear(DIM, QUERIES * HEAD), nn.Linear(QUERIES * HEAD, DIM)
        self.k, self.v = nn.Linear(DIM, heads * HEAD), nn.Linear(DIM, heads * HEAD)

    def repeat(self, x):
        return x.repeat_interleave(QUERIES // self.heads, 1)

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v))

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, -1, HEAD).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(self.mix(q, k, v).transpose(1, 2).reshape(b, n, QUERIES * HEAD))


class Expanded(GroupedQueries):
    """As transformers repeats keys and values."""

    def repeat(self, x):
        b, heads, n, d = x.shape
        x = x[:, :, None, :, :].expand(b, heads, QUERIES // self.heads, n, d)
        return x.reshape(b, QUERIES, n, d)


class Eager(Expanded):
    """By products, with the scores scaled."""

    def mix(self, q, k, v):
        scores = torch.matmul(q, self.repeat(k).transpose(2, 3)) * HEAD**-0.5
        return torch.matmul(scores.softmax(-1), self.repeat(v))


class EnableGqa(GroupedQueries):
    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Broadcast(GroupedQueries):
    """A single head of keys and values, which products broadcast."""

    def __init__(self) -> None:
        super().__init__(1)

    def mix(self, q, k, v):
        return (q @ k.transpose(-2, -1) * HEAD**-0.5).softmax(-1) @ v


class RelativeBias(Unfused):
    """As T5: a bias is added to the scores, which are not scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, HEADS, 6, 6))

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, HEADS, HEAD).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(3, 2) + self.table).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))


class Merged(Unfused):
    """As Bloom: the batch and the heads are one axis, and the scores are added to a bias in one call."""

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, HEADS, HEAD).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k, v = (part.reshape(b * HEADS, n, HEAD) for part in (q, k, v))
        scores = torch.baddbmm(x.new_zeros(b * HEADS, 1, n), q, k.transpose(1, 2), beta=1.0, alpha=HEAD**-0.5)
        x = torch.bmm(scores.softmax(-1), v).view(b, HEADS, n, HEAD)
        return self.proj(x.permute(0, 2, 1, 3).reshape(b, n, HEADS * HEAD))


class _FusedRotary(Rotary):
    """One layer for queries, keys and values, of which positions turn the first two."""

    def __init__(self, queries: int = HEADS) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.queries, self.qkv = queries, nn.Linear(DIM, (queries + 2 * HEADS) * HEAD)
        self.proj = nn.Linear(queries * HEAD, DIM)

    def parts(self, qkv, b, n):
        raise NotImplementedError

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = self.parts(self.qkv(x), b, n)
        k, v = (part.repeat_interleave(self.queries // HEADS, 1) for part in (self.turn(k), v))
        x = F.scaled_dot_product_attention(self.turn(q), k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))


class Unbound(_FusedRotary):
    """As ModernBERT."""

    def parts(self, qkv, b, n):
        q, k, v = qkv.view(b, n, 3, HEADS, HEAD).unbind(-3)
        return tuple(part.transpose(1, 2) for part in (q, k, v))


class HeadByHead(_FusedRotary):
    """As GPT-NeoX: queries, keys and values of the first head, then of the next."""

    def parts(self, qkv, b, n):
        q, k, v = qkv.view(b, n, HEADS, 3 * HEAD).transpose(1, 2).chunk(3, -1)
        return q, k, v


class UnlikeParts(_FusedRotary):
    """As Phi-3: more queries than keys and values, in slices."""

    def __init__(self) -> None:
        super().__init__(QUERIES)

    def parts(self, qkv, b, n):
        ends = QUERIES * HEAD, (QUERIES + HEADS) * HEAD
        parts = qkv[..., : ends[0]], qkv[..., ends[0] : ends[1]], qkv[..., ends[1] :]
        return tuple(part.view(b, n, -1, HEAD).transpose(1, 2) for part in parts)


class GroupByGroup(_FusedRotary):
    """As Falcon: for each head of keys and values its queries, then itself."""

    def __init__(self) -> None:
        super().__init__(QUERIES)

    def parts(self, qkv, b, n):
        x = qkv.view(b, n, HEADS, QUERIES // HEADS + 2, HEAD)
        q, k, v = x[:, :, :, :-2].flatten(2, 3), x[:, :, :, [-2]].flatten(2, 3), x[:, :, :, [-1]].flatten(2, 3)
        return tuple(part.transpose(1, 2) for part in (q, k, v))


class Parallel(Rotary):
    """As PaLM: one layer for queries, keys, values and a gated block beside them."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.sizes = [HEADS * HEAD] * 3 + [2 * HIDDEN]
        self.inner, self.down = nn.Linear(DIM, sum(self.sizes)), nn.Linear(HIDDEN, DIM)

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v, hidden = self.inner(x).split(self.sizes, dim=-1)
        q, k, v = (part.view(b, n, HEADS, HEAD).transpose(1, 2) for part in (q, k, v))
        x = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v).transpose(1, 2).reshape(b, n, -1)
        gate, up = hidden.chunk(2, -1)
        return self.proj(x) + self.down(F.silu(gate) * up)


def _gate(write: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> Callable[[], nn.Module]:
    def gate(x):
        first, second = write(x)
        return F.silu(first) * second

    return lambda: Gated(gate)


ROW, SEQUENCE, IMAGE = (12,), (6, 32), (3, 7, 7)
GATED = {
    "chunk": (_gate(lambda x: x.chunk(2, -1)), ROW),
    "split": (_gate(lambda x: x.split(HIDDEN, dim=-1)), ROW),
    "slices": (_gate(lambda x: (x[..., :HIDDEN], x[..., HIDDEN:])), ROW),
    "the gate last": (_gate(lambda x: (x[..., HIDDEN:], x[..., :HIDDEN])), ROW),
    "interleaved": (_gate(lambda x: (x[..., ::2], x[..., 1::2])), ROW),
    "unbind": (_gate(lambda x: x.unflatten(-1, (2, HIDDEN)).unbind(-2)), ROW),
    "pairs": (_gate(lambda x: x.unflatten(-1, (HIDDEN, 2)).unbind(-1)), ROW),
    "narrow": (_gate(lambda x: (x.narrow(-1, 0, HIDDEN), x.narrow(-1, HIDDEN, HIDDEN))), ROW),
    "GLU": (lambda: Gated(nn.GLU()), ROW),
    "F.glu": (lambda: Gated(F.glu), ROW),
    "bias apart": (SplitBias, ROW),
    "simple gate": (SimpleGate, IMAGE),
}
RESHAPED = {"tokens and images": (MixedFeedForward, SEQUENCE), "Conv1D": (Conv1DMlp, SEQUENCE)}
"""Blocks in which the hidden features are one axis of values of several shapes."""

QUERIES_AND_VALUES = {
    "repeated": (GroupedQueries, SEQUENCE),
    "expanded": (Expanded, SEQUENCE),
    "eager": (Eager, SEQUENCE),
    "enable_gqa": (EnableGqa, SEQUENCE),
    "one head, repeated": (lambda: Expanded(1), SEQUENCE),
    "one head, broadcast": (Broadcast, SEQUENCE),
    "relative bias": (RelativeBias, SEQUENCE),
    "merged": (Merged, SEQUENCE),
    "Conv1D attention": (Conv1DAttention, SEQUENCE),
}
VALUES = {
    "unbound": (Unbound, SEQUENCE),
    "head by head": (HeadByHead, SEQUENCE),
    "unlike parts": (UnlikeParts, SEQUENCE),
    "group by group": (GroupByGroup, SEQUENCE),
}
"""Fused projections whose queries and keys cannot be narrowed."""

PARALLEL = {"parallel": (Parallel, SEQUENCE)}
FAMILIES = {**GATED, **RESHAPED, **QUERIES_AND_VALUES, **VALUES, **PARALLEL}


def make_redundant(graph_module: fx.GraphModule, share: float = 0.5) -> dict[str, int]:
    """Change weights so that every width of a graph has features that may go, and give it the curve that says so.

    Of channels, the last ones repeat the first; features of heads lie in a random subspace. What is removed is then
    exactly what the rest determines.

    Returns:
        The size that each width may have.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    curves, sizes = [], {}
    for width in graph_record(graph_module).widths:
        size = sizes[width.key] = max(round(share * width.features), 1)
        curve = _repeating(width, size) if width.kind == "channels" else _in_subspace(width)
        for name, rows in zip(width.producers[: 1 if width.kind == "queries" else None], width.rows, strict=False):
            layer = read_layer(graph_module, nodes[name])
            for path in filter(None, (layer.weight, layer.bias)):
                value = get_tensor(graph_module, path).data
                value = value.mT if layer.inputs_first and path == layer.weight else value
                _reduce(value, width, torch.tensor(rows), size, curve)
        for name in (*width.between, *width.fused):
            _reduce_between(graph_module, nodes[name], width, size)
        curves.append(curve)
    record_graph(graph_module, width_curves=tuple(curves))
    return sizes


def _repeating(width: Width, size: int) -> WidthCurve:
    which = torch.arange(width.features) % size
    covariance = (which[:, None] == which).double()
    return WidthCurve(
        (0.0,) * (width.features + 1),
        0.0,
        order=torch.arange(width.features),
        covariances=(covariance,) * len(width.consumers),
    )


def _in_subspace(width: Width) -> WidthCurve:
    basis = torch.linalg.qr(torch.randn(width.heads, width.features, width.features, dtype=torch.float64))[0]
    return WidthCurve((0.0,) * (width.features + 1), 0.0, left=basis, right=basis.mT.contiguous())


def _reduce(value: torch.Tensor, width: Width, rows: torch.Tensor, size: int, curve: WidthCurve) -> None:
    if curve.left is None:
        value[rows] = value[rows[torch.arange(width.features) % size]]
        return
    own = rows.view(width.heads, -1, width.features)  # for queries, all heads that share one of keys
    projection = curve.left[..., :size] @ curve.left[..., :size].mT
    value[own] = torch.einsum("hfg,hng...->hnf...", projection.to(value), value[own])


def _reduce_between(graph_module: fx.GraphModule, node: fx.Node, width: Width, size: int) -> None:
    if node.op == "get_attr":
        values = [get_tensor(graph_module, str(node.target)).data]
    else:
        layer = read_layer(graph_module, node)
        values = [get_tensor(graph_module, path).data for path in filter(None, (layer.weight, layer.bias))]
    fused = node.name in width.fused
    parts = dict.fromkeys(width.rows) if fused else [tuple(range(width.features))]
    for value in values:
        axis = list(value.shape).index(sum(map(len, parts)))
        for rows in parts:
            _reduce(value.movedim(axis, 0), width, torch.tensor(rows), size, WidthCurve((), 0.0))
