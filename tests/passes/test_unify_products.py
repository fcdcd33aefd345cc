import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.graph.annotation import graph_record
from balf_fx.graph.operators import operation

EQUATIONS = {  # of values [2, 3, 4, 5] and [2, 3, 4, 6], or of two axes less, with other letters in other places
    "queries and keys": ("bhid,bhjd->bhij", (2, 3, 4, 5), (2, 3, 6, 5)),
    "heads last": ("bihd,bjhd->bhij", (2, 4, 3, 5), (2, 6, 3, 5)),
    "weights and values": ("bhij,bjhd->bihd", (2, 3, 4, 6), (2, 6, 3, 5)),
    "values first": ("bjhd,bhij->bihd", (2, 6, 3, 5), (2, 3, 4, 6)),
    "keys first": ("bihd,bjhd->bhji", (2, 4, 3, 5), (2, 6, 3, 5)),
    "an ellipsis": ("...id,...jd->...ij", (2, 3, 4, 5), (2, 3, 6, 5)),
    "an ellipsis and others": ("...ihd,...jhd->...hij", (2, 4, 3, 5), (2, 6, 3, 5)),
    "matrices": ("ij,jk->ik", (4, 5), (5, 6)),
    "spaces": ("b i d, b d j -> b i j", (2, 4, 5), (2, 5, 6)),
    "an axis of size 1": ("bid,bjd->bij", (1, 4, 5), (2, 6, 5)),
}
OTHERS = {
    "no sum": ("bi,bj->bij", (2, 4), (2, 5)),
    "two sums": ("bijd,bijd->b", (2, 3, 4, 5), (2, 3, 4, 5)),
    "a sum of one value": ("bid,bjd->bj", (2, 4, 5), (2, 6, 5)),
    "an elementwise product": ("bid,bid->bi", (2, 4, 5), (2, 4, 5)),
    "two axes of one value": ("bghid,bhjd->bghij", (2, 3, 3, 4, 5), (2, 3, 6, 5)),
    "a diagonal": ("bii,bij->bij", (2, 4, 4), (2, 4, 5)),
    "a broadcast sum": ("bid,bjd->bij", (2, 4, 1), (2, 6, 5)),
    "an implicit result": ("bid,bdj", (2, 4, 5), (2, 5, 6)),
    "an ellipsis on one side": ("...id,jd->...ij", (2, 3, 4, 5), (6, 5)),
}


class Product(nn.Module):
    """A layer, so that there is a site, and an einsum of two values."""

    def __init__(self, equation):
        super().__init__()
        self.layer, self.equation = nn.Linear(16, 16), equation

    def forward(self, x, first, second):
        return self.layer(x), torch.einsum(self.equation, first, second)


class Attention(nn.Module):
    """One block of attention around a function of queries, keys and values [N, L, H, D]."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.attend = attend

    def forward(self, x):
        heads = [layer(x).unflatten(-1, (4, 8)) for layer in (self.q, self.k, self.v)]
        return self.out(self.attend(*heads).flatten(-2))


def usual(q, k, v):
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def with_keywords(q, k, v):
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(value=v, query=q, key=k, is_causal=False).transpose(1, 2)


def with_einsum(q, k, v):
    weights = torch.einsum("bihd,bjhd->bhij", q / math.sqrt(8), k).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def prepared(equation, first, second, capture):
    example = (torch.randn(2, 16), torch.randn(first), torch.randn(second))
    model = Product(equation).eval()
    return balf_fx.prepare(model, example, capture=capture), model, example


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", EQUATIONS)
def test_an_einsum_of_two_values_becomes_a_product(name, capture):
    graph_module, model, example = prepared(*EQUATIONS[name], capture)
    assert "einsum" not in {operation(node) for node in graph_module.graph.nodes}
    torch.testing.assert_close(graph_module(*example), model(*example))


@pytest.mark.parametrize("name", OTHERS)
def test_other_einsums_stay(name):
    graph_module, model, example = prepared(*OTHERS[name], "symbolic_trace")
    assert "einsum" in {operation(node) for node in graph_module.graph.nodes}
    torch.testing.assert_close(graph_module(*example), model(*example))


@pytest.mark.parametrize("attend", [with_keywords, with_einsum])
def test_attention_in_other_writings_has_the_same_heads(attend):
    data = [torch.randn(32, 6, 32, generator=torch.Generator().manual_seed(0))]
    models = [Attention(each).eval() for each in (usual, attend)]
    records = [graph_record(balf_fx.prepare(model, data[0], factors="sensitivity")) for model in models]
    found = [[(width.kind, width.heads, width.layer_names) for width in record.widths] for record in records]
    assert found[1] == found[0]
    assert {kind for kind, *_ in found[0]} == {"queries", "values"}
    first, second = (balf_fx.compile(each, data, flops=0.6, effort="balanced", progress=False) for each in models)
    assert any(width.is_narrower for width in balf_fx.plan(second).widths)
    torch.testing.assert_close(second(data[0]), first(data[0]), rtol=1e-3, atol=1e-4)


def test_the_backend_has_the_heads_of_attention_in_other_writings():
    x = torch.randn(32, 6, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for attend in (usual, with_keywords, with_einsum):
        options = {"flops": 0.6, "effort": "balanced", "calibration_steps": 1, "inner": "eager"}
        small = torch.compile(Attention(attend).eval(), backend="balf", options=options)
        with torch.no_grad():
            small(x), small(x)
        found.append(sorted((width.kind, width.size) for width in balf_fx.plan(small).widths))
    assert found[0]
    assert found[1] == found[0]
    assert found[2] == found[0]
