"""Quantization after compression, on trained models, and compression of models that are quantized in part."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.nn import functional as F

import balf_fx
from balf_fx.cli.demo import accuracy, load_digits
from balf_fx.errors import ModelError, NoSiteError

pytest.importorskip("sklearn")
quantization = pytest.importorskip("torchao.quantization")

WEIGHTS = quantization.Int8WeightOnlyConfig()
ACTIVATIONS = quantization.Int8DynamicActivationInt8WeightConfig()
INT4 = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """The rows of an image are its tokens."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.zeros(8, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x.squeeze(1)) + self.position).mean(1))


def conv_net() -> nn.Module:
    widths = ((1, 32, 1), (32, 64, 2), (64, 64, 1))
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b, stride in widths
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def train(net: nn.Module, digits, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(digits.train), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(digits.train[chosen]), digits.train_labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@pytest.fixture(scope="module")
def transformer(digits):
    torch.manual_seed(0)
    return train(Transformer(), digits, 250)


@pytest.fixture(scope="module")
def convolutions(digits):
    torch.manual_seed(0)
    return train(conv_net(), digits, 120)


def compress(model, digits, flops=0.6, **options):
    options = {"effort": "balanced", "progress": False, **options}
    return balf_fx.compile(model, digits.calibration.split(64), flops=flops, **options)


@pytest.fixture(scope="module")
def small_transformer(transformer, digits):
    return compress(transformer, digits, flops=0.7)


def top1(model, digits):
    return accuracy(model, digits.test, digits.test_labels)


def saved_bytes(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()


def quantized(model, config, **options):
    result = copy.deepcopy(model)
    quantization.quantize_(result, config, **options)
    return result


def linear_weights(model):
    return [type(layer.weight.data) for layer in model.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("config", [WEIGHTS, ACTIVATIONS], ids=["weights", "activations"])
def test_torchao_quantizes_every_factor(transformer, small_transformer, digits, config):
    assert len(linear_weights(small_transformer)) > len(linear_weights(transformer))
    both = quantized(small_transformer, config)
    assert torch.Tensor not in linear_weights(both)
    sizes = [
        saved_bytes(m.state_dict()) for m in (both, small_transformer, quantized(transformer, config), transformer)
    ]
    assert sizes[0] < 0.45 * sizes[1]
    assert sizes[0] < 0.9 * sizes[2]
    assert sizes[0] < 0.32 * sizes[3]
    assert top1(transformer, digits) > 0.93
    assert top1(small_transformer, digits) > top1(transformer, digits) - 0.04
    assert top1(both, digits) > top1(small_transformer, digits) - 0.01


def test_factors_of_any_rank_take_four_bits(small_transformer, digits):
    both = quantized(small_transformer, INT4)
    assert torch.Tensor not in linear_weights(both)
    assert top1(both, digits) > top1(small_transformer, digits) - 0.06


def test_a_quantized_compressed_model_is_saved_and_loaded(small_transformer, digits):
    both = quantized(small_transformer, WEIGHTS)
    buffer = io.BytesIO()
    torch.save(both.state_dict(), buffer)
    other = copy.deepcopy(small_transformer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    assert torch.equal(other(digits.test), both(digits.test))


@pytest.fixture
def pt2e(load_benchmark):
    if torch.__version__ < (2, 12):
        pytest.skip("the quantizer finds no layers in what torch 2.8 to 2.11 export without strict=True")
    pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    return load_benchmark("quantization").pt2e


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_pt2e_quantizes_every_factor(convolutions, digits, pt2e, capture):
    small = compress(convolutions, digits, capture=capture)
    layers = [module for module in small.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    factors = [name for name, module in small.named_modules() if isinstance(module, nn.Sequential) and len(module) == 2]
    assert factors
    both = pt2e(small, digits.calibration.split(64))
    rounded = [n for n in both.graph.nodes if str(n.target).endswith("dequantize_per_channel.default")]
    called = [n for n in both.graph.nodes if str(n.target) in ("aten.conv2d.default", "aten.linear.default")]
    assert len(rounded) == len(called) >= len(layers)
    assert all(node.args[1] in rounded for node in called)
    size = saved_bytes(both.state_dict())
    assert size < 0.45 * saved_bytes(small.state_dict())
    assert size < 0.3 * saved_bytes(convolutions.state_dict())
    assert top1(convolutions, digits) > 0.95
    assert top1(both, digits) > top1(small, digits) - 0.02


@pytest.mark.usefixtures("any_pivots")
@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_pt2e_takes_the_operations_between_pivots(pt2e, capture):
    """They are no parts of a convolution, in which torchao would look for its only output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 48, 1)).eval()
    batches = [torch.randn(8, 3, 12, 12) for _ in range(2)]
    small = balf_fx.compile(
        model, batches, allocation={"2": 24, "4": 26}, effort="fast", capture=capture, progress=False
    )
    assert [len(small.get_submodule(name)) for name in ("2", "4")] == [2, 2]
    assert small.graph.find_nodes(op="call_function", target=torch.movedim)
    both = pt2e(small, batches)
    rounded = [n for n in both.graph.nodes if str(n.target).endswith("dequantize_per_channel.default")]
    assert len(rounded) == 5
    error = (both(batches[0]) - small(batches[0])).std() / small(batches[0]).std()
    assert error < 0.05


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_inductor_does_not_fuse_the_sum_with_pivots_into_a_quantized_layer(pt2e):
    """Only reference code does: hundreds of times as slow as the layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 64)).eval()
    batches = [torch.randn(8, 32) for _ in range(2)]
    small = balf_fx.compile(model, batches, allocation={"2": 40}, effort="fast", progress=False)
    assert [(layer.in_features, layer.out_features) for layer in small.get_submodule("2")] == [(216, 40), (40, 64)]
    both = pt2e(small, batches)
    counters["inductor"].clear()
    with inductor.patch(freezing=True), torch.no_grad():
        found = torch.compile(both)(batches[0])
    torch.testing.assert_close(found, both(batches[0]), rtol=1e-2, atol=1e-2)
    assert counters["inductor"]["qlinear_weight_prepack_matcher_count"] == 3  # all layers are quantized
    assert counters["inductor"]["qlinear_binary_matcher_count"] == 0


def test_fx_graph_mode_quantizes_every_factor(convolutions, digits):
    ao = pytest.importorskip("torch.ao.quantization", reason="torch no longer ships FX graph mode quantization")
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx", reason="torch no longer ships it")
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch's quantized kernels for x86 are not in this build")
    small = compress(convolutions, digits)
    batches = digits.calibration.split(64)
    prepared = fx.prepare_fx(copy.deepcopy(small), ao.get_default_qconfig_mapping("x86"), (batches[0],))
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    both = fx.convert_fx(prepared)
    assert not any(isinstance(module, nn.Conv2d | nn.Linear) for module in both.modules())
    assert saved_bytes(both.state_dict()) < 0.5 * saved_bytes(small.state_dict())
    assert top1(both, digits) > top1(small, digits) - 0.02


@pytest.fixture
def partly_quantized(transformer):
    """Everything in the first block, and nothing else."""
    return lambda config: quantized(transformer, config, filter_fn=is_linear_of_the_first_block)


def is_linear_of_the_first_block(layer, name):
    return isinstance(layer, nn.Linear) and name.startswith("blocks.0.")


def quantized_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not plain(module)}


def plain(layer):
    return type(layer.weight.data) is torch.Tensor


@pytest.mark.parametrize(
    ("config", "effort", "capture"),
    [
        *((WEIGHTS, effort, "auto") for effort in ("fast", "balanced", "best")),
        *((config, "fast", capture) for config in (ACTIVATIONS, INT4) for capture in ("auto", "export")),
    ],
)
def test_quantized_layers_stay_while_others_are_compressed(partly_quantized, digits, config, effort, capture):
    model = partly_quantized(config)
    before = model.state_dict()
    layers = quantized_layers(model)
    assert len(layers) == 4
    small = compress(model, digits, flops=0.85, effort=effort, capture=capture)
    assert top1(small, digits) > top1(model, digits) - 0.04
    if capture == "auto":
        assert quantized_layers(small) == layers
        refused = {row.name: row.reason for row in balf_fx.report(small).refused}
        assert layers <= set(refused)
        assert all("quantized already" in refused[name] for name in layers)
    changed = {name for name, _ in small.named_modules() if name.startswith("blocks.1.") and name.endswith(".0")}
    assert changed
    with torch.no_grad():
        for name in layers:
            weight = small.get_parameter(f"{name}.weight")
            assert type(weight.data) is type(before[f"{name}.weight"])
            assert torch.equal(weight.dequantize(), before[f"{name}.weight"].dequantize())


def test_with_all_of_the_budget_a_quantized_model_computes_the_same(partly_quantized, digits):
    model = partly_quantized(ACTIVATIONS)
    same = compress(model, digits, flops=1.0, effort="fast")
    torch.testing.assert_close(same(digits.test), model(digits.test))


@pytest.mark.parametrize("options", [{"effort": "balanced"}, {"effort": "best"}, {"factors": "air", "refit": False}])
def test_rounded_inputs_stop_gradients_and_are_refused_where_these_are_needed(partly_quantized, digits, options):
    with pytest.raises(ModelError, match=r"no gradient flows through blocks\.0\.qkv\.weight \(\w+\).*'fast'"):
        compress(partly_quantized(ACTIVATIONS), digits, flops=0.8, **options)


def test_gradients_pass_through_quantized_weights(partly_quantized, digits):
    """The layers before them are judged as if the weights were what they stand for."""
    model = partly_quantized(WEIGHTS)
    plain = copy.deepcopy(model)
    for name in quantized_layers(model):
        layer = plain.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.dequantize())
    embeddings = []
    for subject in (model, plain):
        prepared = balf_fx.prepare(subject, digits.calibration[:64], sensitivity=True, include=["embed"], widths=False)
        balf_fx.calibrate(prepared, digits.calibration.split(64), progress=False)
        (observer,) = [m for m in prepared.modules() if type(m).__name__ == "SensitivityObserver"]
        embeddings.append(observer.sample.gradients.scatter)
    torch.testing.assert_close(*embeddings, rtol=1e-4, atol=1e-9)


def test_a_model_of_quantized_layers_alone_has_no_sites(transformer, digits):
    with pytest.raises(NoSiteError, match=r"blocks\.0\.qkv: its weight is quantized already \(\w+\)"):
        compress(quantized(transformer, WEIGHTS), digits)


class Prepared(nn.Module):
    """A float model with what eager quantization needs later."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.start, self.end = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.sum = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x):
        x = self.start(x)
        return self.end(self.sum.add(x, self.second(F.relu(self.first(x)))))


def test_a_model_that_is_only_prepared_for_quantization_is_compressed():
    model, batches = Prepared().eval(), list(torch.randn(2, 8, 16))
    small = balf_fx.compile(model, batches, params=0.6, progress=False)
    assert balf_fx.report(small).params_kept <= 0.6
    again = balf_fx.compile(model, batches, params=1.0, progress=False)
    torch.testing.assert_close(again(batches[0]), model(batches[0]))
