"""Fused projections: the pieces are those that the graph reads apart."""

import pytest
import torch
from torch import nn

from balf_fx.capture.normal_form import capture
from balf_fx.graph.annotation import sites
from balf_fx.passes import Annotate


class Fused(nn.Module):
    def __init__(self, split):
        super().__init__()
        self.layer, self.split = nn.Linear(16, 48), split

    def forward(self, x):
        return self.split(self.layer(x))


def parts(model, *inputs, method="auto"):
    graph_module = capture(model.eval(), inputs, method=method)
    Annotate()(graph_module)
    return {site.name: site.parts for site in sites(graph_module)}


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (lambda y: torch.cat(y.chunk(3, -1)), 3),
        (lambda y: torch.cat(y.split(24, -1)), 2),
        (lambda y: torch.cat(y.reshape(-1, 48).reshape(5, 4, 48).split(16, -1)), 3),
        (lambda y: torch.cat(y.reshape(-1, 96).split(32, -1)), 1),
        (lambda y: sum(y.unflatten(-1, (3, 4, 4)).unbind(-3)), 3),
        (lambda y: torch.stack([each + 1 for each in y.unflatten(-1, (3, 16)).transpose(0, 2)[0:3:2]]), 1),
        (lambda y: y.unflatten(-1, (3, 16)), 1),  # three heads
        (lambda y: y.unflatten(-1, (3, 16)).transpose(0, 2).select(0, 1), 1),
        (lambda y: y.unflatten(-1, (4, 12)).transpose(0, 2).select(0, 1), 1),
    ],
)
def test_pieces_of_an_output(split, expected):
    assert parts(Fused(split), torch.randn(4, 5, 16), method="export") == {"layer": expected}


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = nn.MultiheadAttention(16, 2, **options)

    def forward(self, x):
        return self.layer(x, x, x)[0]


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize("samples_first", [False, True])
def test_torch_multi_head_attention_has_three(method, samples_first):
    model = Attention(batch_first=samples_first)
    found = parts(model, torch.randn(4, 5, 16), method=method)
    assert found["layer.in_proj_weight" if method == "export" else next(iter(found))] == 3
