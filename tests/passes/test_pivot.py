"""Layers written with their own rows or columns compute what plain factors compute, at the price that was counted."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.engine import settings
from balf_fx.errors import OptionError, WeightsChangedError
from balf_fx.graph.flops import flop_counter
from balf_fx.graph.parameters import count_parameters
from balf_fx.graph.plan import Plan
from balf_fx.passes import pivot

GENERATOR = torch.Generator


def randn(*shape, seed=0):
    return torch.randn(shape, generator=GENERATOR().manual_seed(seed), dtype=torch.float64)


def made(model):
    generator = GENERATOR().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(
            parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1, generator=generator
        )
    return model.double().eval()


class Attention(nn.Module):
    """Fused or separate projections; keys and values may have fewer heads than queries."""

    def __init__(self, fused=True, heads=4, kv_heads=4, features=48):
        super().__init__()
        self.heads, self.kv_heads, self.fused = heads, kv_heads, fused
        size = features // heads
        if fused:
            self.qkv = nn.Linear(features, 3 * features)
        else:
            self.q = nn.Linear(features, features)
            self.k = nn.Linear(features, kv_heads * size, bias=False)
            self.v = nn.Linear(features, kv_heads * size)
        self.out = nn.Linear(features, features)
        self.norm, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.up, self.down = nn.Linear(features, 2 * features), nn.Linear(2 * features, features)

    def forward(self, x):
        batch, length, features = x.shape
        y = self.norm(x)
        if self.fused:
            q, k, v = self.qkv(y).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q(y).view(batch, length, self.heads, -1).transpose(1, 2)
            k, v = (each(y).view(batch, length, self.kv_heads, -1).transpose(1, 2) for each in (self.k, self.v))
            if self.heads != self.kv_heads:
                k, v = (each.repeat_interleave(self.heads // self.kv_heads, 1) for each in (k, v))
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, features)
        x = x + self.out(z)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Bottleneck(nn.Module):
    """A residual stream of channels, a depthwise convolution, and a constant for each channel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, padding=1)
        self.expand, self.project = nn.Conv2d(48, 96, 1), nn.Conv2d(96, 48, 1)
        self.depthwise, self.norm = nn.Conv2d(96, 96, 3, padding=1, groups=96), nn.BatchNorm2d(96)
        self.scale = nn.Parameter(torch.ones(96, 1, 1))
        self.head = nn.Linear(48, 40)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu6(self.expand(x)) * self.scale
        x = x + self.project(F.relu6(self.norm(self.depthwise(y))))
        return self.head(x.mean((2, 3)))


def forms(model):
    return {row.name: row.form for row in balf_fx.report(model).sites}


def counted(model, x):
    with torch.no_grad(), flop_counter() as counter:
        model(x)
    return counter.get_total_flops()


def check_counts(model, x):
    report = balf_fx.report(model)
    assert report.flops_after == counted(model, x)
    assert report.params_after == count_parameters(model)


MODELS = {
    "fused": (lambda: nn.Sequential(Attention(), Attention()), (4, 10, 48)),
    "separate": (lambda: nn.Sequential(Attention(fused=False), Attention(fused=False)), (4, 10, 48)),
    "grouped queries": (lambda: Attention(fused=False, kv_heads=2), (4, 10, 48)),
    "convolutions": (Bottleneck, (4, 3, 12, 12)),
}


@pytest.fixture(scope="module", params=MODELS)
def subject(request):
    make, shape = MODELS[request.param]
    return made(make()), [randn(*shape, seed=i) for i in range(6)]


@pytest.mark.parametrize(
    ("effort", "budget"),
    [
        ("fast", {"params": 0.75}),
        ("balanced", {"flops": 0.6}),
        ("best", {"flops": 0.9}),
    ],
)
def test_a_plan_carried_out_with_and_without_pivots_is_one_function(subject, effort, budget):
    model, batches = subject
    small = balf_fx.compile(model, batches, **budget, effort=effort, progress=False)
    check_counts(small, batches[0])
    other = without_pivots(model, batches, small, effort=effort)
    again = balf_fx.compile(model, batches, allocation=Plan.of(small), effort=effort, progress=False)
    assert set(forms(other).values()) <= {"", "pair"}
    assert forms(again) == forms(small)
    torch.testing.assert_close(small(batches[0]), other(batches[0]), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(small(batches[0]), again(batches[0]))
    assert count_parameters(small) <= count_parameters(other)


def unblocked(choices):
    return tuple(
        dataclasses.replace(choice, chosen=choice.dense) if choice.chosen.blocks else choice for choice in choices
    )


@pytest.mark.parametrize("name", ["fused", "separate", "grouped queries"])
@pytest.mark.parametrize("effort", ["fast", "best"])
def test_identity_blocks_cost_nothing_but_save_something(name, effort):
    make, shape = MODELS[name]
    model, batches = made(make()), [randn(*shape, seed=i) for i in range(6)]
    small = balf_fx.compile(model, batches, flops=0.97, effort=effort, progress=False)
    assert "blocks" in forms(small).values()
    assert set(forms(small).values()) <= {"", "blocks", "rows"}  # inputs of rank 47 behind a LayerNorm of 48 features
    assert counted(small, batches[0]) <= 0.97 * counted(model, batches[0])
    check_counts(small, batches[0])
    torch.testing.assert_close(small(batches[0]), model(batches[0]), rtol=1e-9, atol=1e-9)


def test_the_entries_of_the_blocks_are_counted_by_hand():
    model, batches = made(Attention()), [randn(4, 10, 48, seed=i) for i in range(4)]
    small = balf_fx.compile(model, batches, params=0.97, effort="fast", progress=False)  # more than other layers give
    assert count_parameters(model) - count_parameters(small) == 2 * 4 * 12**2  # keys and values, 4 heads, 12 features


def test_a_width_takes_over_the_order_of_the_layers_around_it(monkeypatch):
    model = made(nn.Sequential(nn.Linear(40, 160), nn.GELU(), nn.Linear(160, 40)))
    batches = [randn(16, 40, seed=i) for i in range(6)]
    ranks = {"0": 31, "2": 25}
    small = balf_fx.compile(model, batches, allocation=ranks, effort="fast", progress=False)
    assert forms(small) == {"0": "pair", "2": "columns"}
    assert not gathers(small)
    pair = balf_fx.compile(model, batches, allocation=ranks, effort="fast", progress=False, pivot=False)
    torch.testing.assert_close(small(batches[0]), pair(batches[0]))
    monkeypatch.setattr(settings, "MOVE", 0)
    moved = balf_fx.compile(model, batches, allocation=ranks, effort="fast", progress=False)
    assert forms(moved) == {"0": "columns", "2": "columns"}
    assert gathers(moved) == 1
    torch.testing.assert_close(moved(batches[0]), pair(batches[0]))


@pytest.mark.usefixtures("any_pivots")
def test_constants_and_depthwise_convolutions_follow_the_order():
    model, batches = made(Bottleneck()), [randn(4, 3, 12, 12, seed=i) for i in range(6)]
    with torch.no_grad():
        model.scale.copy_(torch.linspace(0.5, 2, 96)[:, None, None])
    ranks = {"expand": 20, "project": 18}
    rows = balf_fx.compile(model, batches, allocation=ranks, effort="fast", progress=False)
    pair = balf_fx.compile(model, batches, allocation=ranks, effort="fast", progress=False, pivot=False)
    assert {forms(rows)[name] for name in ranks} == {"columns"}
    assert not gathers(rows)
    torch.testing.assert_close(rows(batches[0]), pair(batches[0]))


def test_outputs_that_others_read_are_gathered_where_that_is_worth_it():
    model = made(nn.Sequential(nn.Linear(256, 256)))
    batches = [randn(64, 256, seed=i) for i in range(6)]
    pair, columns = (
        balf_fx.compile(model, batches, allocation={"0": rank}, effort="fast", progress=False) for rank in (100, 200)
    )
    assert (forms(pair), forms(columns)) == ({"0": "pair"}, {"0": "columns"})
    assert (gathers(pair), gathers(columns)) == (0, 1)
    assert balf_fx.report(pair).sites[0].params_after == 100 * 512 + 256
    assert balf_fx.report(columns).sites[0].params_after == 200 * (512 - 200) + 256
    with pytest.raises(OptionError, match="from 1 to 127 or 182 to 255, or None for dense"):
        balf_fx.compile(model, batches, allocation={"0": 150}, effort="fast", progress=False)


def test_parameters_are_worth_any_move(tmp_path):
    """Every rank below full has its own count of parameters, also where a budget of FLOPs prefers plain factors."""
    model = made(nn.Sequential(nn.Linear(32, 32), nn.Tanh()))
    batches = [randn(64, 32, seed=i) for i in range(6)]
    small, other = (
        balf_fx.compile(model, batches, **{measure: 0.9}, effort="fast", progress=False)
        for measure in ("params", "flops")
    )
    assert (forms(small), gathers(small)) == ({"0": "columns"}, 1)
    assert (forms(other), gathers(other)) == ({"0": "pair"}, 0)
    check_counts(small, batches[0])
    assert 0.88 < count_parameters(small) / count_parameters(model) <= 0.9
    balf_fx.save(small, tmp_path / "small.safetensors")
    again = balf_fx.load(tmp_path / "small.safetensors", model)
    followed = balf_fx.compile(model, batches, allocation=Plan.of(small), effort="fast", progress=False)
    for restored in (again, followed):
        assert forms(restored) == forms(small)
        torch.testing.assert_close(restored(batches[0]), small(batches[0]))


def gathers(model):
    return sum(node.target is torch.index_select for node in model.graph.nodes)


@pytest.mark.parametrize("preset", [balf_fx.BALF, balf_fx.AIR, {"pivot": False}])
def test_published_methods_keep_plain_factors(preset):
    model, batches = made(nn.Sequential(Attention(), Attention())), [randn(4, 10, 48, seed=i) for i in range(3)]
    small = balf_fx.compile(model, batches, flops=0.7, progress=False, **preset)
    assert set(forms(small).values()) <= {"", "pair"}
    assert "pair" in forms(small).values() or preset == {"pivot": False}


def test_excluded_layers_keep_their_weights_and_their_order(subject):
    model, batches = subject
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    kept = names[len(names) // 2]
    small = balf_fx.compile(model, batches, flops=0.7, exclude=[kept], progress=False)
    check_counts(small, batches[0])
    assert torch.equal(small.get_submodule(kept).weight, model.get_submodule(kept).weight)


def test_a_result_can_be_stored_copied_exported_and_compiled(subject, tmp_path):
    model, batches = subject
    before = copy.deepcopy(model.state_dict())
    small = balf_fx.compile(model, batches, flops=0.75, progress=False)
    wanted = small(batches[0])
    balf_fx.save(small, tmp_path / "small.balf")
    blank = copy.deepcopy(model)
    for parameter in blank.parameters():
        nn.init.zeros_(parameter)
    for other in (
        balf_fx.load(tmp_path / "small.balf", blank),
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
    ):
        assert torch.equal(other(batches[0]), wanted)
    torch.testing.assert_close(torch.export.export(small, (batches[0],)).module()(batches[0]), wanted)
    torch.testing.assert_close(torch.compile(small, backend="aot_eager")(batches[0]), wanted)
    torch.testing.assert_close(small(batches[0][:2]), wanted[:2])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def switched(model, batches, **options):
    """The model behind the backend, after its calibration on these batches."""
    torch.compiler.reset()
    given = {"calibration_steps": len(batches), "inner": "eager", **options}
    small = torch.compile(model, backend="balf", options=given, dynamic=False)
    with torch.no_grad():
        for batch in batches:
            small(batch)
    return small


def test_the_backend_takes_the_new_forms_also_for_other_shapes(tmp_path):
    model, batches = made(nn.Sequential(Attention(), Attention())), [randn(4, 10, 48, seed=i) for i in range(4)]
    offline = balf_fx.compile(model, batches, flops=0.8, effort="balanced", progress=False, capture="export")
    online = switched(model, batches, flops=0.8, effort="balanced")
    with torch.no_grad():
        torch.testing.assert_close(online(batches[0]), offline(batches[0]))
        shorter = batches[0][:, :7].contiguous()
        balf_fx.save(offline, tmp_path / "small.balf")
        other = balf_fx.load(tmp_path / "small.balf", model, example=shorter)
        torch.testing.assert_close(online(shorter), other(shorter))
    torch.compiler.reset()


class Tied(nn.Module):
    """A language model: its output layer is tied to the embedding, and its stream is normalised by hand."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 48)
        self.blocks = nn.ModuleList([Attention(fused=False, kv_heads=2), Attention()])
        self.scale = nn.Parameter(torch.ones(48))
        self.head = nn.Linear(48, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return self.head(x)


def tokens(seed):
    return torch.randint(40, (4, 10), generator=GENERATOR().manual_seed(seed))


@pytest.fixture(scope="module")
def tied():
    model = made(Tied())
    with torch.no_grad():
        model.scale.copy_(torch.linspace(0.5, 2, 48))
    return model, [tokens(i) for i in range(6)]


def without_pivots(model, batches, small, **options):
    """The plan of a model, carried out with pairs of factors."""
    plan = Plan.of(small)
    pairs = [dataclasses.replace(c, site=dataclasses.replace(c.site, pivots=None)) for c in plan.allocation.choices]
    plain = dataclasses.replace(plan, allocation=dataclasses.replace(plan.allocation, choices=unblocked(pairs)))
    return balf_fx.compile(model, batches, allocation=plain, progress=False, **options)


@pytest.mark.parametrize("capture", ["auto", "export"])
@pytest.mark.parametrize("budget", [{"params": 0.97}, {"params": 0.7}, {"flops": 0.6}])
def test_a_residual_stream_takes_over_one_order_for_all_layers_that_read_it(tied, budget, capture, tmp_path):
    model, batches = tied
    options = {"effort": "fast", "capture": capture}
    small = balf_fx.compile(model, batches, **budget, **options, progress=False)
    check_counts(small, batches[0])
    plain = without_pivots(model, batches, small, **options)
    torch.testing.assert_close(small(batches[0]), plain(batches[0]), rtol=1e-6, atol=1e-8)
    assert {"columns", "blocks"} & set(forms(small).values())
    balf_fx.save(small, tmp_path / "small.balf")
    assert torch.equal(balf_fx.load(tmp_path / "small.balf", made(Tied()))(batches[0]), small(batches[0]))


def test_a_tied_embedding_stays_tied(tied):
    model, batches = tied
    small = balf_fx.compile(model, batches, params=0.9, effort="fast", exclude=["head"], progress=False)
    assert small.get_parameter("embedding.weight") is small.get_parameter("head.weight")
    small = balf_fx.compile(model, batches, params=0.9, effort="fast", dense=["head"], progress=False)
    assert small.get_parameter("embedding.weight") is small.get_parameter("head.weight")
    assert not torch.equal(small.get_parameter("embedding.weight"), model.embedding.weight)  # in another order
    plain = without_pivots(model, batches, small, effort="fast", dense=["head"])
    torch.testing.assert_close(small(batches[0]), plain(batches[0]), rtol=1e-6, atol=1e-8)


def test_layers_that_a_shared_order_does_not_serve_get_one_of_their_own(tied, monkeypatch):
    model, batches = tied
    ranks = {"blocks.0.q": 30, "blocks.0.up": 31, "blocks.1.qkv": 29, "blocks.1.up": 33}
    served = balf_fx.compile(model, batches, allocation=ranks, effort="fast", progress=False)
    monkeypatch.setattr(pivot.SharedColumns, "largest", lambda columns: [1e9] * len(columns.others))
    alone = balf_fx.compile(model, batches, allocation=ranks, effort="fast", progress=False)
    assert {forms(served)[name] for name in ranks} == {forms(alone)[name] for name in ranks} == {"columns"}
    assert (gathers(served), gathers(alone)) == (0, 3)
    torch.testing.assert_close(alone(batches[0]), served(batches[0]), rtol=1e-6, atol=1e-8)
    check_counts(alone, batches[0])


def test_the_backend_sees_that_a_reordered_constant_has_changed():
    model, batches = made(Tied()), [tokens(i) for i in range(4)]
    small = switched(model, batches, flops=0.7, effort="fast")
    with torch.no_grad():
        small(batches[0])
        model.blocks[0].norm.weight.mul_(2)
        with pytest.raises(WeightsChangedError, match="norm"):
            small(batches[0])
    torch.compiler.reset()


class Read(nn.Module):
    """A residual stream from what is read twice: an embedding, a buffer, or a normalisation."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.embedding, self.up, self.down = nn.Embedding(40, 48), nn.Linear(48, 96), nn.Linear(96, 48)
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 40)
        self.register_buffer("places", torch.linspace(-1, 1, 480).reshape(10, 48))

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.embedding(tokens.flip(1)) if self.what == "embedding" else x
        x = x + self.places if self.what == "buffer" else x
        x = self.norm(x) if self.what == "norm" else x
        h = x + self.places if self.what == "buffer" else x
        x = x + self.down(torch.tanh(self.up(h)))
        return self.head(self.norm(x) if self.what == "norm" else x)


@pytest.mark.parametrize("what", ["embedding", "buffer", "norm"])
@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_what_is_read_twice_is_reordered_once(what, capture):
    model, batches = made(Read(what)), [tokens(i) for i in range(4)]
    options = {"allocation": {"up": 30}, "effort": "fast", "progress": False, "capture": capture}
    small, plain = (balf_fx.compile(model, batches, **options, pivot=pivot) for pivot in (True, False))
    assert what != "embedding" or forms(small)["up"] == "columns"
    torch.testing.assert_close(small(batches[0]), plain(batches[0]), rtol=1e-6, atol=1e-8)


class Gated(nn.Module):
    """Attention whose output layer writes a value and a gate, of which only the gate has a low rank."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(48, 48) for _ in range(3))
        self.out = nn.Linear(48, 96)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, 12)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        value, gate = self.out(y).chunk(2, -1)
        return x + value * torch.sigmoid(gate)


def test_parts_of_a_layer_beside_heads_take_over_their_basis_or_leave_it():
    model, x = made(Gated()), torch.randn(4, 10, 48, dtype=torch.float64, generator=GENERATOR())
    with torch.no_grad():
        model.out.weight[48:] = torch.randn(48, 4).double() @ torch.randn(4, 48).double() / 48
    small = balf_fx.compile(model, [x], progress=False)  # what is free
    assert balf_fx.plan(small).ranks["out"] == (None, 4)
    torch.testing.assert_close(small(x), model(x))


def test_a_hook_between_layers_keeps_their_order():
    model = made(nn.Sequential(nn.Linear(40, 160), nn.GELU(), nn.Linear(160, 40)))
    mask = torch.linspace(0, 1, 160, dtype=torch.float64)
    model[1].register_forward_hook(lambda module, given, found: found * mask)
    batches = [torch.randn(16, 40, dtype=torch.float64) for _ in range(6)]
    options = {"allocation": {"0": 31, "2": 25}, "effort": "fast", "progress": False}
    small, plain = (balf_fx.compile(model, batches, **options, pivot=pivot) for pivot in (True, False))
    torch.testing.assert_close(small(batches[0]), plain(batches[0]))


class Shared(nn.Module):
    """A table that is added to a stream, and is read elsewhere: by the module that owns it, or along its other axis."""

    def __init__(self, how):
        super().__init__()
        self.how, size = how, 48
        self.table, self.stem = nn.Embedding(size, size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 96), nn.Linear(96, size)

    def forward(self, x, ids):
        x = self.stem(x) + self.table.weight if self.how == "owner" else self.table(ids)
        x = x + self.down(torch.tanh(self.up(x)))
        return (x.sum(-1), self.table(ids)) if self.how == "owner" else (x @ self.table.weight,)


@pytest.mark.parametrize("how", ["owner", "other axis"])
@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_a_table_that_others_read_keeps_its_order(how, capture):
    model = made(Shared(how))
    batches = [(torch.randn(4, 48, 48).double(), torch.randint(48, (4, 48))) for _ in range(4)]
    options = {"allocation": {"up": 30}, "effort": "fast", "progress": False, "capture": capture}
    small, plain = (balf_fx.compile(model, batches, **options, pivot=pivot) for pivot in (True, False))
    for found, wanted in zip(small(*batches[0]), plain(*batches[0]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
