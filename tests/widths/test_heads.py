import pytest
import torch
from architectures import DIM, HEAD, HEADS, TOKENS, Fused, Grouped, Unfused, make, widths
from torch import nn
from torch.nn import functional as F

from balf_fx.graph.widths import Operand

X = torch.randn(4, *TOKENS)
BOTH = pytest.mark.parametrize("capture", ["symbolic_trace", "export"])


def rows(start, count=HEADS * HEAD):
    return tuple(range(start, start + count))


@BOTH
def test_fused(capture):
    model, batches = make("fused")
    found = widths(model, batches[0], capture)
    assert set(found) == {"qkv:queries", "proj"}
    queries, values = found["qkv:queries"], found["proj"]
    assert (queries.kind, values.kind) == ("queries", "values")
    assert queries.rows == (rows(0), rows(24))
    assert values.rows == (rows(48),)
    assert len(set(queries.producers)) == 1
    assert queries.producers[0] == values.producers[0]
    for width in found.values():
        assert (width.heads, width.repeat, width.features, width.sequence_first) == (HEADS, 1, HEAD, False)
    assert queries.operands == (Operand(0), Operand(1))
    assert values.operands == (Operand(2),)
    assert queries.consumers == ()
    assert len(values.consumers) == 1


@BOTH
@pytest.mark.parametrize("fold", [True, False])
def test_unfused(capture, fold):
    """The scale of the queries is folded into their layer, or belongs to the product."""
    model, batches = make("unfused")
    found = widths(model, batches[0], capture, fold_batchnorm=fold)
    assert set(found) == {"q:queries", "proj"}
    queries, values = found["q:queries"], found["proj"]
    assert queries.rows == (rows(0), rows(0))
    assert queries.operands == (Operand(0, 1.0 if fold else HEAD**-0.5), Operand(1, transposed=True))
    assert values.operands == (Operand(1),)
    assert queries.product != values.product


@BOTH
def test_grouped_queries(capture):
    model, batches = make("grouped")
    found = widths(model, batches[0], capture)
    queries, values = found["q:queries"], found["proj"]
    for width in (queries, values):
        assert (width.heads, width.repeat, width.features) == (HEADS, 2, HEAD)
    assert queries.rows == (rows(0, 48), rows(0))
    assert values.rows == (rows(0),)
    assert queries.operands == (Operand(0), Operand(1, copies=2))
    assert values.operands == (Operand(2, copies=2),)


@pytest.mark.parametrize("name", ["multihead", "multihead, sequence first"])
def test_multihead_attention(name):
    model, batches = make(name)
    found = widths(model, batches[0])
    assert set(found) == {"attention.in_proj:queries", "attention.out_proj"}
    for width in found.values():
        assert width.sequence_first == ("first" in name)
        assert (width.heads, width.repeat, width.features) == (HEADS, 1, HEAD)
    assert found["attention.in_proj:queries"].rows == (rows(0), rows(24))
    assert found["attention.out_proj"].rows == (rows(48),)


@BOTH
def test_rotated_queries_stay(capture):
    model, batches = make("rotary")
    assert set(widths(model, batches[0], capture)) == {"proj"}


@BOTH
def test_normed_queries_of_a_fused_layer_stay(capture):
    model, batches = make("fused norm")
    assert set(widths(model, batches[0], capture)) == {"proj"}


def test_normed_queries_of_a_layer_of_their_own_stay_alone():
    class Net(Unfused):
        def turn(self, x):
            return F.layer_norm(x, (HEAD,))

    assert set(widths(Net().eval(), X)) == {"proj"}


def test_interleaved_rows_are_found_where_they_are():
    class Net(Fused):
        """[heads, queries keys values, features], as GPT-NeoX has it."""

        def attend(self, x):
            b, n, _ = x.shape
            q, k, v = self.qkv(x).view(b, n, HEADS, 3, HEAD).permute(3, 0, 2, 1, 4).unbind(0)
            x = F.scaled_dot_product_attention(q, k, v)
            return self.proj(x.transpose(1, 2).reshape(b, n, HEADS * HEAD))

    found = widths(Net().eval(), X)
    assert found["qkv:queries"].rows == (rows(0, 12) + rows(36, 12), rows(12, 12) + rows(48, 12))
    assert found["proj"].rows == (rows(24, 12) + rows(60, 12),)


@pytest.mark.parametrize("split", ["chunk", "split", "index"])
def test_ways_to_take_a_fused_layer_apart(split):
    class Net(Fused):
        def attend(self, x):
            b, n, _ = x.shape
            packed = self.qkv(x)
            if split == "chunk":
                parts = packed.chunk(3, -1)
            elif split == "split":
                parts = packed.split(HEADS * HEAD, -1)
            else:
                parts = packed.unflatten(-1, (3, -1)).movedim(-2, 0)
            q, k, v = (parts[i].view(b, n, HEADS, HEAD).transpose(1, 2) for i in range(3))
            x = F.scaled_dot_product_attention(q, k, v)
            return self.proj(x.transpose(1, 2).flatten(2))

    found = widths(Net().eval(), X)
    assert set(found) == {"qkv:queries", "proj"}
    assert found["qkv:queries"].rows == (rows(0), rows(24))


def test_a_layer_of_which_something_is_read_elsewhere_stays():
    class Net(Fused):
        def attend(self, x):
            return super().attend(x) + self.qkv(x)[..., :DIM]

    assert widths(Net().eval(), X) == {}


def test_keys_that_something_else_reads_stay():
    class Net(Unfused):
        def attend(self, x):
            return super().attend(x) + self.k(x)[..., :DIM]

    assert set(widths(Net().eval(), X)) == {"proj"}


def test_an_output_that_something_else_reads_stays():
    class Net(Unfused):
        def attend(self, x):
            b, n, _ = x.shape
            q, k, v = (layer(x).view(b, n, HEADS, HEAD).transpose(1, 2) for layer in (self.q, self.k, self.v))
            merged = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, HEADS * HEAD)
            return self.proj(merged) + merged[..., :DIM]

    assert set(widths(Net().eval(), X)) == {"q:queries"}


def test_heads_read_in_another_order_stay():
    class Net(Unfused):
        def attend(self, x):
            b, n, _ = x.shape
            q, k, v = (layer(x).view(b, n, HEADS, HEAD).transpose(1, 2) for layer in (self.q, self.k, self.v))
            x = F.scaled_dot_product_attention(q, k, v)
            return self.proj(x.permute(0, 2, 3, 1).reshape(b, n, HEADS * HEAD))  # features, then heads

    assert set(widths(Net().eval(), X)) == {"q:queries"}


def test_heads_that_repeat_in_another_order_stay():
    class Net(Grouped):
        def attend(self, x):
            b, n, _ = x.shape
            q = self.q(x).view(b, n, 2 * HEADS, HEAD).transpose(1, 2)
            k, v = (layer(x).view(b, n, HEADS, HEAD).transpose(1, 2) for layer in (self.k, self.v))
            x = F.scaled_dot_product_attention(q, torch.cat([k, k], 1), torch.cat([v, v], 1))
            return self.proj(x.transpose(1, 2).reshape(b, n, -1))

    assert widths(Net().eval(), X) == {}


def test_shared_projections_stay():
    class Net(Unfused):
        def __init__(self):
            super().__init__()
            self.k = self.q

    assert set(widths(Net().eval(), X)) == {"proj"}


def test_small_heads_are_not_worth_it():
    class Net(Unfused):
        def attend(self, x):
            b, n, _ = x.shape
            q, k, v = (layer(x).view(b, n, 4, 6).transpose(1, 2) for layer in (self.q, self.k, self.v))
            x = F.scaled_dot_product_attention(q, k, v)
            return self.proj(x.transpose(1, 2).reshape(b, n, -1))

    assert widths(Net().eval(), X) == {}


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.ones(6, 6).tril().bool()}]
)
def test_options_of_attention_do_no_harm(options):
    class Net(Fused):
        def __init__(self):
            super().__init__()
            for name, value in options.items():
                if isinstance(value, torch.Tensor):
                    self.register_buffer(name, value)

        def attend(self, x):
            b, n, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
            own = {name: getattr(self, name, value) for name, value in options.items()}
            x = F.scaled_dot_product_attention(q, k, v, **own)
            return self.proj(x.transpose(1, 2).reshape(b, n, -1))

    assert set(widths(Net().eval(), X)) == {"qkv:queries", "proj"}


def test_cross_attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.kv, self.proj = nn.Linear(32, 24), nn.Linear(32, 48), nn.Linear(24, 10)

        def forward(self, x):
            b, n, _ = x.shape
            q = self.q(x[:, :2]).view(b, 2, HEADS, HEAD).transpose(1, 2)
            k, v = self.kv(x).view(b, n, 2, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 2, 24))

    found = widths(Net().eval(), X)
    assert found["q:queries"].producers == ("q", "kv")
    assert found["q:queries"].rows == (rows(0), rows(0))
    assert found["proj"].rows == (rows(24),)
