import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import balf_fx
from balf_fx.graph.site import Reason
from balf_fx.passes import FoldConstants


class Concatenated(nn.Module):
    """A fused projection whose bias has a constant part."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.register_buffer("k_bias", torch.zeros(8))

    def forward(self, x):
        return F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))


class Standardised(nn.Conv2d):
    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


class Twice(nn.Module):
    """One computed weight, used by two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.rand(8, 1) + 0.5)

    def forward(self, x):
        weight = self.weight * self.gain
        return F.linear(torch.tanh(F.linear(x, weight)), weight)


class Calls(nn.Module):
    """Calls a function of its weight, which lies beside it, as the weight of a linear layer."""

    def __init__(self, compute, shape=(8, 8)) -> None:
        super().__init__()
        self.compute, self.weight = compute, nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return F.linear(x, self.compute(self.weight))


class Reader(nn.Module):
    """Its computed weight depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return F.linear(x, self.weight * x.mean())


def folded(model, x, **options):
    return balf_fx.compile(model.eval(), x, flops=1.0, progress=False, **options)


MODELS = {
    "concatenated bias": (Concatenated, (3, 8), ["qkv"]),
    "standardised conv": (lambda: nn.Sequential(Standardised(6, 8, 3)), (2, 6, 5, 5), ["0"]),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 9))), (3, 8), ["0"]),
    "legacy weight_norm": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv2d(6, 8, 3))), (2, 6, 5, 5), ["0"]),
    "spectral_norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 9))), (3, 8), ["0"]),
    "used twice": (Twice, (3, 8), ["weight"]),
    "transposed and scaled": (lambda: Calls(lambda w: (w.t() * 2).t()), (3, 8), ["weight"]),
}


@pytest.mark.filterwarnings("ignore:.*(weight_norm|assigned during export)")
@pytest.mark.parametrize("capture", ["auto", "export"])
@pytest.mark.parametrize("name", MODELS)
def test_a_computed_weight_becomes_a_site_that_computes_the_same(name, capture):
    make, shape, expected = MODELS[name]
    model, x = make(), torch.randn(shape)
    names = list(model.state_dict())
    compiled = folded(model, x, capture=capture)
    assert [row.name for row in balf_fx.report(compiled).sites] == expected
    assert balf_fx.report(compiled).flops_in_sites == 1.0
    torch.testing.assert_close(compiled(x), model(x))
    smaller = balf_fx.compile(model, x, flops=0.9, progress=False, capture=capture)
    assert balf_fx.report(smaller).flops_kept <= 0.9
    assert list(model.state_dict()) == names


def test_what_it_was_computed_from_is_gone():
    compiled = folded(Twice(), torch.randn(3, 8))
    assert {name: tuple(value.shape) for name, value in compiled.named_parameters()} == {"weight": (8, 8)}
    assert not any(node.target in (torch.mul, "mul") for node in compiled.graph.nodes)


def random_weight(weight):
    return weight + torch.rand_like(weight)


def changed_in_place(weight):
    return weight.detach().mul_(1.0)


def changed_through_a_view(weight):
    copied = weight.clone()
    copied[:4].zero_()
    return copied * 2


@pytest.mark.parametrize(
    "compute",
    [random_weight, changed_in_place, changed_through_a_view, lambda w: w.repeat(2, 2)[:8, 1:9].repeat(3, 1)],
    ids=["random", "in place", "in place, through a view", "larger"],
)
def test_what_is_not_constant_or_would_grow_stays(compute):
    model = Calls(compute)
    graph_module = fx.symbolic_trace(model)
    before, x = graph_module.code, torch.randn(3, 8)
    result = FoldConstants()(graph_module)
    assert not result.modified
    assert graph_module.code == before
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(graph_module(x), expected)


def test_weights_that_depend_on_the_input_are_refused():
    with pytest.raises(balf_fx.BalfError, match=Reason.COMPUTED.value):
        folded(Reader(), torch.randn(3, 8))


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_activations_that_change_in_place_do_not_prevent_folding(capture):
    model, x = nn.Sequential(Twice(), nn.ReLU(inplace=True), Standardised(3, 8, 3)), torch.randn(2, 3, 8, 8)
    compiled = folded(model, x, capture=capture)
    assert balf_fx.report(compiled).flops_in_sites == 1.0
    torch.testing.assert_close(compiled(x), model(x))


class Beside(nn.Module):
    """Calls a layer, and reads its weight in another way too."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.compute, self.layer = compute, nn.Linear(32, 32)

    def forward(self, x):
        return F.linear(self.layer(x).relu(), self.compute(self.layer.weight))


@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("compute", [lambda w: w[:16], lambda w: w * 0.5], ids=["some rows", "scaled"])
def test_a_weight_that_is_also_computed_with_is_not_copied(compute, capture, effort):
    """The model would grow; so the layer keeps its weight beside its factors, for the other one."""
    model, x = Beside(compute).eval(), torch.randn(64, 32)
    compressed = balf_fx.compile(model, x, flops=0.6, effort=effort, capture=capture, progress=False)
    report = balf_fx.report(compressed)
    assert {row.name for row in report.sites} == {"layer_factors"}
    assert report.params_after == sum(parameter.numel() for parameter in compressed.parameters())
    for budget in ({"flops": 1.0}, {"params": 1.0}):
        whole = balf_fx.compile(model, x, **budget, effort=effort, capture=capture, progress=False)
        torch.testing.assert_close(whole(x), model(x))
        assert sum(p.numel() for p in whole.parameters()) == sum(p.numel() for p in model.parameters())


class Rows(nn.Module):
    """Its layers are rows of one weight, read one after the other or overlapping."""

    def __init__(self, size) -> None:
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.randn(24, 8)), size

    def forward(self, x):
        return [F.linear(x, self.weight[start : start + self.size]) for start in range(0, 24, 8)]


@pytest.mark.parametrize(("size", "is_folded"), [(8, True), (16, False)], ids=["apart", "overlapping"])
def test_rows_that_overlap_stay_in_one_weight(size, is_folded):
    model, x = Rows(size), torch.randn(3, 8)
    graph_module = fx.symbolic_trace(model)
    assert FoldConstants()(graph_module).modified is is_folded
    graph_module.delete_all_unused_submodules()
    assert all(map(torch.equal, graph_module(x), model(x)))
    assert len(dict(graph_module.named_parameters())) == (3 if is_folded else 1)


class Repeated(nn.Module):
    """Calls a layer with a computed weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_a_weight_that_is_computed_twice_is_stored_once(capture):
    model, x = Repeated().eval(), torch.randn(3, 8)
    compiled = folded(model, x, capture=capture)
    assert sum(parameter.numel() for parameter in compiled.parameters()) == 8 * 8 + 8
    assert len(balf_fx.report(compiled).sites) == 1
    torch.testing.assert_close(compiled(x), model(x))


class Orthogonal(nn.Linear):
    """A weight whose computation reads each of its values several times (Bjorck and Bowie 1971)."""

    def forward(self, x):
        weight = self.weight / self.weight.norm()
        for _ in range(30):
            weight = 1.5 * weight - 0.5 * weight @ (weight.T @ weight)
        return F.linear(x, weight, self.bias)


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_a_weight_that_is_computed_in_many_steps(capture):
    torch.manual_seed(0)
    model, x = nn.Sequential(Orthogonal(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    graph_module = balf_fx.prepare(model, x, capture=capture)
    torch.testing.assert_close(graph_module(x), model(x))
    weight = dict(graph_module.named_parameters())["0.weight"]
    assert not torch.allclose(weight, model[0].weight)
