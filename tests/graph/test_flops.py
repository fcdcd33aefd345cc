"""FLOPs against closed formulas, since counts compared with one another may all be wrong."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import sdpa_flop_count

import balf_fx
from balf_fx.graph.annotation import annotation, graph_record
from balf_fx.graph.flops import attention_flops, count_flops, flop_counter, grouped_flops, profile
from balf_fx.graph.site import Reason

ROWS, IN, OUT, EXPERTS = 12, 16, 8, 3
B, HEADS, QUERIES, KEYS, SIZE, VALUES = 2, 3, 5, 7, 8, 6


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, IN, OUT))

    def forward(self, x, ends):
        return F.grouped_mm(x, self.weight, offs=ends)


class Loop(nn.Module):
    """Experts that each run on their own tokens."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(IN, OUT, bias=False) for _ in range(EXPERTS))

    def forward(self, x, chosen):
        output = x.new_zeros(x.shape[0], OUT)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().flatten()
            output = output.index_add(0, rows, expert(x[rows]))
        return output


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_a_grouped_product_costs_its_rows():
    model, args = Grouped(), (torch.randn(ROWS, IN), torch.tensor([5, 5, ROWS], dtype=torch.int32))
    assert count_flops(model, *args) == 2 * ROWS * IN * OUT
    traced = fx.symbolic_trace(model)
    profile(traced, args)
    assert (
        graph_record(traced).flops == sum(annotation(node).flops for node in traced.graph.nodes) == 2 * ROWS * IN * OUT
    )


def test_the_grouped_product_of_transformers_costs_its_rows():
    pytest.importorskip("transformers.integrations.moe")
    product = torch.ops.transformers.grouped_mm_fallback
    ends = torch.tensor([5, 5, ROWS], dtype=torch.int32)

    class Product(nn.Module):
        def forward(self, x, weight):
            return product(x, weight, ends)

    assert count_flops(Product(), torch.randn(ROWS, IN), torch.randn(EXPERTS, IN, OUT)) == 2 * ROWS * IN * OUT


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((ROWS, IN), (EXPERTS, IN, OUT), 2 * ROWS * IN * OUT),
        ((EXPERTS, ROWS, IN), (EXPERTS, IN, OUT), 2 * EXPERTS * ROWS * IN * OUT),
        ((EXPERTS, ROWS, IN), (IN, OUT), 2 * ROWS * IN * OUT),
        ((ROWS, IN), (IN, OUT), 2 * ROWS * IN * OUT),
    ],
    ids=["rows in groups", "batched", "columns in groups", "summands in groups"],
)
def test_every_form_of_a_grouped_product_costs_as_much_as_its_parts(first, second, expected):
    assert grouped_flops(first, second) == expected


def test_a_loop_over_experts_costs_the_tokens_that_each_sees():
    x, chosen = torch.randn(ROWS, IN), torch.tensor([0] * 5 + [2] * 7)
    model = Loop()
    assert count_flops(model, x, chosen) == 2 * ROWS * IN * OUT
    graph_module = fx.symbolic_trace(model)
    profile(graph_module, (x, chosen))
    calls = graph_module.graph.find_nodes(op="call_module")
    assert [annotation(node).flops for node in calls] == [2 * 5 * IN * OUT, 0, 2 * 7 * IN * OUT]


def attend(q, k, v):
    return (q @ k.mT * SIZE**-0.5).softmax(-1) @ v


class Attention(nn.Module):
    """A kernel between layers, or the products that it stands for."""

    def __init__(self, kernel: bool) -> None:
        super().__init__()
        self.kernel = kernel
        self.q, self.k, self.v = (nn.Linear(16, HEADS * size) for size in (SIZE, SIZE, VALUES))
        self.last = nn.Linear(HEADS * VALUES, 16)

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
    products = 2 * B * HEADS * QUERIES * KEYS * (SIZE + VALUES)
    layers = 2 * B * 16 * HEADS * (QUERIES * SIZE + KEYS * (SIZE + VALUES) + QUERIES * VALUES)
    assert count_flops(model, *batch) == products + layers
    prepared = balf_fx.prepare(model, batch, capture=capture)
    assert graph_record(prepared).flops == products + layers


def test_attention_is_counted_as_torch_counts_it():
    shapes = (B, HEADS, QUERIES, SIZE), (B, HEADS, KEYS, SIZE), (B, HEADS, KEYS, VALUES)
    assert attention_flops(*shapes, 0.0, True, out_shape=None) == sdpa_flop_count(*shapes)


def test_keys_may_have_fewer_heads():
    query, key = torch.randn(B, 4, QUERIES, SIZE), torch.randn(B, 2, KEYS, SIZE)
    with torch.no_grad(), flop_counter() as counter:
        F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert counter.get_total_flops() == 2 * B * 4 * QUERIES * KEYS * 2 * SIZE


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


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2, "batch_first": True}])
def test_recurrent_layers_multiply_each_matrix_at_each_step(kind, fused, options):
    layer = kind(6, 8, **options).eval()
    matrices = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)
    with torch.backends.mkldnn.flags(enabled=fused):
        assert count_flops(layer, torch.randn(5, 3, 6)) == 2 * 5 * 3 * matrices


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: F.bilinear(torch.randn(5, 8), torch.randn(5, 6), torch.randn(4, 8, 6)), 2 * 5 * 4 * 8 * 6),
        (lambda: torch.randn(6, 8) @ torch.randn(8), 2 * 6 * 8),
        (lambda: torch.addmv(torch.randn(6), torch.randn(6, 8), torch.randn(8)), 2 * 6 * 8),
    ],
)
def test_products_that_the_counter_of_torch_leaves_out(call, expected):
    class Product(nn.Module):
        def forward(self):
            return call()

    assert count_flops(Product()) == expected


def test_a_deformable_convolution_costs_what_a_plain_one_does():
    ops = pytest.importorskip("torchvision.ops")
    layer, x, offsets = ops.DeformConv2d(4, 5, 3, stride=2), torch.randn(2, 4, 9, 9), torch.randn(2, 18, 4, 4)
    assert count_flops(layer, x, offsets) == 2 * 2 * 4 * 4 * 5 * 4 * 9


def test_recurrent_layers_are_part_of_the_budget():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 64)

        def forward(self, x):
            return self.head(self.recurrent(x)[0])

    model, batches = Tagger().eval(), [torch.randn(4, 6, 16) for _ in range(2)]
    small = balf_fx.compile(model, batches, flops=0.8, effort="fast", progress=False)
    report = balf_fx.report(small)
    recurrent = 2 * 4 * 6 * (64 * 16 * 2)
    assert report.flops_before == recurrent + 2 * 4 * 6 * 64 * 16
    assert report.flops_refused == {Reason.NOT_LINEAR.value: pytest.approx(2 / 3)}
    assert report.flops_kept <= 0.8
