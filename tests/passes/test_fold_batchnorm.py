import copy

import pytest
import torch
from small_models import randomise_batchnorm
from torch import fx, nn
from torch.nn import functional as F

from balf_fx.capture.normal_form import capture
from balf_fx.passes import FoldBatchNorm


class Functional(nn.Module):
    """A layer and BatchNorm as functional calls, without a bias to fold into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        y = F.conv2d(x, self.conv.weight, None, 1, 1, groups=2)
        norm = self.norm
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps)


class Checked(Functional):
    """Looks at the shape of what it normalises, as many models do, and with `values` at more."""

    def __init__(self, values: bool = False) -> None:
        super().__init__()
        self.values = values

    def forward(self, x):
        y, norm = self.conv(x), self.norm
        torch._assert(y.ndim == 4, "images")
        z = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps)
        z = z.reshape(y.shape[0], y.size(1), -1)
        return z + y.mean() if self.values else z


PAIRS = {
    "conv_transpose2d grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), (2, 4, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (2, 2, 4, 4, 4)),
    "linear": (nn.Linear(5, 7), nn.BatchNorm1d(7), (3, 5)),
}


def fold(model: nn.Module, *inputs: torch.Tensor) -> tuple[fx.GraphModule, bool]:
    result = FoldBatchNorm()(capture(model.double().eval(), inputs))
    return result.graph_module, result.modified


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_becomes_one_layer_that_computes_the_same(name):
    layer, norm, shape = copy.deepcopy(PAIRS[name])
    if norm.affine:
        randomise_batchnorm(norm)
    model = nn.Sequential(layer, norm, nn.ReLU()).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    folded, modified = fold(model, x)
    assert modified
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    torch.testing.assert_close(folded(x), model(x))


def test_the_original_model_is_not_folded():
    model = randomise_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).double().eval()
    before = copy.deepcopy(model.state_dict())
    fold(model, torch.randn(1, 3, 4, 4, dtype=torch.float64))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_half_precision_is_folded_in_single_precision():
    model = randomise_batchnorm(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))).to(torch.bfloat16).eval()
    x = torch.randn(1, 8, 4, 4, dtype=torch.bfloat16)
    folded = FoldBatchNorm()(capture(model, x)).graph_module
    exact = copy.deepcopy(model).float()
    fused = nn.utils.fusion.fuse_conv_bn_eval(exact[0], exact[1])
    assert torch.equal(folded.get_submodule("0").weight, fused.weight.to(torch.bfloat16))


class Twice(nn.Module):
    def __init__(self, reads_layer: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.reads_layer = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), reads_layer

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + (y if self.reads_layer else self.bn(self.conv(y)))


class TokenNorm(nn.Module):
    """BatchNorm1d over tokens, not over the linear layer's features; the two happen to be equally many."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.bn(self.linear(x))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Twice(reads_layer=True), (2, 3, 4, 4)),
        (Twice(reads_layer=False), (2, 3, 4, 4)),
        (TokenNorm(), (2, 6, 5)),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), (2, 3, 4, 4)),
    ],
    ids=["output read elsewhere", "called twice", "other axis", "batch statistics"],
)
def test_a_pair_that_folding_would_change_is_left_alone(model, shape):
    x = torch.randn(shape, dtype=torch.float64)
    randomise_batchnorm(model) if not isinstance(model, nn.Sequential) else None
    folded, modified = fold(model, x)
    assert not modified
    torch.testing.assert_close(folded(x), model(x))


def test_a_weight_that_another_module_shares_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    _, modified = fold(randomise_batchnorm(model), torch.randn(1, 3, 4, 4, dtype=torch.float64))
    assert not modified


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", ["functional", *PAIRS])
def test_functional_and_exported_pairs_are_folded(name, method):
    layer, norm, shape = copy.deepcopy(PAIRS.get(name, (Functional(), nn.Identity(), (2, 4, 7, 7))))
    model = randomise_batchnorm(nn.Sequential(layer, norm) if norm.__class__ is nn.Identity or norm.affine else layer)
    model = model.double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    graph_module = capture(model, x, method=method)
    FoldBatchNorm()(graph_module)
    assert not any("batch_norm" in str(node.target) for node in graph_module.graph.nodes)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in graph_module.modules())
    torch.testing.assert_close(graph_module(x), model(x))


@pytest.mark.parametrize("values", [False, True])
def test_looking_at_the_shape_of_a_layers_output_does_not_prevent_folding(values):
    model = randomise_batchnorm(Checked(values)).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded, modified = fold(model, x)
    assert modified is not values
    torch.testing.assert_close(folded(x), model(x))


class Product(nn.Module):
    """BatchNorm behind a product, which has no argument for a bias."""

    def __init__(self, product):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(6, 5)), nn.BatchNorm1d(6)
        self.product = product

    def forward(self, x):
        return self.norm(self.product(x, self.weight))


@pytest.mark.parametrize(
    "product",
    [
        lambda x, weight: x @ weight.t(),
        lambda x, weight: torch.einsum("bi,oi->bo", x, weight),
        lambda x, weight: F.linear(x, weight),
    ],
)
def test_a_product_without_an_argument_for_a_bias_keeps_its_norm(product):
    model, x = randomise_batchnorm(Product(product)), torch.randn(7, 5, dtype=torch.float64)
    folded, _ = fold(model, x)
    torch.testing.assert_close(folded(x), model(x))
