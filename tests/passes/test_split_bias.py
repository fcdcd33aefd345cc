import pytest
import torch
from architectures import Fused
from torch import fx, nn
from torch._inductor.utils import run_and_get_code

import balf_fx
from balf_fx.passes import Allocate, Annotate, Factorize, Score, SplitBias


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.b(self.a(self.a(x)).relu())


def pointwise():
    """Its second layer is computed as a product, with the features last, once it has pivots."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 8, 3)).eval()


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 24))


MODELS = {
    "mlp": (mlp, (8, 5, 16)),
    "one sample": (mlp, (64, 16)),
    "twice": (Twice, (8, 5, 16)),
    "attention": (Fused, (6, 5, 32)),
}


def compiled(model, x, **options):
    return balf_fx.compile(model, [x], **({"params": 0.6, "effort": "fast", "progress": False} | options))


def sums(graph_module):
    """The sums of biases, by the names of their parameters."""
    return [str(node.target) for node in graph_module.graph.find_nodes(op="get_attr") if "_bias" in str(node.target)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mlp().eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_function_the_parameters_and_the_costs_stay(name, tmp_path):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    graph_module = fx.symbolic_trace(model)
    for each in (Annotate(), Score(factors="svd"), Allocate(params=0.6), Factorize()):
        each(graph_module)
    before, count = graph_module(x), sum(parameter.numel() for parameter in graph_module.parameters())
    assert SplitBias()(graph_module).modified
    graph_module.graph.lint()
    assert sums(graph_module)
    torch.testing.assert_close(graph_module(x), before)
    assert sum(parameter.numel() for parameter in graph_module.parameters()) == count
    small = compiled(model, x)
    assert balf_fx.report(small).params_after == sum(parameter.numel() for parameter in small.parameters())
    balf_fx.save(small, tmp_path / "small.safetensors")
    loaded = balf_fx.load(tmp_path / "small.safetensors", make().double().eval())
    assert sums(loaded) == sums(small)
    assert torch.equal(loaded(x), small(x))


@pytest.mark.usefixtures("any_pivots")
def test_products_in_place_of_convolutions_are_split():
    torch.manual_seed(0)
    model, x = pointwise(), torch.randn(8, 3, 9, 9)
    small = compiled(model, x, allocation={"2": 9}, params=None)
    assert sums(small) == ["2.1_bias"]
    whole = compiled(model, x, allocation={"2": 9}, params=None, pivot=False)
    torch.testing.assert_close(small(x), whole(x), rtol=1e-4, atol=1e-5)


def test_only_the_last_of_the_factors_are_split():
    torch.manual_seed(0)
    small = compiled(Twice().eval(), torch.randn(64, 16), allocation={"a": 4, "b": None}, params=None)
    assert sums(small) == ["a.1_bias", "a.1_bias"]
    assert small.b.bias is not None
    with pytest.raises(NotImplementedError):  # without its bias, it would not be the layer
        small.a(torch.randn(2, 16))


@pytest.mark.parametrize("options", [{"pivot": False}, {"result": "module"}, balf_fx.BALF | {"params": 0.6}])
def test_plain_layers_keep_their_biases(model, options):
    small = compiled(model, torch.randn(8, 5, 16), **options)
    assert not any("_bias" in name for name in small.state_dict())


def test_half_precision_keeps_its_biases(model):
    small = compiled(model.bfloat16(), torch.randn(8, 5, 16, dtype=torch.bfloat16))
    assert sums(small) == []


def test_the_sum_keeps_the_type_of_the_product(model):
    x = torch.randn(8, 5, 16)
    small = compiled(model, x)
    assert sums(small)
    for each in (small, torch.compile(small, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert each(x).dtype is model(x).dtype is torch.bfloat16


def test_gradients_reach_every_parameter(model):
    x = torch.randn(8, 5, 16)
    small = compiled(model, x)
    small(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


@pytest.mark.slow
def test_inductor_fuses_the_bias_with_what_follows(model):
    x = torch.randn(8, 5, 16)
    for pivot in (True, False):
        small = compiled(model, x, allocation={"0": 6, "2": 7, "4": 5}, params=None, pivot=pivot)
        with torch.no_grad():
            found, (code, *_) = run_and_get_code(torch.compile(small), x)
        torch.testing.assert_close(found, small(x))
        assert ("addmm" in code) is not pivot
