import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn import functional as F

import balf_fx
from balf_fx.errors import OptionError, PassError
from balf_fx.graph.flops import flop_counter
from balf_fx.passes import Allocate, Annotate, Factorize, Score


class FunctionalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, 1, "same", groups=2)


class FunctionalLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.randn(12, 6))

    def forward(self, x):
        return F.linear(input=x, weight=self.proj)


class Product(nn.Module):
    """x @ W in the ways that people write it."""

    def __init__(self, form: str, shape: tuple[int, ...] = (12, 7)) -> None:
        super().__init__()
        self.form, self.w, self.b = form, nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(7))

    def forward(self, x):
        match self.form:
            case "addmm":
                return torch.addmm(self.b, x.view(-1, x.size(-1)), self.w).view((x.size(0), x.size(1), 7))
            case "matmul":
                return torch.matmul(x, self.w)
            case "@ T":
                return x @ self.w.T
            case "transpose":
                return x.matmul(self.w.transpose(0, 1))
            case "einsum":
                return torch.einsum("b t i, i o -> b t o", x, self.w)
            case _:
                return torch.einsum("oi,...i->...o", self.w, x)


class Twice(nn.Module):
    """One layer with two uses, on values of differing statistics."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.cat([self.layer(x), self.layer(3 * x + 1)])


SITES = {
    "addmm": (Product("addmm"), (4, 5, 12)),
    "matmul": (Product("matmul"), (4, 5, 12)),
    "matmul with T": (Product("@ T", (7, 12)), (4, 5, 12)),
    "matmul with transpose": (Product("transpose", (7, 12)), (4, 5, 12)),
    "einsum": (Product("einsum"), (4, 5, 12)),
    "einsum, weight first": (Product("reversed", (7, 12)), (4, 5, 12)),
    "conv_transpose1d": (nn.ConvTranspose1d(6, 8, 4, stride=2, padding=1), (4, 6, 9)),
    "conv_transpose2d": (nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1, bias=False), (3, 6, 5, 4)),
    "conv_transpose2d grouped": (nn.ConvTranspose2d(6, 12, (3, 2), groups=2, dilation=(1, 2)), (3, 6, 5, 4)),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 6, 2, padding=1), (2, 4, 3, 4, 4)),
    "linear used twice": (Twice(nn.Linear(12, 7)), (20, 12)),
    "widening linear used twice": (Twice(nn.Linear(6, 15)), (20, 6)),
    "conv2d used twice": (Twice(nn.Conv2d(4, 8, 3)), (3, 4, 9, 8)),
    "linear": (nn.Linear(12, 7), (20, 12)),
    "linear widening": (nn.Linear(6, 15, bias=False), (20, 6)),
    "linear, one sample": (nn.Linear(8, 8), (8,)),
    "linear, four dimensions": (nn.Linear(8, 8), (2, 3, 4, 8)),
    "conv1d": (nn.Conv1d(6, 8, 5, stride=2, padding=2, padding_mode="circular"), (4, 6, 15)),
    "conv2d": (nn.Conv2d(4, 8, 3, stride=2, padding=1), (3, 4, 9, 8)),
    "conv2d same, even kernel": (nn.Conv2d(4, 8, (2, 4), padding="same", dilation=(1, 2)), (3, 4, 9, 8)),
    "conv2d valid": (nn.Conv2d(4, 8, 3, padding="valid", bias=False), (3, 4, 9, 8)),
    "conv2d reflect": (nn.Conv2d(4, 8, 3, padding=(1, 2), padding_mode="reflect"), (3, 4, 9, 8)),
    "conv2d grouped": (nn.Conv2d(8, 12, 3, groups=2, padding=1), (3, 8, 6, 6)),
    "conv2d stem": (nn.Conv2d(2, 32, 3, stride=2, padding=1), (3, 2, 9, 9)),
    "conv2d stem, same": (nn.Conv2d(1, 32, (2, 3), padding="same", padding_mode="replicate"), (3, 1, 9, 9)),
    "conv2d grouped pointwise": (nn.Conv2d(8, 24, 1, groups=2, stride=2), (3, 8, 6, 6)),
    "conv2d, one image": (nn.Conv2d(4, 8, 3), (4, 9, 8)),
    "conv3d": (nn.Conv3d(2, 6, 3, padding=1, stride=(1, 2, 2)), (2, 2, 5, 6, 6)),
    "F.conv2d": (FunctionalConv(), (3, 6, 7, 7)),
    "F.linear": (FunctionalLinear(), (20, 6)),
}


def single(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer).double().eval()


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "uncentred"])
@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", SITES)
def test_the_reported_distortion_is_the_measured_error(name, centred, capture):
    layer, shape = SITES[name]
    model, batches = single(layer), [torch.randn(shape, dtype=torch.float64) + 0.3 for _ in range(6)]
    prepared = balf_fx.prepare(model, batches[0], capture=capture)
    for batch in batches:
        prepared(batch)
    (row,) = balf_fx.report(balf_fx.convert(prepared, allocation={}, centred=centred, progress=False)).sites
    compressed = balf_fx.convert(prepared, allocation={row.name: 2}, centred=centred, progress=False)
    (row,) = balf_fx.report(compressed).sites
    assert row.rank == 2
    channels = -1 if row.kind == "linear" else -1 - int(row.kind[-2])
    errors = torch.stack([(model(batch) - compressed(batch)).square().sum(channels).mean() for batch in batches])
    assert errors.mean().item() == pytest.approx(row.distortion, rel=1e-9)
    assert row.distortion > 1e-6


@pytest.mark.parametrize("name", SITES)
def test_stock_modules_replace_the_layer(name):
    layer, shape = SITES[name]
    compressed = balf_fx.compile(single(layer), torch.randn(shape, dtype=torch.float64), params=0.7, progress=False)
    kinds = {type(module) for module in compressed.modules() if not list(module.children())}
    assert kinds <= {nn.Linear, *(getattr(nn, f"Conv{kind}{d}d") for kind in ("", "Transpose") for d in (1, 2, 3))}
    calls = [node for node in compressed.graph.nodes if node.op == "call_module"]
    assert len(calls) == (4 if isinstance(layer, Twice) else 2)
    rest = [str(node.target) for node in compressed.graph.find_nodes(op="get_attr")]  # orders of rows that are moved
    assert all(name.endswith(("order", "1_bias")) for name in rest) or "b" in dict(compressed.named_parameters())


def test_factors_lie_in_memory_as_new_layers_do(conv_net, images):
    """torch.export and safetensors take others for views of larger tensors."""
    compressed = balf_fx.compile(conv_net, images, flops=0.5, effort="fast", progress=False)
    for parameter in compressed.parameters():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_names_and_attributes_of_the_factors():
    layer = nn.Conv2d(8, 8, 3, stride=2, padding=1).to(torch.bfloat16, memory_format=torch.channels_last)
    layer.requires_grad_(False)
    compressed = balf_fx.compile(
        nn.Sequential(layer).eval(), torch.randn(2, 8, 6, 6, dtype=torch.bfloat16), flops=0.5, progress=False
    )
    pair = compressed.get_submodule("0")
    assert isinstance(pair, nn.Sequential)
    assert [str(node.target) for node in compressed.graph.find_nodes(op="call_module")] == ["0.0", "0.1"]
    assert pair[0].stride == (2, 2)
    assert pair[1].kernel_size == (1, 1)
    assert pair[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert {(p.dtype, p.requires_grad) for p in compressed.parameters()} == {(torch.bfloat16, False)}
    assert not any(module.training for module in compressed.modules())


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_no_other_map_of_that_rank_does_better(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    model = single(nn.Linear(8, 8))
    x = torch.randn(40, 8, generator=generator, dtype=torch.float64) @ torch.randn(8, 8, generator=generator).double()
    compressed = balf_fx.compile(model, x, allocation={"0": rank}, effort="fast", pivot=False, progress=False)
    first, second = compressed.get_submodule("0")
    best = (model(x) - compressed(x)).square().sum(1).mean()
    for scale in (1e-3, 1e-1, 1.0):
        moved = [
            p + scale * torch.randn(p.shape, generator=generator).double()
            for p in (first.weight, second.weight, second.bias)
        ]
        other = F.linear(F.linear(x, moved[0]), moved[1], moved[2])
        assert best <= (model(x) - other).square().sum(1).mean() + 1e-12


def test_node_meta_is_carried_over_as_a_copy():
    graph_module = fx.symbolic_trace(single(nn.Linear(8, 8)))
    node = graph_module.graph.find_nodes(op="call_module")[0]
    node.meta.update(stack_trace="here", tensor_meta="of the output", custom=[1])
    for apply in (Annotate(), Score(factors="svd"), Allocate(params=0.7), Factorize()):
        graph_module = apply(graph_module).graph_module
    thin, wide = graph_module.graph.find_nodes(op="call_module")
    assert thin.meta["stack_trace"] == wide.meta["stack_trace"] == "here"
    assert thin.meta["custom"] == wide.meta["custom"] == [1]
    assert "tensor_meta" not in thin.meta
    assert wide.meta["tensor_meta"] == "of the output"
    assert thin.meta is not wide.meta


class Nested(nn.Module):
    """A layer inside of a block, and a functional one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.proj = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return F.linear(self.block(x), self.proj)


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_factors_are_noted_as_calls_of_their_own_modules(capture):
    ranks = {"block.0": 2, "proj": 3}
    small = balf_fx.compile(Nested(), torch.randn(16, 8), allocation=ranks, capture=capture, effort="fast")
    stacks = {
        node.target: [path for path, _ in node.meta["nn_module_stack"].values() if path]
        for node in small.graph.find_nodes(op="call_module")
        if str(node.target)[-1].isdigit() and "." in str(node.target)
    }
    assert stacks["block.0.0"] == ["block", "block.0", "block.0.0"]
    assert stacks["block.0.1"] == ["block", "block.0", "block.0.1"]
    assert stacks["proj.0"][-2:] == ["proj", "proj.0"]
    for node in small.graph.find_nodes(op="call_module"):
        path, kind = list(node.meta["nn_module_stack"].values())[-1]
        assert kind is type(small.get_submodule(path))


@pytest.mark.usefixtures("any_pivots")
def test_operations_between_pivots_are_noted_as_those_of_the_new_module():
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 1)).eval()
    small = balf_fx.compile(model, torch.randn(8, 3, 9, 9), allocation={"2": 17}, effort="fast", progress=False)
    inside = [list(node.meta.get("nn_module_stack", {}).values()) for node in small.graph.nodes if node.target != "2.0"]
    kinds = {kind for stack in inside for path, kind in stack if path == "2"}
    assert kinds == {type(small.get_submodule("2"))} == {nn.ModuleList}


def test_all_passes_run_in_a_pass_manager(conv_net, images):
    manager = PassManager([Annotate(), Score(factors="svd"), Allocate(params=0.6), Factorize()])
    result = manager(fx.symbolic_trace(conv_net))
    assert result.modified
    assert result.graph_module(images[0]).shape == (8, 10)
    assert balf_fx.report(result.graph_module).params_kept <= 0.6


def test_nothing_to_rewrite_is_not_a_modification():
    graph_module = fx.symbolic_trace(single(nn.Linear(8, 8)))
    for apply in (Annotate(), Score(factors="svd"), Allocate(params=1.0)):
        apply(graph_module)
    assert not Factorize()(graph_module).modified


def test_factorize_needs_choices():
    graph_module = Annotate()(fx.symbolic_trace(single(nn.Linear(8, 8)))).graph_module
    with pytest.raises(PassError, match="run Score and Allocate first"):
        Factorize()(graph_module)


class TiedHead(nn.Module):
    """A head tied to an embedding, as a module or as a call; and a layer whose weight is looked at, too."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.tokens, self.functional = nn.Embedding(20, 8), functional
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids).to(self.body.weight.dtype)
        x = self.body(x)
        return F.linear(x, self.tokens.weight) if self.functional else self.head(x)


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("functional", [True, False], ids=["call", "module"])
def test_a_weight_that_others_need_stays_beside_its_factors(functional, capture):
    model, ids = TiedHead(functional).double().eval(), torch.randint(0, 20, (4, 9))
    compressed = balf_fx.compile(model, ids, flops=0.7, capture=capture, progress=False)
    report = balf_fx.report(compressed)
    assert len(report.sites) == 2
    assert any(row.rank is not None for row in report.sites)
    assert report.params_after == sum(parameter.numel() for parameter in compressed.parameters())
    assert report.flops_kept <= 0.7
    embedding = next(p for name, p in compressed.named_parameters() if "tokens.weight" in name or "head.weight" in name)
    assert torch.equal(embedding, model.tokens.weight)
    exact = balf_fx.compile(model, ids, flops=1.0, capture=capture, progress=False)
    torch.testing.assert_close(exact(ids), model(ids))
    assert (compressed(ids) - model(ids)).norm() < model(ids).norm()


class Fused(nn.Module):
    """Query, key and value from one projection, taken apart in the ways that people write it.

    Queries depend on two directions of the input, keys on one, values on all.
    """

    def __init__(self, form: str, bias: bool = True) -> None:
        super().__init__()
        self.form, self.qkv = form, nn.Linear(8, 24, bias=bias, dtype=torch.float64)
        for rows, rank in ((self.qkv.weight[:8], 2), (self.qkv.weight[8:16], 1)):
            rows.data.copy_(torch.randn(8, rank).double() @ torch.randn(rank, 8).double())

    def forward(self, x):
        b, t, _ = x.shape
        y = self.qkv(x)
        match self.form:
            case "chunk":
                q, k, v = y.chunk(3, dim=-1)
            case "split":
                q, k, v = torch.split(y, 8, dim=2)
            case "reshape":
                q, k, v = y.reshape(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            case "view":
                q, k, v = y.view(b, -1, 3, 2, 4).transpose(1, 3).unbind(2)
            case _:  # heads first: no part of the output is a query as a whole
                q, k, v = y.view(b, t, 4, 3, 2).unbind(3)
        return F.scaled_dot_product_attention(q, k, v) + v


FUSED = ("chunk", "split", "reshape", "view")


def prepared(model, x, **options):
    graph_module = balf_fx.prepare(model.double().eval(), x, **options)
    graph_module(x)
    return graph_module


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("form", FUSED)
def test_the_parts_of_a_fused_projection_get_factors_where_these_are_better(form, capture):
    model, x = Fused(form), torch.randn(6, 5, 8, dtype=torch.float64)
    graph_module = prepared(model, x, capture=capture)
    split = balf_fx.convert(graph_module, params=0.64, progress=False)
    joint = balf_fx.convert(graph_module, params=0.64, split=False, progress=False)
    (split_row,), (joint_row,) = balf_fx.report(split).sites, balf_fx.report(joint).sites
    assert split_row.rank == (2, 1, None)
    assert split_row.distortion < 1e-9 < joint_row.distortion
    assert isinstance(joint_row.rank, int)
    torch.testing.assert_close(split(x), model(x))
    torch.testing.assert_close(split(x[:2]), model(x[:2]))


def test_parts_that_are_no_pieces_of_the_output_stay_together():
    graph_module = prepared(Fused("heads first"), torch.randn(6, 5, 8, dtype=torch.float64))
    compressed = balf_fx.convert(graph_module, params=0.8, progress=False)
    assert isinstance(balf_fx.report(compressed).sites[0].rank, int)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [(2, 1, 3), (None, 1, 3), (1, None, None), (7, 7, 7)])
@pytest.mark.parametrize("side", ["input", "output"])
def test_ranks_of_parts_cost_and_lose_what_is_reported(ranks, bias, side):
    x = torch.randn(6, 5, 8, dtype=torch.float64) + 0.3
    model = Fused("chunk", bias)
    if side == "output":  # a narrow projection of a wide input
        x, model.qkv = torch.cat([x] * 4, -1) + torch.randn(6, 5, 32), nn.Linear(32, 24, bias=bias)
    graph_module = prepared(model, x)
    compressed = balf_fx.convert(graph_module, allocation={"qkv": ranks}, progress=False)
    report = balf_fx.report(compressed)
    assert report.sites[0].rank == ranks
    assert balf_fx.report(copy.deepcopy(compressed)).sites[0].rank == ranks
    assert report.params_after == sum(parameter.numel() for parameter in compressed.parameters())
    with flop_counter() as counter:
        compressed(x)
    assert counter.get_total_flops() == report.flops_after
    parts = compressed.get_submodule("qkv.1")
    thin = compressed.get_submodule("qkv.0")(x).split([rank for rank in ranks if rank is not None], -1)
    pieces = iter(thin)
    values = [part(x if rank is None else next(pieces)) for part, rank in zip(parts, ranks, strict=True)]
    output = torch.cat([value + getattr(parts, f"{index}_bias", 0.0) for index, value in enumerate(values)], -1)
    error = (model.qkv(x) - output).square().sum(-1).mean()
    assert error.item() == pytest.approx(report.sites[0].distortion, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("ranks", [(2, 1), (2, 1, 0), (2, 1, 8), (None, None, None), (True, 1, 1)])
def test_ranks_of_parts_that_make_no_sense_are_errors(ranks):
    graph_module = prepared(Fused("chunk"), torch.randn(6, 5, 8, dtype=torch.float64))
    with pytest.raises(OptionError, match="3 whole numbers from 1 to 7"):
        balf_fx.convert(graph_module, allocation={"qkv": ranks}, progress=False)
    plain = prepared(nn.Sequential(nn.Linear(8, 8)), torch.randn(6, 8, dtype=torch.float64))
    with pytest.raises(OptionError, match="'0' has no parts"):
        balf_fx.convert(plain, allocation={"0": (1, 2)}, progress=False)


class BiasApart(nn.Module):
    """The module holds a bias that something other than the layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(12, 8)

    def forward(self, x):
        return torch.tanh(x @ self.proj.weight.t() + self.proj.bias)


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_a_bias_that_is_added_apart_stays(capture):
    model, x = BiasApart().double().eval(), torch.randn(32, 12).double()
    model.proj.weight.data = torch.randn(8, 3).double() @ torch.randn(3, 12).double()
    small = balf_fx.compile(model, x, allocation={"proj.weight": 3}, effort="fast", capture=capture, progress=False)
    assert torch.equal(small.get_parameter("proj.bias"), model.proj.bias)
    assert balf_fx.report(small).params_after == sum(parameter.numel() for parameter in small.parameters())
    torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_what_is_stored_in_a_layer_stays_there(effort):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(24, 32)
            self.layer.register_buffer("scale", torch.rand(32))
            self.layer.down, self.layer.matrix = nn.Linear(32, 32), nn.Parameter(torch.randn(40, 32))

        def forward(self, x):
            return F.linear(self.layer.down(self.layer(x).relu() * self.layer.scale).relu(), self.layer.matrix)

    model, x = Net().eval(), torch.randn(64, 24)
    compressed = balf_fx.compile(model, x, params=0.5, effort=effort, progress=False, capture="symbolic_trace")
    report = balf_fx.report(compressed)
    assert report.params_after == sum(parameter.numel() for parameter in compressed.parameters())
    assert {"layer", "layer.down", "layer.matrix"} == {row.name for row in report.sites}
    assert set(compressed.layer.scale.tolist()) <= set(model.layer.scale.tolist())
    assert compressed(x).shape == model(x).shape
