"""Compressed layers in a copy of the model compute what their graph does; what cannot go back stays as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from architectures import EVERYTHING, TOKENS, Fused, Mlp, Multihead, make
from small_models import ConvNet, randomise_batchnorm
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import balf_fx
from balf_fx.engine import grafting
from balf_fx.errors import GraftError, OptionError, PlanError
from balf_fx.graph.replacements import Replacement
from balf_fx.graph.site import Reason


def compress(model, batches, **options):
    options = {"effort": "balanced", "progress": False, "result": "module", **options}
    if not {"flops", "params", "allocation"} & set(options):
        options["flops"] = 0.6
    return balf_fx.compile(model, batches, **options)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs with which grafted models are compared."""
    found = []
    check = balf_fx.api.check_same
    monkeypatch.setattr(balf_fx.api, "check_same", lambda *args: (found.append(args[1]), check(*args)))
    return found


def fixed(small):
    return [refusal.name for refusal, _ in balf_fx.plan(small).refusals if refusal.reason is Reason.FIXED]


@pytest.mark.parametrize(
    ("name", "capture"),
    [*((name, "symbolic_trace") for name in EVERYTHING), *((name, "export") for name in ("grouped", "transformer"))],
)
def test_a_copy_of_the_model_computes_what_the_graph_does(name, capture, graphs, tmp_path):
    model, batches = make(name, torch.float64)
    share = 0.85 if "multihead" in name else 0.6  # the attention itself stays as it is
    small = compress(model, batches, capture=capture, flops=share)
    assert type(small) is type(model)
    other = torch.randn_like(batches[0])
    torch.testing.assert_close(small(other), graphs[0](other), rtol=1e-9, atol=1e-9)
    plan = balf_fx.plan(small)
    assert sum(parameter.numel() for parameter in small.parameters()) == plan.params_after
    assert plan.flops_kept <= share
    balf_fx.save(small, tmp_path / "small.safetensors")
    assert torch.equal(balf_fx.load(tmp_path / "small.safetensors", model)(other), small(other))


def test_layers_stand_under_their_own_names(images):
    model = randomise_batchnorm(ConvNet()).eval()
    before = copy.deepcopy(model.state_dict())
    small = compress(model, images, effort="best")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {name for name, _ in model.named_children()} == {name for name, _ in small.named_children()}
    assert isinstance(small.bn, nn.Identity)
    assert isinstance(small.block[1], nn.Identity)
    for path, recipe in balf_fx.plan(small).modules.items():
        assert isinstance(small.get_submodule(path), Replacement) == (recipe.form not in ("layer", "identity", "cache"))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in compress(model, images, fold_batchnorm=False).modules())


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_what_a_folded_norm_runs_besides_stays(capture, graphs, images, tmp_path):
    timm = pytest.importorskip("timm")
    norms = [timm.layers.BatchNormAct2d(16) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), norms[0], nn.Conv2d(16, 16, 3), norms[1], nn.Conv2d(16, 8, 1))
    model = randomise_batchnorm(model).eval()
    small = compress(model, images, capture=capture)
    assert [type(small[index]) for index in (1, 3)] == [nn.Sequential] * 2
    torch.testing.assert_close(small(images[0]), graphs[0](images[0]), rtol=1e-4, atol=1e-5)
    balf_fx.save(small, tmp_path / "small.safetensors")
    assert torch.equal(balf_fx.load(tmp_path / "small.safetensors", model)(images[0]), small(images[0]))


def test_the_result_is_an_ordinary_module(images):
    model = randomise_batchnorm(ConvNet()).eval()
    small = compress(model, images)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(images[0]), small(images[0]))
        assert str(balf_fx.report(other)) == str(balf_fx.report(small))
        assert other.state_dict().keys() == small.state_dict().keys()
    small.train()
    small(images[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_replacements_answer_for_the_layer():
    model, batches = make("fused")
    small = compress(model, batches, flops=0.5, exclude=["stem"])
    found = {name: module for name, module in small.named_modules() if isinstance(module, Replacement)}
    assert found
    for name, module in found.items():
        old = model.get_submodule(name)
        assert (module.in_features, module.out_features) == (old.in_features, old.out_features)
        assert module.weight.dtype is old.weight.dtype
        assert module.weight.device == old.weight.device
        assert set(module.state_dict()) >= {"0.weight"}
        with pytest.raises(AttributeError, match="elsewhere"):
            _ = module.elsewhere


class Constant(nn.Module):
    """Something with one entry for each of 32 hidden features, of which the model needs half."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 10)
        self.up.weight.data[16:], self.up.bias.data[16:] = 0, 0
        self.kind = kind
        if kind == "buffer":
            self.register_buffer("scale", torch.rand(32) + 0.5)
        else:
            self.scales = nn.ParameterDict({"first": nn.Parameter(torch.rand(1, 32) + 0.5)})

    def forward(self, x):
        hidden = F.gelu(self.up(x))
        if self.kind == "buffer":
            return self.down(hidden * self.scale)
        scale = self.scales["first"]
        if self.kind == "twice":
            return self.down(hidden * scale) + scale.mean()
        return self.down(hidden * scale)


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_constants_become_narrower_with_their_features_or_keep_their_places(kind, capture, graphs, tmp_path):
    model, batches = Constant(kind).eval(), [torch.randn(64, 12)]
    small = compress(model, batches, capture=capture, params=0.55)
    (width,) = balf_fx.plan(small).widths
    assert width.size < 20
    sizes = {name: value.shape[-1] for name, value in small.state_dict().items() if name.startswith("scale")}
    assert list(sizes.values()) == [width.size if kind == "parameter" else 32]
    x = torch.randn(5, 12)
    torch.testing.assert_close(small(x), graphs[0](x), rtol=1e-5, atol=1e-6)
    assert sum(parameter.numel() for parameter in small.parameters()) == balf_fx.plan(small).params_after
    balf_fx.save(small, tmp_path / "small.safetensors")
    assert torch.equal(balf_fx.load(tmp_path / "small.safetensors", model)(x), small(x))


def test_a_constant_that_something_else_reads_keeps_its_features():
    small = compress(Constant("twice").eval(), [torch.randn(64, 12)], params=0.55)
    assert not balf_fx.plan(small).widths
    assert small.scales["first"].shape == (1, 32)


def test_a_parameter_does_not_become_narrower_than_it_is(tmp_path):
    small = compress(Constant("parameter").eval(), [torch.randn(64, 12)], params=0.55)
    balf_fx.save(small, tmp_path / "small.safetensors")
    other = Constant("parameter").eval()
    other.scales["first"] = nn.Parameter(torch.ones(1, 4))
    with pytest.raises(PlanError, match="another architecture"):
        balf_fx.load(tmp_path / "small.safetensors", other)


class Odd(nn.Module):
    """Layers that nothing may replace, and one that something may."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 24))
        self.functional, self.both, self.hooked = (nn.Linear(24, 24) for _ in range(3))
        self.normed = weight_norm(nn.Linear(24, 24))
        self.subclass = Shifted(24, 24)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.weight = nn.Parameter(torch.randn(24, 24))
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)

    def forward(self, x):
        x = self.plain(x) + self.attention(x, x, x, need_weights=False)[0]
        x = F.linear(self.hooked(x), self.functional.weight, self.functional.bias)
        x = self.both(x) + F.linear(x, self.both.weight)
        return self.subclass(self.normed(x)) @ self.weight


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_cannot_go_back_stays_bit_for_bit(graphs):
    model, batches = Odd().eval(), [torch.randn(16, 5, 24) for _ in range(2)]
    small = compress(model, batches, flops=0.9, effort="best", capture="export")
    changed = set(balf_fx.plan(small).modules)
    assert changed <= {"plain.0", "plain.2"}
    assert changed
    state = small.state_dict()
    for key, value in model.state_dict().items():
        assert key.startswith("plain.") or torch.equal(state[key], value), key
    assert {"both.weight", "functional", "subclass", "weight"} <= {
        name.removesuffix("_factors") for name in fixed(small)
    }
    reason = "its module does more than this layer"
    assert reason in str(balf_fx.report(small))
    torch.testing.assert_close(small(batches[0]), graphs[0](batches[0]), rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    """One layer called twice, and one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.relu(self.first(self.twice(torch.relu(self.twice(x))))))


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_shared_modules_stay_shared(capture, graphs):
    small = compress(Shared().eval(), [torch.randn(64, 32)], flops=0.7, capture=capture)
    assert small.first is small.second
    x = torch.randn(5, 32)
    torch.testing.assert_close(small(x), graphs[0](x), rtol=1e-4, atol=1e-5)


class Listed(nn.Module):
    """Layers that the code reads from a list and a dictionary of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)
        self.layers, self.named = [self.first, nn.ReLU()], {"last": self.last}

    def forward(self, x):
        for layer in (*self.layers, self.named["last"]):
            x = layer(x)
        return x


def test_layers_in_lists_are_replaced_there(graphs):
    small = compress(Listed().eval(), [torch.randn(64, 32)], flops=0.7)
    assert small.layers[0] is small.first
    assert small.named["last"] is small.last
    assert {"first", "last"} <= set(balf_fx.plan(small).modules)
    x = torch.randn(5, 32)
    torch.testing.assert_close(small(x), graphs[0](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_encoders_of_torch_call_the_factors_in_them(effort, norm_first, tmp_path):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    batches = [torch.randn(4, 6, 16) for _ in range(2)]
    graph, small = (
        balf_fx.compile(model, batches, flops=0.7, effort=effort, result=result, exclude=["*attn*"], progress=False)
        for result in ("graph", "module")
    )
    balf_fx.save(small, tmp_path / "small.safetensors")
    loaded = balf_fx.load(tmp_path / "small.safetensors", model)
    assert any(isinstance(encoder.linear1, Replacement) for encoder in small.layers) == (effort == "fast")
    with torch.no_grad():  # without gradients, torch reads weights and calls no layers where it can
        wanted = graph(batches[0])
        torch.testing.assert_close(small(batches[0]), wanted)
        torch.testing.assert_close(pickle.loads(pickle.dumps(loaded))(batches[0]), wanted)
        torch.testing.assert_close(torch.compile(small, backend="eager")(batches[0]), wanted)


def test_a_model_that_is_one_layer_has_no_place_for_another():
    with pytest.raises(balf_fx.BalfError, match="so that no other module can take its place"):
        compress(nn.Linear(32, 32).eval(), [torch.randn(64, 32)])


def test_a_difference_is_an_error(monkeypatch):
    model, batches = Mlp().eval(), [torch.randn(64, 12)]
    forward = Replacement.forward
    monkeypatch.setattr(Replacement, "forward", lambda self, value: forward(self, value) * 1.01)
    with pytest.raises(GraftError, match=r"computes something else than their graph; result='graph'"):
        compress(model, batches, allocation={"up": 4}, effort="fast")
    monkeypatch.setattr(Replacement, "forward", lambda self, value: value @ value)
    with pytest.raises(GraftError, match="does not run with the compressed layers"):
        compress(model, batches, allocation={"up": 4}, effort="fast")


class Amplified(Fused):
    """Rounding errors grow ten thousandfold, and the model with narrower heads adds zeros that its graph has not."""

    def forward(self, x):
        return torch.sin(1e5 * super().forward(x))


def test_rounding_is_told_from_a_difference(graphs, monkeypatch):
    batches = [torch.randn(64, *TOKENS)]
    options = {"dense": ["*"], "flops": 0.8}
    small = compress(Amplified().eval(), batches, **options)
    x = batches[0][:5]
    assert any(width.kind != "channels" for width in balf_fx.plan(small).widths)
    assert not torch.allclose(small(x), graphs[0](x), atol=1e-3)
    monkeypatch.setattr(grafting, "_same_in_doubles", lambda *args: False)
    with pytest.raises(GraftError, match="computes something else"):
        compress(Amplified().eval(), batches, **options)


def test_prepared_graphs_are_converted_to_models():
    model, batches = Fused().eval(), [torch.randn(64, *TOKENS)]
    prepared = balf_fx.prepare(model, batches[0], result="module", factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False)
    for given in ({}, {"batches": batches}):
        small = balf_fx.convert(prepared, flops=0.7, model=model, result="module", progress=False, **given)
        assert type(small) is Fused
        assert balf_fx.plan(small).flops_kept <= 0.7
    with pytest.raises(OptionError, match="needs the model"):
        balf_fx.convert(prepared, flops=0.7, result="module", progress=False)
    plain = balf_fx.prepare(model, batches[0])
    balf_fx.calibrate(plain, batches, progress=False)
    with pytest.raises(OptionError, match='result="module" to prepare, too'):
        balf_fx.convert(plain, flops=0.7, result="module", model=model, progress=False)


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_a_compressed_model_is_compressed_again(capture, tmp_path):
    model, batches = make("transformer")
    once = compress(model, batches, flops=0.8)
    twice = compress(once, batches, flops=0.8, capture=capture)
    params = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, once, twice)]
    assert params == sorted(params, reverse=True)
    balf_fx.save(twice, tmp_path / "twice.safetensors")
    again = balf_fx.load(tmp_path / "twice.safetensors", model)
    assert torch.equal(again(batches[0]), twice(batches[0]))


def test_a_file_does_not_fit_another_model(tmp_path):
    small = compress(Multihead().eval(), [torch.randn(64, *TOKENS)], flops=0.9)
    balf_fx.save(small, tmp_path / "small.safetensors")
    with pytest.raises(PlanError, match="another architecture"):
        balf_fx.load(tmp_path / "small.safetensors", Mlp().eval())
    assert type(balf_fx.load(tmp_path / "small.safetensors", Multihead().eval())) is Multihead
