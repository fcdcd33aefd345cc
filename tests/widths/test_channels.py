import itertools

import pytest
import torch
from architectures import CHANNELS, ROWS, Convs, Mlp, Transformer, make, rewritten, widths
from families import make_redundant
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.graph.annotation import graph_record
from balf_fx.passes import Score

IMAGE, ROW = torch.randn(4, 3, 7, 7), torch.randn(4, *ROWS)
FOUND = {  # producers, consumers and what lies between, of each width
    "mlp": {"down": ({"up"}, ["down"], set(), 32)},
    "gated mlp": {"w2": ({"w1", "w3"}, ["w2"], set(), 32)},
    "scaled mlp": {"down": ({"up"}, ["down"], {"gamma"}, 32)},
    "convs": {"second": ({"first"}, ["second"], set(), 16), "head": ({"second"}, ["head"], set(), 12)},
    "transposed": {"second": ({"first"}, ["second"], set(), 16)},
    "inverted residual": {
        "block.4": ({"block_0"}, ["block_4"], {"block_2"}, 32),
        "block.0": ({"stem", "block_4"}, ["block_0", "head"], set(), 8),
    },
    "squeeze and excite": {
        "last": ({"first", "expand"}, ["last", "reduce"], set(), 32),
        "expand": ({"reduce"}, ["expand"], set(), 8),
        "head": ({"last"}, ["head"], set(), 12),
    },
    "pooled": {"head": ({"conv"}, ["head"], set(), 32)},
    "joined": {
        "three.0": ({"squeeze_0"}, ["three_0", "one_0"], {"squeeze_2"}, 8),
        "last": ({"one_0", "three_0"}, ["last", "wide"], {"one_2", "three_2"}, 24),
    },
    "aggregated": {
        "third.0": (
            {"first_0", "second_0", "third_0"},
            ["third_0", "second_0", "last"],
            {"first_2", "second_2", "third_2"},
            30,
        )
    },
    "skip": {
        "middle.0": ({"up", "down_0"}, ["middle_0", "last"], {"down_2"}, 22),
        "up": ({"middle_0"}, ["up"], {"middle_2"}, 16),
    },
    "chain": {
        f"layers.{index}": ({f"layers_{index - 1}"}, [f"layers_{index}"], set(), n)
        for index, n in ((1, 16), (2, 24), (3, 16))
    },
    "normalised": {
        "second": ({"first"}, ["second"], {"norm"}, 32),
        "head": ({"second"}, ["head"], {"group_norm", "gain", "offset"}, 24),
    },
    "grouped convs": {"last": ({"first"}, ["last"], {"middle"}, 32), "head": ({"last"}, ["head"], set(), 16)},
}


def channels(model, x, capture="symbolic_trace"):
    return {name: w for name, w in widths(model.eval(), x, capture).items() if w.kind == "channels"}


@pytest.mark.parametrize("name", CHANNELS)
def test_what_is_found(name):
    model, batches = make(name)
    found = channels(model, batches[0])
    assert set(found) == set(FOUND[name])
    for width, (producers, consumers, between, features) in FOUND[name].items():
        own = found[width]
        assert set(own.producers) == producers
        assert list(own.consumers) == consumers  # the costliest first
        assert set(own.between) == between
        assert own.features == features
        held = [own.held_by(name) or range(features) for name in own.producers]
        assert own.rows == tuple(tuple(range(len(each))) for each in held)
        assert (own.heads, own.repeat, own.product) == (1, 1, None)


@pytest.mark.parametrize("name", CHANNELS)
def test_exported_graphs_have_the_same(name):
    model, batches = make(name)
    traced, exported = (channels(model, batches[0], method) for method in ("symbolic_trace", "export"))
    assert set(traced) == set(exported)
    for width, own in traced.items():
        other = exported[width]
        assert own.features == other.features
        for side in ("producers", "consumers"):
            assert len(getattr(own, side)) == len(getattr(other, side))
        assert bool(own.between) == bool(other.between)  # a module, or each of its tensors
        assert set(own.branches) == set(other.branches)


ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU6(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.Hardswish(), nn.LeakyReLU()),
    *(nn.Identity(), nn.Dropout(0.3), nn.Sequential(nn.ELU(), nn.Dropout(0.1), nn.Mish())),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_what_treats_each_feature_alone(activation):
    assert list(channels(Mlp(activation), ROW)) == ["down"]


SPATIAL = [
    *(nn.ZeroPad2d((0, 1, 0, 1)), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.ConstantPad2d(1, 0.5)),
    *(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(4), nn.Upsample(scale_factor=2)),
    nn.Upsample(scale_factor=2, mode="bilinear"),
]


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("module", SPATIAL, ids=str)
def test_what_pools_resizes_or_pads_the_image(module, capture):
    first, second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)
    model = nn.Sequential(first, nn.ReLU(), module, nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), second)
    with torch.no_grad():
        first.weight[8:], first.bias[8:] = first.weight[:8], first.bias[:8]  # eight channels would be enough
        model[3].weight[8:], model[3].bias[8:] = model[3].weight[:8], model[3].bias[:8]
    x = torch.randn(16, 3, 9, 9)
    assert [own.features for own in channels(model, x, capture).values()] == [16]
    small = balf_fx.compile(model.eval(), [x], flops=0.55, capture=capture, progress=False)
    assert [own.size for own in balf_fx.plan(small).widths] == [8]
    torch.testing.assert_close(small(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("function", [lambda y: F.max_pool1d(y, 2), lambda y: F.pad(y, (1, 1))], ids=["pool", "pad"])
def test_what_pools_or_pads_the_features_themselves(function):
    class Features(Mlp):
        def forward(self, x):
            return self.down(function(self.up(x))[..., : self.down.in_features])

    model = Features(nn.ReLU())
    model.down = nn.Linear(16, model.down.out_features)
    assert not channels(model, ROW)


class Whole(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


MIXING = {
    "LayerNorm": nn.LayerNorm(32),
    "F.layer_norm": Whole(lambda x: F.layer_norm(x, (32,))),
    "softmax": nn.Softmax(-1),
    "shared PReLU": (lambda slopes: nn.Sequential(slopes, nn.ReLU(), slopes))(nn.PReLU(32)),
    "sorted where": Whole(lambda x: torch.where(x > 0, x, x.flip(-1))),
    "mean of features": Whole(lambda x: x - x.mean(-1, keepdim=True)),
    "norm of features": Whole(lambda x: F.normalize(x, dim=-1)),
    "flip": Whole(lambda x: x.flip(-1)),
    "roll": Whole(lambda x: x.roll(1, -1)),
    "slice and join": Whole(lambda x: torch.cat([x[:, 16:], x[:, :16]], -1)),
    "cumsum": Whole(lambda x: x.cumsum(-1)),
    "reshape that mixes": Whole(lambda x: x.reshape(x.shape[0], 2, 16).flatten(1).reshape(-1, 16, 2).mT.flatten(1)),
    "glu": Whole(lambda x: torch.cat([F.glu(x), F.glu(x)], -1)),
    "product of features": Whole(lambda x: (x.unsqueeze(-1) @ x.unsqueeze(-2)).sum(-1)),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_features_or_counts_them(name):
    assert channels(Mlp(MIXING[name]), ROW) == {}


SEPARATE = {
    "one slope": lambda: nn.PReLU(),
    "slopes": lambda: nn.PReLU(16),
    "batch norm": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(16)),
    "instance norm": lambda: nn.Sequential(nn.InstanceNorm2d(16), nn.ReLU()),
    "affine instance norm": lambda: nn.InstanceNorm2d(16, affine=True, track_running_stats=True),
    "branches": lambda: Whole(lambda x: torch.where(x > 0.1, x, x.masked_fill(x < -0.1, 0.0).lerp(x, 0.5))),
    "sums of pixels": lambda: Whole(lambda x: x * x.amax((2, 3), keepdim=True) / x.square().sum((2, 3), keepdim=True)),
}


@pytest.mark.parametrize(("method", "result"), [("symbolic_trace", "graph"), ("export", "graph"), ("auto", "module")])
@pytest.mark.parametrize("name", SEPARATE)
def test_what_treats_each_channel_separately_loses_those_that_repeat_others(name, method, result):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), SEPARATE[name](), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(72, 4))
    for tensor in (*model[1].parameters(), *model[1].buffers()):
        if tensor.numel() > 1:
            tensor.data.uniform_(0.5, 1.5)
    for tensor in (*model[0].parameters(), *model[1].parameters(), *model[1].buffers()):
        if tensor.numel() > 1:
            tensor.data[8:] = tensor.data[:8]
    model, batches = model.eval(), list(torch.randn(2, 32, 3, 7, 7))
    options = {"dense": ["*"], "effort": "balanced", "capture": method, "result": result, "progress": False}
    small = balf_fx.compile(model, batches, params=0.75, **options)
    assert balf_fx.report(small).params_after == sum(p.numel() for p in small.parameters())
    assert balf_fx.report(small).widths[0].features_after <= 12
    answer = model(batches[0])
    assert float((small(batches[0]).detach() - answer).norm() / answer.norm()) < 2e-3


class FlatNorm(nn.Module):
    """A linear layer with a BatchNorm over all positions, as LeViT has it."""

    def __init__(self, inputs, outputs, function):
        super().__init__()
        self.linear, self.norm, self.function = nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), function

    def forward(self, x):
        x = self.linear(x)
        return self.function(self.norm(x.flatten(0, 1)), x)


@pytest.mark.parametrize("result", ["graph", "module"])
@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize(
    "function", [lambda flat, x: flat.reshape_as(x), lambda flat, x: flat.view_as(x)], ids=["reshape", "view"]
)
def test_a_value_may_get_the_sizes_of_another(function, method, result):
    model = nn.Sequential(FlatNorm(12, 32, function), nn.ReLU(), FlatNorm(32, 12, function)).eval()
    for tensor in (*model[0].parameters(), *model[0].buffers()):
        if tensor.dim() > 0:
            tensor.data[16:] = tensor.data[:16]
    batches = list(torch.randn(2, 32, 6, 12))
    options = {"dense": ["*"], "effort": "balanced", "capture": method, "result": result, "progress": False}
    small = balf_fx.compile(model, batches, flops=0.6, **options)
    assert [width.features_after for width in balf_fx.report(small).widths] == [19]
    for size in (1, 32):
        answer = model(batches[0][:size]).detach()
        assert float((small(batches[0][:size]).detach() - answer).norm() / answer.norm()) < 2e-3


SIZES = {
    "size": lambda x: x * x.size(-1),
    "shape": lambda x: x + x.shape[1],
    "another size": lambda x: x * x.size(0),
    "another item": lambda x: x + x.shape[0],
    "rank": lambda x: x * x.dim(),
    "reshape": lambda x: x.reshape(x.shape[0], 32),
    "view": lambda x: x.view(-1, x.size(-1)),
    "view of a shape": lambda x: x.view(x.shape),
    "sum of shapes": lambda x: x.view(x.size()[:-1] + (32,)),  # noqa: RUF005
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_stay_those_of_the_model(name):
    """Shapes may be read: they are those of the original model wherever a reshape does not need the new ones."""
    model = Mlp(Whole(SIZES[name])).double().eval().requires_grad_(False)
    prepared = balf_fx.prepare(model, ROW.double(), factors="sensitivity", capture="symbolic_trace")
    sizes = make_redundant(prepared)
    Score("svd")(prepared)
    whole, narrow = rewritten(prepared, {}), rewritten(prepared, sizes)
    assert narrow.get_submodule("up").out_features == 16
    torch.testing.assert_close(narrow(ROW[:3].double()), whole(ROW[:3].double()))


def test_batch_statistics_of_a_feature_are_not_across_features():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 12, 1)

        def forward(self, x):
            x = self.first(x)
            return self.second(x - x.mean((2, 3), keepdim=True))

    assert list(channels(Net(), IMAGE)) == ["second"]


def test_outputs_of_the_graph_keep_their_features():
    class Net(Mlp):
        def forward(self, x):
            hidden = self.act(self.up(x))
            return self.down(hidden), hidden

    assert channels(Net(), ROW) == {}


def test_features_of_an_input_stay():
    class Net(Mlp):
        def forward(self, x):
            return self.down(self.up(x) + torch.cat([x, x, x[:, :8]], -1))

    assert channels(Net(), ROW) == {}


def test_the_residual_stream_of_a_transformer_stays():
    model, batches = make("transformer")
    assert isinstance(model, Transformer)
    assert list(channels(model, batches[0])) == ["down"]


def test_a_stream_with_many_layers_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(12, 16), nn.Linear(16, 10)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(3)
            )

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    assert set(channels(Net(), ROW)) == {"blocks.0.2", "blocks.1.2", "blocks.2.2"}


@pytest.mark.parametrize("first", [True, False])
def test_shared_weights_stay(first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.other = nn.Linear(12, 32), nn.Linear(32, 10), nn.Linear(32, 10)

        def forward(self, x):
            if first:
                return self.down(self.up(x).relu()) + self.other(self.up(2 * x))
            return self.down(self.up(x).relu()) + self.down(self.up(2 * x))

    assert channels(Net(), ROW) == {}


def test_a_tied_weight_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up = nn.Embedding(20, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.up(self.embed(x)).relu())

    model = Net().eval()
    assert channels(model, torch.zeros(4, 5, dtype=torch.long)) == {}


@pytest.mark.parametrize("groups", [(2, 1), (1, 2)])
def test_grouped_convolutions_stay(groups):
    class Net(Convs):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(4, 16, 3, groups=groups[0])
            self.second = nn.Conv2d(16, 12, 3, groups=groups[1])

    assert "second" not in channels(Net(), torch.randn(4, 4, 7, 7))


def test_a_depthwise_convolution_with_a_multiplier_stays():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, groups=16), nn.Conv2d(32, 10, 1))
    assert channels(model, IMAGE) == {}


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
def test_transposed_convolutions_write_and_read_features(method):
    model = nn.Sequential(nn.ConvTranspose2d(3, 16, 2), nn.ReLU(), nn.ConvTranspose2d(16, 10, 3, stride=2), nn.ReLU())
    found = channels(model, IMAGE, method)
    assert [(width.features, len(width.producers), len(width.consumers)) for width in found.values()] == [(16, 1, 1)]


def test_grouped_transposed_convolutions_stay():
    model = nn.Sequential(nn.ConvTranspose2d(4, 16, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(16, 16, 3, groups=16))
    assert channels(model, torch.randn(2, 4, 7, 7)) == {}


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
def test_flattened_positions_are_no_features(method):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 10))
    assert channels(model, IMAGE, method) == {}


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(5), nn.AvgPool2d(5)], ids=str)
@pytest.mark.parametrize("flatten", [nn.Flatten(), Whole(lambda x: x.flatten(1)), Whole(lambda x: x.mean((-2, -1)))])
def test_pools_keep_features_apart(pool, flatten):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), pool, flatten, nn.Linear(16, 10))
    assert list(channels(model, IMAGE)) == ["4"]


def test_linear_layers_read_the_last_axis_only():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Linear(7, 10))
    assert channels(model, IMAGE) == {}
    square = nn.Sequential(nn.Conv2d(3, 7, 1), nn.ReLU(), nn.Linear(7, 10))
    assert channels(square, IMAGE) == {}


def test_few_features_are_not_worth_it():
    assert list(channels(Mlp(hidden=8), ROW)) == ["down"]
    assert channels(Mlp(hidden=7), ROW) == {}


def test_excluded_layers_stay():
    model = Mlp().eval()
    prepared = balf_fx.prepare(model, ROW, factors="sensitivity", exclude=["up"])
    assert graph_record(prepared).widths == ()


def test_constants_used_elsewhere_stay():
    class Net(Mlp):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(32))

        def forward(self, x):
            return self.down(F.gelu(self.up(x)) * self.gamma) + x.sum() * self.gamma.sum()

    assert channels(Net(), ROW) == {}


def test_a_constant_along_two_axes_stays():
    class Net(Mlp):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(32, 32))

        def forward(self, x):
            return self.down(self.up(x) * self.table)

    assert channels(Net(), torch.randn(4, 32, 12)) == {}


def test_scalars_and_broadcasts_pass():
    class Net(Mlp):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.down(self.up(x) * self.scale + self.shift + x[:, :1])

    found = channels(Net(), ROW)
    assert list(found) == ["down"]
    assert found["down"].between == ()


def test_widths_of_a_long_chain_are_all_found():
    sizes = (12, 64, 40, 32, 24, 16, 8, 16, 10)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    assert set(channels(nn.Sequential(*layers), ROW)) == set(map(str, range(1, 8)))


def test_padding_of_pixels_passes():
    class Net(Convs):
        def forward(self, x):
            x = F.pad(self.first(x), (1, 1, 1, 1))
            return self.head(self.second(x).mean((2, 3)))

    assert set(channels(Net(), IMAGE)) == {"second", "head"}

    class Padded(Convs):
        def __init__(self):
            super().__init__()
            self.second = nn.Conv2d(18, 12, 3)

        def forward(self, x):
            x = F.pad(self.first(x), (0, 0, 0, 0, 1, 1))
            return self.head(self.second(x).mean((2, 3)))

    assert set(channels(Padded(), IMAGE)) == {"head"}


class Spatial(nn.Module):
    """A depthwise convolution along another axis than that of the features, which has as many entries."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 10)
        self.mix = nn.Conv2d(32, 32, 3, padding=1, groups=32)

    def forward(self, x):
        return self.head(self.down(torch.relu(self.mix(self.up(x)))).mean((1, 2)))


@pytest.mark.usefixtures("any_pivots")
def test_a_depthwise_convolution_along_another_axis_mixes_the_features():
    model = Spatial().double().eval()
    with torch.no_grad():
        model.down.weight.copy_(torch.randn(16, 5) @ torch.randn(5, 32) / 10)
    batches = [torch.randn(4, 32, 8, 16, dtype=torch.float64) for _ in range(2)]
    assert set(channels(Spatial(), batches[0].float())) == {"head"}  # what is pooled behind `down`
    small = balf_fx.compile(model, batches, progress=False)
    assert balf_fx.report(small).flops_kept < 1
    torch.testing.assert_close(small(batches[0]), model(batches[0]), rtol=0, atol=1e-6)
    balf_fx.compile(model, batches, flops=0.5, progress=False)(batches[0])
