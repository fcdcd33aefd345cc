import copy
import dataclasses

import pytest
import torch
from architectures import (
    ATTENTIONS,
    CHANNELS,
    DIM,
    EVERYTHING,
    HEAD,
    HEADS,
    Mlp,
    Unfused,
    count_flops,
    count_params,
    make,
    rewritten,
    scored,
)
from families import make_redundant
from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import balf_fx
from balf_fx.capture.normal_form import capture
from balf_fx.errors import PassError
from balf_fx.graph.annotation import graph_record, record_graph
from balf_fx.graph.operators import arguments
from balf_fx.passes import Allocate, Annotate, FindWidths, Narrow
from balf_fx.widths.elimination import conditioned
from balf_fx.widths.narrowing import find_cuts

DUPLICATED = {  # the width by its reader, and everything that writes it or lies between
    "mlp": ("down", ["up"]),
    "gated mlp": ("w2", ["w1", "w3"]),
    "scaled mlp": ("down", ["up", "gamma"]),
    "convs": ("second", ["first"]),
    "transposed": ("second", ["first"]),
    "inverted residual": ("block.4", ["block.0", "block.2"]),
    "squeeze and excite": ("last", ["first", "expand"]),
    "pooled": ("head", ["conv"]),
    "joined": ("last", ["one.0", "one.2", "three.0", "three.2"]),
    "skip": ("middle.0", ["down.0", "down.2", "up"]),
    "aggregated": ("third.0", ["first.0", "first.2", "second.0", "second.2", "third.0", "third.2"]),
    "chain": ("layers.2", ["layers.1"]),
    "normalised": ("second", ["first", "norm"]),
    "grouped convs": ("last", ["first", "norm", "middle"]),
}
PROJECTED = {  # for each kind: the width, the layer that writes it, its first row, heads, how many share a subspace
    "fused": {"queries": ("qkv:queries", "qkv", 0, 2, 1), "values": ("proj", "qkv", 48, 2, 1)},
    "unfused": {"queries": ("q:queries", "q", 0, 2, 1), "values": ("proj", "v", 0, 2, 1)},
    "fused keys and values": {"queries": ("q:queries", "q", 0, 2, 1), "values": ("proj", "kv", 24, 2, 1)},
    "grouped": {"queries": ("q:queries", "q", 0, 4, 2), "values": ("proj", "v", 0, 2, 1)},
    "multihead": {
        "queries": ("attention.in_proj:queries", "attention.in_proj", 0, 2, 1),
        "values": ("attention.out_proj", "attention.in_proj", 48, 2, 1),
    },
}
PROJECTED["multihead, sequence first"] = PROJECTED["multihead"]


def width_of(prepared, name):
    (found,) = (width for width in graph_record(prepared).widths if width.name == name)
    return found


def key_of(prepared, name):
    return width_of(prepared, name).key


def curve_of(prepared, name):
    record = graph_record(prepared)
    return record.width_curves[record.widths.index(width_of(prepared, name))]


def duplicate(model, path):
    """Let the second half of the rows repeat the first."""
    module = getattr(model, path) if path == "gamma" else model.get_submodule(path)
    for value in [module] if isinstance(module, nn.Parameter) else [*module.parameters(), *module.buffers()]:
        if value.dim() > 0:
            half = len(value) // 2
            value.data[half:] = value.data[:half]


def project(model, path, start, heads, shared, rank):
    """Let each head's rows, and biases, lie in a subspace."""
    if path == "attention.in_proj":
        parameters = [model.attention.in_proj_weight, model.attention.in_proj_bias]
    else:
        parameters = list(model.get_submodule(path).parameters())
    for head in range(heads):
        if head % shared == 0:
            basis = torch.linalg.qr(torch.randn(HEAD, rank, dtype=parameters[0].dtype))[0]
        rows = slice(start + head * HEAD, start + (head + 1) * HEAD)
        for parameter in parameters:
            parameter.data[rows] = basis @ (basis.mT @ parameter.data[rows])


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", CHANNELS)
def test_duplicates_may_go(name, method, monkeypatch):
    monkeypatch.setattr("balf_fx.passes.score_widths.conditioned", lambda c: conditioned(c, 1e-7, 1e-9))
    model, batches = make(name, torch.float64)
    width, written = DUPLICATED[name]
    for path in written:
        duplicate(model, path)
    prepared = scored(model, batches, method)
    found = width_of(prepared, width)
    narrow = rewritten(prepared, {found.key: found.features // 2})
    fresh = torch.randn(5, *batches[0].shape[1:], dtype=torch.float64)
    torch.testing.assert_close(narrow(fresh), model(fresh), rtol=1e-5, atol=1e-5)
    assert count_flops(narrow, fresh) < count_flops(model, fresh)
    assert count_params(narrow) < count_params(model)


@pytest.mark.parametrize("by_name", [False, True])  # as in graphs that Dynamo captures
def test_duplicate_groups_may_go(by_name, monkeypatch):
    monkeypatch.setattr("balf_fx.passes.score_widths.conditioned", lambda c: conditioned(c, 1e-7, 1e-9))
    model, batches = make("normalised", torch.float64)
    duplicate(model, "second")
    for parameter in (model.gain, model.offset):
        parameter.data[12:] = parameter.data[:12]
    prepared = scored(model, batches, "symbolic_trace")
    (call,) = prepared.graph.find_nodes(op="call_function", target=F.group_norm)
    if by_name:
        given = arguments(call)
        call.args, call.kwargs = (given.pop("input"),), given
    found = width_of(prepared, "head")
    assert (found.features, found.block) == (24, 6)
    narrow = rewritten(prepared, {found.key: 12})
    fresh = torch.randn(5, *batches[0].shape[1:], dtype=torch.float64)
    torch.testing.assert_close(narrow(fresh), model(fresh), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_layer_with_groups_keeps_those_of_the_features_that_stay(rank):
    model, batches = make("grouped convs")
    prepared = scored(model, batches)
    found = width_of(prepared, "last")
    assert (found.features, found.block) == (32, 4)
    kept = curve_of(prepared, "last").kept(12)
    whole, narrow = (rewritten(prepared, sizes, {"middle": rank}).middle for sizes in ({}, {found.key: 12}))
    first = narrow if rank is None else narrow[0]
    assert (first.in_channels, first.groups) == (12, 3)
    x = torch.randn(2, 32, 7, 7)
    torch.testing.assert_close(narrow(x[:, kept]), whole(x)[:, kept])


@pytest.mark.parametrize("name", CHANNELS)
def test_duplicates_may_go_in_single_precision(name):
    model, batches = make(name)
    width, written = DUPLICATED[name]
    for path in written:
        duplicate(model, path)
    prepared = scored(model, batches)
    found = width_of(prepared, width)
    narrow = rewritten(prepared, {found.key: found.features // 2})
    fresh = torch.randn(5, *batches[0].shape[1:])
    answer = model(fresh)
    assert float((narrow(fresh) - answer).norm() / answer.norm()) < 2e-3  # covariances are conditioned


@pytest.mark.parametrize("kind", ["queries", "values"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_heads_in_a_subspace_keep_that(name, kind):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model, batches = make(name, dtype)
        width, *where = PROJECTED[name][kind]
        project(model, *where, rank=5)
        prepared = scored(model, batches)
        narrow = rewritten(prepared, {key_of(prepared, width): 5})
        fresh = torch.randn(5, *batches[0].shape[1:], dtype=dtype)
        torch.testing.assert_close(narrow(fresh), model(fresh), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", ["fused", "unfused", "fused keys and values", "grouped"])
def test_queries_and_values_narrow_together(name, method):
    model, batches = make(name, torch.float64)
    for kind, rank in (("queries", 4), ("values", 7)):
        project(model, *PROJECTED[name][kind][1:], rank=rank)
    prepared = scored(model, batches, method)
    sizes = {key_of(prepared, PROJECTED[name]["queries"][0]): 4, key_of(prepared, PROJECTED[name]["values"][0]): 7}
    narrow = rewritten(prepared, sizes)
    fresh = torch.randn(5, *batches[0].shape[1:], dtype=torch.float64)
    torch.testing.assert_close(narrow(fresh), model(fresh), rtol=1e-9, atol=1e-9)


def test_queries_that_keys_do_not_see_may_go_with_the_metric():
    model, batches = make("unfused", torch.float64)
    project(model, "k", 0, HEADS, 1, 5)
    prepared = scored(model, batches)
    answer = model(batches[0])

    def lost(size):
        return float((rewritten(prepared, {key_of(prepared, "q:queries"): size})(batches[0]) - answer).norm())

    assert lost(8) < lost(5) < lost(3) < lost(1)


class _Aligned(TorchFunctionMode):
    """Refuses attention of heads that a GPU's kernels take, but cannot read where they are in memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and all(each.shape[-1] % 4 == 0 for each in args[:3]):
            for each in args[:3]:
                assert not any(start % 4 for start in (each.storage_offset(), *each.stride()[:-1])), each.stride()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [1, 6, 11])
@pytest.mark.parametrize("name", EVERYTHING)
def test_every_width_narrows_alone_and_with_the_others(name, size):
    model, batches = make(name)
    prepared = scored(model, batches)
    widths = graph_record(prepared).widths
    sizes = {
        width.key: min(max(size // width.block * width.block, width.least), width.features - width.block)
        for width in widths
    }
    for chosen in [*({key: s} for key, s in sizes.items()), sizes]:
        narrow = rewritten(prepared, chosen)
        before = count_params(rewritten(prepared, {}))
        for count in (48, 5, 1):
            with _Aligned():
                output = narrow(batches[0][:count])
            assert output.shape == (count, 10)
            assert torch.isfinite(output).all()
        assert count_params(narrow) < before


def test_a_size_that_keeps_all_features_changes_nothing():
    model, batches = make("transformer", torch.float64)
    prepared = scored(model, batches)
    sizes = {width.key: width.features for width in graph_record(prepared).widths}
    narrow = rewritten(prepared, sizes)
    assert torch.equal(narrow(batches[0]), rewritten(prepared, {})(batches[0]))
    assert count_params(narrow) == count_params(model)


@pytest.mark.parametrize(("queries", "values"), [(5, HEAD), (HEAD, 5), (5, 7)])
def test_what_is_left_of_a_fused_projection(queries, values):
    model, batches = make("fused")
    prepared = scored(model, batches)
    sizes = {key_of(prepared, "qkv:queries"): queries, key_of(prepared, "proj"): values}
    narrow = rewritten(prepared, sizes)
    assert narrow.get_submodule("qkv").weight.shape == (HEADS * (2 * queries + values), DIM)
    assert narrow.get_submodule("proj").weight.shape == (DIM, HEADS * values)
    (attention,) = narrow.graph.find_nodes(op="call_function", target=nn.functional.scaled_dot_product_attention)
    assert attention.kwargs.get("scale") == (HEAD**-0.5 if queries < HEAD else None)


def test_values_of_full_size_stay_as_they_are_when_queries_shrink():
    model, batches = make("fused")
    narrow = rewritten(prepared := scored(model, batches), {key_of(prepared, "qkv:queries"): 5})
    torch.testing.assert_close(
        narrow.get_submodule("qkv").weight[-HEADS * HEAD :], model.qkv.weight[2 * HEADS * HEAD :]
    )
    torch.testing.assert_close(narrow.get_submodule("proj").weight, model.proj.weight)


def test_kept_rows_are_the_models_own():
    model, batches = make("scaled mlp")
    prepared = scored(model, batches)
    (curve,) = graph_record(prepared).width_curves
    kept = curve.maps(20).kept
    narrow = rewritten(prepared, {"channels down": 20})
    assert torch.equal(narrow.get_submodule("up").weight, model.up.weight[kept])
    assert torch.equal(narrow.get_submodule("up").bias, model.up.bias[kept])
    assert torch.equal(narrow.gamma, model.gamma[kept])
    assert isinstance(narrow.gamma, nn.Parameter)


def test_depthwise_convolutions_lose_channels():
    model, batches = make("inverted residual")
    prepared = scored(model, batches)
    narrow = rewritten(prepared, {key_of(prepared, "block.4"): 11})
    middle = narrow.get_submodule("block.2")
    assert (middle.in_channels, middle.out_channels, middle.groups) == (11, 11, 11)
    assert middle.weight.shape == (11, 1, 3, 3)
    assert narrow.get_submodule("block.0").weight.shape == (11, 8, 1, 1)
    assert narrow.get_submodule("block.4").weight.shape == (8, 11, 1, 1)


@pytest.mark.parametrize("hidden", [24, 40])
def test_a_linear_network_narrows_to_its_rank(hidden, monkeypatch):
    monkeypatch.setattr("balf_fx.passes.score_widths.conditioned", lambda c: conditioned(c, 1e-7, 1e-9))
    model = Mlp(nn.Identity(), hidden).double().eval()
    batches = list(torch.randn(2, 64, 12, dtype=torch.float64))
    narrow = rewritten(scored(model, batches), {"channels down": 12})  # the input has 12 features
    torch.testing.assert_close(narrow(batches[0]), model(batches[0]), rtol=1e-5, atol=1e-5)


def test_features_that_never_vary_cost_nothing():
    model, batches = make("mlp", torch.float64)
    model.up.weight.data[5:] = 0
    model.up.bias.data[5:] += 1
    narrow = rewritten(scored(model, batches), {"channels down": 5})
    torch.testing.assert_close(narrow(batches[0]), model(batches[0]), rtol=1e-9, atol=1e-9)


def test_ranks_and_sizes_together():
    model, batches = make("transformer", torch.float64)
    prepared = scored(model, batches)
    sizes = {key_of(prepared, "down"): 24, key_of(prepared, "proj"): 9}
    narrow = rewritten(prepared, sizes, {"up": 10, "down": 6, "stem": 5, "proj": 8})
    assert narrow.get_submodule("up.1").weight.shape == (24, 10)
    assert narrow.get_submodule("down.0").weight.shape == (6, 24)
    assert narrow.get_submodule("proj.0").weight.shape == (8, HEADS * 9)
    dense = rewritten(prepared, {}, {"up": 10, "down": 6, "stem": 5, "proj": 8})
    answer = model(batches[0])
    assert float((narrow(batches[0]) - answer).norm()) < 3 * float((dense(batches[0]) - answer).norm())


def test_the_weights_of_the_model_stay():
    model, batches = make("transformer")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = scored(model, batches)
    held = {name: value.clone() for name, value in prepared.state_dict().items()}
    rewritten(prepared, {width.key: 5 for width in graph_record(prepared).widths})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(held[name], value) for name, value in prepared.state_dict().items())


def test_buffers_in_between_stay_buffers():
    class Buffered(Mlp):
        def __init__(self):
            super().__init__()
            self.register_buffer("gamma", torch.rand(32) + 0.5)
            self.register_buffer("shift", torch.rand(1, 32), persistent=False)

        def forward(self, x):
            return self.down(self.act(self.up(x)) * self.gamma + self.shift)

    model, batches = Buffered().eval(), list(torch.randn(2, 64, 12))
    prepared = scored(model, batches, "symbolic_trace")
    (width,) = graph_record(prepared).widths
    assert set(width.between) == {"gamma", "shift"}
    narrow = rewritten(prepared, {"channels down": 20})
    assert narrow.gamma.shape == (20,)
    assert narrow.shift.shape == (1, 20)
    assert "gamma" in narrow.state_dict()
    copied = copy.deepcopy(fx.symbolic_trace(model))  # torch 2.8 forgets that a buffer is not persistent
    assert ("shift" in narrow.state_dict()) == ("shift" in copied.state_dict())


class Listed(Unfused):
    """Attention whose output projection is an einsum, which takes its operands as a list in exported graphs."""

    def attend(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, HEADS, HEAD).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = (((q * HEAD**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, HEADS * HEAD)
        return torch.einsum("bnd,od->bno", y, self.proj.weight)


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
def test_values_narrow_before_operands_in_a_list(method):
    torch.manual_seed(0)
    model, x = Listed().double().eval(), torch.randn(32, 6, 32).double()
    small = balf_fx.compile(model, [x], flops=0.4, effort="balanced", capture=method, progress=False)
    assert small(x).shape == model(x).shape


def test_half_precision_weights_stay_half():
    model, batches = make("mlp")
    model = model.to(torch.bfloat16)
    prepared = scored(model, [batch.to(torch.bfloat16) for batch in batches])
    narrow = rewritten(prepared, {"channels down": 20})
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert narrow(batches[0].to(torch.bfloat16)).shape == (48, 10)


EXPORTED = ["gated mlp", "inverted residual", "unfused", "grouped", "transformer"]


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "symbolic_trace") for name in EVERYTHING), *((name, "export") for name in EXPORTED)]
)
def test_budgets_are_what_is_counted(name, method):
    model, batches = make(name)
    prepared = scored(model, batches, method)
    for budget in (0.9, 0.6):
        for measure in ("flops", "params"):
            narrow = balf_fx.convert(prepared, progress=False, **{measure: budget})
            report = balf_fx.report(narrow)
            assert report.flops_after == count_flops(narrow, batches[0])
            assert report.params_after == count_params(narrow)
            kept = report.flops_kept if measure == "flops" else report.params_kept
            assert kept <= budget
            assert narrow(batches[0][:3]).shape == (3, 10)


def test_without_an_allocation_nothing_is_cut():
    model, batches = make("mlp")
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    assert find_cuts(prepared) == {}
    assert not Narrow()(prepared).modified
    assert prepared(batches[0]).shape == (48, 10)


def test_the_cut_of_each_layer():
    model, batches = make("transformer")
    prepared = scored(model, batches)
    Allocate(ranks={})(prepared)
    allocation = graph_record(prepared).allocation
    sizes = {key_of(prepared, "down"): 16, key_of(prepared, "qkv:queries"): 5}
    record_graph(prepared, allocation=dataclasses.replace(allocation, sizes=sizes))
    cuts = find_cuts(prepared)
    assert set(cuts) == {"up", "down", "qkv"}
    assert cuts["down"].read is not None
    assert cuts["up"].read is None
    assert not cuts["up"].changes
    assert cuts["qkv"].changes  # queries are mixed
    sites = {site.name: site for site in balf_fx.graph.annotation.sites(prepared)}
    assert cuts["up"].outputs(sites["up"]).out_features == 16
    assert cuts["down"].inputs(sites["down"]).in_features == 16
    assert cuts["qkv"].outputs(sites["qkv"]).out_features == HEADS * (5 + 5 + HEAD)
    value = torch.randn(3, 40)
    curve = curve_of(prepared, "down")
    assert torch.equal(cuts["down"].read_features(value, -1), value[:, curve.maps(16).kept])


@pytest.mark.parametrize("name", ["mlp", "inverted residual", "fused", "transformer"])
def test_finding_widths_again_finds_the_same(name):
    model, batches = make(name)
    graph_module = capture(model, batches[0])
    Annotate()(graph_module)
    FindWidths()(graph_module)
    first = graph_record(graph_module).widths
    assert first
    assert not FindWidths()(graph_module).modified
    assert graph_record(graph_module).widths == first


def test_widths_need_sites():
    model, batches = make("mlp")
    with pytest.raises(PassError):
        FindWidths()(capture(model, batches[0]))


@pytest.mark.parametrize(("queries", "values"), [(6, 10), (10, 6), (8, 8), (12, 8), (8, 12)])
@pytest.mark.parametrize("name", ["fused", "multihead"])
def test_fused_attention_keeps_queries_and_values_of_one_size(name, queries, values):
    model, batches = make(name)
    prepared = scored(model, batches)
    sizes = {"queries": queries, "values": values}
    widths = graph_record(prepared).widths
    narrow = rewritten(prepared, {width.key: sizes[width.kind] for width in widths if width.product is not None})
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention:
                seen.append([value.shape[-1] for value in args[:3]])
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Spy():
        narrow(batches[0])
    assert seen == [[max(queries, values)] * 3]


class Modulated(nn.Module):
    """One layer outputs features and what becomes their factor: two layers with the same numbers of rows."""

    def __init__(self):
        super().__init__()
        self.up, self.factor, self.down = nn.Linear(12, 32), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x):
        features, context = self.up(x).split(16, -1)
        return self.down(features * self.factor(F.gelu(context)))


@pytest.mark.parametrize("names", [["down"], ["factor"], ["factor", "down"]])
def test_each_layer_keeps_its_own_readers(names):
    model = Modulated().double().eval().requires_grad_(False)
    prepared = scored(model, list(torch.randn(2, 48, 12, dtype=torch.float64)))
    sizes = make_redundant(prepared)
    keys = [key_of(prepared, name) for name in names]
    whole = rewritten(prepared, {})
    small = rewritten(prepared, {key: sizes[key] for key in keys})
    assert count_params(small) < count_params(whole)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(small(x), whole(x))


def test_a_buffer_that_is_read_twice_keeps_its_features():
    class Buffered(Mlp):
        def __init__(self):
            super().__init__()
            self.register_buffer("gamma", torch.rand(32) + 0.5)
            self.other = nn.Linear(12, 32)

        def forward(self, x):
            return self.down(self.act(self.up(x)) * self.gamma) + (self.other(x).tanh() * self.gamma).sum(-1)[..., None]

    model, batches = Buffered().eval(), list(torch.randn(2, 64, 12))
    assert not graph_record(scored(model, batches, "symbolic_trace")).widths
