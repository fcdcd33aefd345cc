"""FLOPs against closed formulas, since counts compared with one another may all be wrong."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.graph.annotation import graph_record
from balf_fx.graph.flops import count_flops

B, HEADS, QUERIES, KEYS, SIZE, OUT = 2, 3, 5, 7, 8, 6


def attend(q, k, v):
    return (q @ k.mT * SIZE**-0.5).softmax(-1) @ v


class Attention(nn.Module):
    """A kernel between layers, or the products that it stands for."""

    def __init__(self, kernel: bool) -> None:
        super().__init__()
        self.kernel = kernel
        self.q, self.k, self.v = (nn.Linear(16, HEADS * size) for size in (SIZE, SIZE, OUT))
        self.last = nn.Linear(HEADS * OUT, 16)

    def forward(self, x, y):
        q, k, v = (value.unflatten(-1, (HEADS, -1)).transpose(1, 2) for value in (self.q(x), self.k(y), self.v(y)))
        kernel = F.scaled_dot_product_attention if self.kernel else attend
        mixed = kernel(q, k, v)
        return self.last(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("kernel", [True, False])
def test_attention_is_counted_as_its_two_products(kernel, capture):
    model = Attention(kernel).eval()
    batch = torch.randn(B, QUERIES, 16), torch.randn(B, KEYS, 16)
    products = 2 * B * HEADS * QUERIES * KEYS * (SIZE + OUT)
    layers = 2 * B * 16 * HEADS * (QUERIES * SIZE + KEYS * (SIZE + OUT) + QUERIES * OUT)
    assert count_flops(model, *batch) == products + layers
    prepared = balf_fx.prepare(model, batch, capture=capture)
    assert graph_record(prepared).flops == products + layers


@pytest.mark.parametrize("fast_path", [True, False])
def test_attention_of_torch_modules_is_counted(fast_path):
    model = nn.MultiheadAttention(16, 4, batch_first=True).eval().requires_grad_(not fast_path)
    x = torch.randn(B, QUERIES, 16)
    products, layers = 2 * B * QUERIES * QUERIES * 2 * 16, 2 * B * QUERIES * 4 * 16 * 16
    prepared = balf_fx.prepare(model, (x, x, x), forward=lambda model, batch: model(*batch, need_weights=False))
    assert graph_record(prepared).flops == products + layers


def test_convolutions_and_layers_by_hand():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    x = torch.randn(3, 4, 6, 6)
    expected = 2 * 3 * 16 * 8 * (2 * 9) + 2 * 3 * 128 * 5
    assert count_flops(model, x) == graph_record(balf_fx.prepare(model, x)).flops == expected
