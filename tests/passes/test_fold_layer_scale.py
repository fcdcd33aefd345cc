import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.capture.normal_form import capture
from balf_fx.graph.operators import operation
from balf_fx.passes import FoldLayerScale


class Scaled(nn.Module):
    """A residual branch whose output is scaled, with other relayouts between them."""

    def __init__(self, kind, layer=None, shape=(6,)):
        super().__init__()
        self.layer, self.kind = layer or nn.Linear(6, 6), kind
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)
        self.register_buffer("scale", self.gamma.detach() + 1)
        self.dropout = nn.Dropout()

    def forward(self, x):
        return x + WAYS[self.kind](self, x, self.layer(x))


def frozen(y, variance, weight):
    """A BatchNorm that a model writes out."""
    scale = weight * (variance.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
    return y * scale + (weight - 0.5 * scale)


WAYS = {
    "plain": lambda own, x, y: own.gamma * own.dropout(y),
    "in place": lambda own, x, y: y.mul_(own.gamma),
    "images": lambda own, x, y: y.permute(0, 3, 1, 2).mul(own.gamma.reshape(1, -1, 1, 1)).permute(0, 2, 3, 1),
    "heads": lambda own, x, y: (y.view(x.size(0), x.size(1), -1, 2, 3) * own.gamma.view(2, 3)).flatten(-2),
    "other axis": lambda own, x, y: (y.transpose(1, 2) * own.gamma).transpose(1, 2),
    "some": lambda own, x, y: torch.cat([y[..., :3] * own.gamma, y[..., 3:]], -1),
    "read twice": lambda own, x, y: own.gamma * y + y,
    "one number": lambda own, x, y: own.gamma[0] * y,
    "weight read twice": lambda own, x, y: own.gamma * y + F.linear(x, own.layer.weight),
    "half": lambda own, x, y: own.gamma.half() * y,
    "number": lambda own, x, y: 0.5 * y,
    "quotient": lambda own, x, y: y / 3,
    "one entry": lambda own, x, y: own.gamma * y,
    "buffer": lambda own, x, y: own.scale * y,
    "synonym": lambda own, x, y: torch.multiply(y, own.gamma),
    "synonym of a quotient": lambda own, x, y: torch.true_divide(y, 3),
    "sum": lambda own, x, y: own.gamma + y,
    "difference": lambda own, x, y: y - own.scale,
    "sum with a number": lambda own, x, y: 2 + y,
    "frozen norm": lambda own, x, y: frozen(y, own.scale, own.gamma.reshape(1, -1, 1, 1)),
    "sum on other axis": lambda own, x, y: (y.transpose(1, 2) + own.gamma).transpose(1, 2),
    "sum with a product": lambda own, x, y: x @ own.layer.weight.T + own.gamma,
    "difference from a number": lambda own, x, y: 2 - y,
    "sum with a count": lambda own, x, y: y + own.scale.add_(1).sum(),
    "written": lambda own, x, y: (y * own.scale, own.scale.add_(1))[0],
    "reciprocal": lambda own, x, y: 0.5 / y,
    "quotient of parameters": lambda own, x, y: y / own.gamma.square(),
    "infinite": lambda own, x, y: y * float("inf"),
}


CASES = {
    "plain": (nn.Linear(6, 6), (6,)),
    "without a bias": (nn.Linear(6, 6, bias=False), (6,)),
    "in place": (nn.Linear(6, 6), (6,)),
    "images": (nn.Linear(6, 6), (6,)),
    "heads": (nn.Linear(6, 6), (6,)),
    "one entry": (nn.Conv2d(6, 6, 1, groups=2, bias=False), (1, 1)),
    "number": (nn.Linear(6, 6), (6,)),
    "buffer": (nn.Linear(6, 6), (6,)),
    "quotient of parameters": (nn.Linear(6, 6), (6,)),
    "sum": (nn.Linear(6, 6), (6,)),
    "sum without a bias": (nn.Linear(6, 6, bias=False), (6,)),
    "difference": (nn.Linear(6, 6), (6,)),
    "sum with a number": (nn.ConvTranspose2d(6, 6, 3, padding=1, groups=3), (6,)),
    "frozen norm": (nn.Conv2d(6, 6, 3, padding=1, groups=2), (6,)),
    "synonym": (nn.Linear(6, 6), (6,)),
    "synonym of a quotient": (nn.Linear(6, 6), (6,)),
    "quotient": (nn.ConvTranspose2d(6, 6, 3, padding=1, groups=3), (6,)),
    "conv": (nn.Conv2d(6, 6, 3, padding=1, groups=2), (6, 1, 1)),
    "transposed": (nn.ConvTranspose2d(6, 6, 3, padding=1, groups=3), (1, 6, 1, 1)),
}


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_and_its_scale_become_one_layer_that_computes_the_same(name, method):
    layer, shape = CASES[name]
    kind = {"sum without a bias": "sum"} | dict.fromkeys(("without a bias", "conv", "transposed"), "plain")
    kind = kind.get(name, name)
    model = Scaled(kind, layer, shape).double().eval()
    x = torch.randn(6, 6, 6, 6, dtype=torch.float64)
    wanted = model(x)
    weight, gamma = layer.weight.clone(), model.gamma.clone()
    graph_module = capture(model, x, method=method)
    assert FoldLayerScale()(graph_module).modified
    graph_module.recompile()
    torch.testing.assert_close(graph_module(x), wanted, rtol=0, atol=1e-12)
    kept = {path: parameter.numel() for path, parameter in graph_module.named_parameters()}
    assert sum(kept.values()) == layer.weight.numel() + 6 * (layer.bias is not None or "sum" in name)
    assert not any(operation(node) in ("mul", "div", "sub") for node in graph_module.graph.nodes)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(model.gamma, gamma)


@pytest.mark.parametrize(
    "kind",
    [
        *("other axis", "some", "read twice", "one number", "weight read twice", "half"),
        *("reciprocal", "infinite", "written", "sum with a count", "sum on other axis", "difference from a number"),
        "sum with a product",  # which has no argument for a bias
    ],
)
def test_what_is_no_scale_of_each_feature_alone_stays(kind):
    model = Scaled(kind, shape=(3,) if kind == "some" else (6,)).eval()
    x = torch.randn(2, 6, 6, 6) if "other axis" in kind else torch.randn(2, 4, 5, 6)
    x = x[:, 0] if "other axis" in kind else x
    graph_module = capture(model, x)
    assert not FoldLayerScale()(graph_module).modified
    assert torch.equal(graph_module(x), model(x))


def test_layers_that_options_leave_out_keep_their_scale():
    model, x = Scaled("plain").eval(), torch.randn(4, 6)
    assert not FoldLayerScale(exclude=["lay*"])(capture(model, x)).modified
    assert FoldLayerScale(include=["lay*"])(capture(model, x)).modified
    unchanged = balf_fx.prepare(model, x, fold_batchnorm=False)
    assert "gamma" in dict(unchanged.named_parameters())


class Stream(nn.Module):
    """Residual blocks on a stream of narrower features, whose branches may end in a scale and in relayouts."""

    def __init__(self, scaled, moved, factor=1, blocks=4):
        super().__init__()
        self.factor = factor
        self.first = nn.ModuleList(nn.Linear(16, 40) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(40, 16) for _ in range(blocks))
        self.gammas = nn.ParameterList(nn.Parameter(torch.rand(16) + 0.5) for _ in range(blocks))
        self.scaled, self.moved = scaled, moved

    def forward(self, x):
        for first, second, gamma in zip(self.first, self.second, self.gammas, strict=True):
            y = second(torch.tanh(first(x)))
            if self.moved:
                y = y.view(len(x), 4, 16).transpose(1, 2)
                y = y * gamma.view(-1, 1) if self.scaled else y
                y = y.roll(1, 2).mT.reshape(-1, 16).unflatten(0, (-1, 4)).roll(-1, 1)
            elif self.scaled:
                y = y * gamma
            x = x + (y if self.factor == 1 else self.factor * y)
        return x


@pytest.mark.parametrize(
    ("scaled", "moved", "factor"), [(True, False, 1), (False, True, 1), (True, True, 0.5), (False, False, 0.5)]
)
def test_scales_and_relayouts_before_a_sum_do_not_change_the_compressed_model(scaled, moved, factor):
    torch.manual_seed(0)
    plain, model = Stream(scaled=False, moved=False).double().eval(), Stream(scaled, moved, factor).double().eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for layer, gamma in zip(plain.second, plain.gammas, strict=True):
            scale = factor * gamma if scaled else torch.full_like(gamma, factor)
            layer.weight.mul_(scale[:, None])
            layer.bias.mul_(scale)
    batches = [torch.randn(32, 4, 16, dtype=torch.float64) for _ in range(4)]
    torch.testing.assert_close(model(batches[0]), plain(batches[0]), rtol=0, atol=1e-12)
    found = [
        balf_fx.compile(each, batches, flops=0.5, effort="balanced", progress=False)(batches[0])
        for each in (plain, model)
    ]
    assert (found[0] - plain(batches[0])).abs().max() > 0.01
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
