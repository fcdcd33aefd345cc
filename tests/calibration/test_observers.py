import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import balf_fx
from balf_fx.calibration import moments as moments_module
from balf_fx.calibration.moments import Moments, input_columns, input_patches, is_finite, output_columns
from balf_fx.calibration.observers import CovarianceObserver, Recorded, SensitivityObserver, observer_of
from balf_fx.calibration.weights import Weights
from balf_fx.errors import NonFiniteError
from balf_fx.graph.annotation import annotation, sites
from balf_fx.graph.parameters import weight_matrix
from balf_fx.graph.site import ConvGeometry, Site

PROPERTY = settings(max_examples=40, derandomize=True)

CONVS = {
    "conv1d": (nn.Conv1d, {"kernel_size": 3, "padding": 1}, (3, 4, 9)),
    "conv1d same, even kernel": (nn.Conv1d, {"kernel_size": 4, "padding": "same", "dilation": 3}, (3, 4, 13)),
    "conv1d valid, skipping": (nn.Conv1d, {"kernel_size": 2, "stride": 3, "padding": "valid"}, (2, 3, 9)),
    "conv2d": (nn.Conv2d, {"kernel_size": (3, 2), "padding": (1, 0)}, (2, 3, 5, 6)),
    "conv2d strided, dilated, groups": (
        nn.Conv2d,
        {"kernel_size": (2, 3), "stride": (2, 1), "dilation": (3, 2), "padding": (1, 3), "groups": 2},
        (2, 4, 7, 6),
    ),
    "conv2d pointwise, strided": (nn.Conv2d, {"kernel_size": 1, "stride": 2, "groups": 2}, (3, 8, 5, 5)),
    "conv2d pointwise, padded": (nn.Conv2d, {"kernel_size": 1, "padding": (0, 2)}, (3, 4, 5, 5)),
    "conv2d reflect": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"}, (2, 2, 5, 6)),
    "conv2d circular": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"}, (2, 2, 5, 6)),
    "conv2d same, replicate": (
        nn.Conv2d,
        {"kernel_size": (2, 4), "padding": "same", "padding_mode": "replicate"},
        (2, 2, 5, 6),
    ),
    "conv3d": (
        nn.Conv3d,
        {"kernel_size": (1, 2, 3), "stride": (1, 2, 1), "padding": (0, 1, 2), "groups": 2},
        (2, 4, 3, 4, 5),
    ),
    "conv3d circular": (nn.Conv3d, {"kernel_size": 2, "padding": 1, "padding_mode": "circular"}, (2, 2, 3, 4, 3)),
}
SIDES = ["input", "output"]
every_conv = pytest.mark.parametrize(("kind", "side"), [(kind, side) for kind in CONVS for side in SIDES])
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(side, inputs=4):
    module = nn.Linear(inputs, inputs + 3 if side == "input" else inputs - 2).double()
    return module, Site("fc", "linear", "fc.weight", "fc.bias", 1, module.out_features, inputs)


def conv(kind, side):
    """A convolution whose observed side is as asked, its site, and an input."""
    cls, options, shape = CONVS[kind]
    groups = options.get("groups", 1)
    probe = cls(shape[1], groups, **options)
    inputs = probe.weight[0].numel()
    outputs = inputs + 1 if side == "input" else min(2, inputs - 1)
    module = cls(shape[1], outputs * groups, **options).double()
    if options.get("padding") == "same":
        totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    else:
        padding = tuple((p, p) for p in ((0,) * len(shape[2:]) if module.padding == "valid" else module.padding))
    geometry = ConvGeometry(module.kernel_size, module.stride, padding, module.dilation, module.padding_mode)
    site = Site("conv", kind.split()[0], "conv.weight", "conv.bias", groups, outputs, inputs, geometry)
    assert site.side == side
    return module, site, random(len(kind), *shape)


def positions(y, groups):
    """A convolution's output [B, C, *size] as [G, O, n]."""
    return y.reshape(y.shape[0], groups, y.shape[1] // groups, -1).permute(1, 2, 0, 3).flatten(2)


def direct(samples):
    """Moments of [G, F, n] by numpy, from float64 copies of the values."""
    values = samples.detach().double().cpu().numpy()
    scatter = [np.atleast_2d(np.cov(group, bias=True)) * values.shape[-1] for group in values]
    return Moments(values.shape[-1], torch.tensor(values.mean(-1)), torch.tensor(np.stack(scatter)))


def assert_same(actual, expected, tolerance=1e-11):
    """Equal up to `tolerance` of the largest variance and standard deviation."""
    variance = float(expected.covariance().abs().max())
    rounding = 8 * torch.finfo(torch.float64).eps * float(expected.mean.abs().max())
    assert actual.count == expected.count
    assert actual.mean.dtype == actual.scatter.dtype == torch.float64
    torch.testing.assert_close(actual.mean, expected.mean, rtol=0, atol=tolerance * variance**0.5 + rounding)
    torch.testing.assert_close(actual.covariance(), expected.covariance(), rtol=0, atol=tolerance * variance)


def observe(site, *values):
    observer = CovarianceObserver(site)
    for value in values:
        assert observer(value) is None
    return observer.moments


def through(weight, moments):
    """Moments of W x from those of x."""
    mean = (weight @ moments.mean.unsqueeze(-1)).squeeze(-1)
    return Moments(moments.count, mean, weight @ moments.scatter @ weight.mT)


@PROPERTY
@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(2, 30), st.sampled_from([0.0, 1.0, 1e4]))
def test_merged_moments_equal_one_pass_moments_in_any_order_and_grouping(data, groups, features, count, offset):
    samples = random(count, groups, features, count) + offset
    cuts = data.draw(st.lists(st.integers(1, count - 1), unique=True, max_size=4).map(sorted))
    pieces = [direct(piece) for piece in samples.tensor_split(cuts, dim=-1)]
    order = data.draw(st.permutations(range(len(pieces))))
    in_order, shuffled, nested = pieces[0], pieces[order[0]], pieces[-1]
    for piece, index, earlier in zip(pieces[1:], order[1:], pieces[-2::-1], strict=True):
        in_order, shuffled, nested = in_order.merge(piece), shuffled.merge(pieces[index]), earlier.merge(nested)
    for merged in (in_order, shuffled, nested):
        assert_same(merged, direct(samples), 1e-10)


def test_merging_changes_neither_operand():
    one, two = direct(random(0, 1, 3, 5)), direct(random(1, 1, 3, 7))
    before = copy.copy(one.mean), copy.copy(one.scatter), copy.copy(two.mean), copy.copy(two.scatter)
    one.merge(two)
    assert all(torch.equal(a, b) for a, b in zip(before, (one.mean, one.scatter, two.mean, two.scatter), strict=True))


def test_second_moment_about_an_offset_is_the_mean_of_outer_products():
    samples, offset = random(0, 2, 3, 20) + 1, random(1, 2, 3)
    moments = direct(samples)
    for about, shifted in ((offset, samples - offset.unsqueeze(-1)), (None, samples)):
        torch.testing.assert_close(moments.second_moment(about), torch.einsum("gan,gbn->gab", shifted, shifted) / 20)
    torch.testing.assert_close(moments.second_moment(moments.mean), moments.covariance())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("leading", [(), (9,), (2, 5), (2, 3, 4)])
def test_every_leading_index_of_a_linear_layer_is_a_position(side, leading):
    module, site = linear(side)
    assert site.side == side
    x = random(0, *leading, 4)
    value = x if side == "input" else module(x)
    assert_same(observe(site, value), direct(value.reshape(1, -1, value.shape[-1]).mT))


@pytest.mark.parametrize("kind", CONVS)
def test_weight_times_patches_is_the_convolution(kind):
    module, site, x = conv(kind, "input")
    patches = input_patches(x, site.conv, site.groups)
    y = weight_matrix(module.weight, site.groups) @ patches
    assert patches.shape[:2] == (site.groups, site.in_features)
    torch.testing.assert_close(y + module.bias.reshape(site.groups, -1, 1), positions(module(x), site.groups))


@pytest.mark.parametrize("kind", CONVS)
def test_patches_of_some_pixels_are_those_of_all(kind):
    _, site, x = conv(kind, "input")
    patches = input_patches(x, site.conv, site.groups)
    sizes = conv(kind, "input")[0](x).shape[2:]
    pixels = tuple(slice(size // 2, None, 2) for size in sizes)
    some = input_patches(x, site.conv, site.groups, pixels)
    whole = patches.reshape(*patches.shape[:2], len(x), *sizes)
    assert torch.equal(some, whole[(slice(None), slice(None), slice(None), *pixels)].flatten(2))


@every_conv
def test_convolution_statistics_explain_its_output(kind, side):
    module, site, x = conv(kind, side)
    larger = torch.cat([x, random(1, *x.shape)], 2)
    outputs = [positions(module(value), site.groups) for value in (x, larger)]
    moments = observe(site, *([x, larger] if side == "input" else [module(x), module(larger)]))
    bias = module.bias.detach().reshape(site.groups, -1)
    if side == "input":  # W is injective here, so the output's moments pin down the input's
        at_output = through(weight_matrix(module.weight, site.groups), moments)
        moments = Moments(at_output.count, at_output.mean + bias, at_output.scatter)
    assert_same(moments, direct(torch.cat(outputs, -1)))


@every_conv
def test_layout_batching_and_chunking_leave_statistics_as_they_are(kind, side, monkeypatch):
    module, site, x = conv(kind, side)
    x = x.repeat(12, *(1 for _ in x.shape[1:])) + random(2, 12 * len(x), *x.shape[1:])
    value = x if side == "input" else module(x).detach()
    whole = observe(site, value)
    assert_same(observe(site, *value), whole)
    if value.dim() > 3:
        layout = torch.channels_last if value.dim() == 4 else torch.channels_last_3d
        assert_same(observe(site, value.contiguous(memory_format=layout)), whole)
    monkeypatch.setattr(moments_module, "CHUNK_ELEMENTS", 1)
    assert len(list(moments_module._position_chunks(value, site, site.side))) > 1
    assert_same(observe(site, value), whole)


@pytest.mark.parametrize("side", SIDES)
def test_chunked_rows_of_a_linear_layer_add_up(side, monkeypatch):
    module, site = linear(side)
    value = random(0, 7, 13, 4) if side == "input" else module(random(0, 7, 13, 4)).detach()
    whole = observe(site, value)
    monkeypatch.setattr(moments_module, "CHUNK_ELEMENTS", 1)
    assert len(list(moments_module._position_chunks(value, site, site.side))) > 1
    assert_same(observe(site, value), whole)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_empty_values_add_nothing(kind, side):
    module, site, x = (*linear(side), random(0, 6, 4)) if kind == "linear" else conv(kind, side)
    value = x if side == "input" else module(x).detach()
    assert observe(site, value[:0]) is None
    assert_same(observe(site, value[:0], value, value[:0]), observe(site, value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_statistics_of_any_dtype_are_accurate_over_many_batches(dtype):
    _, site = linear("input")
    batches = [(random(seed, 50, 4) + 3).to(dtype) for seed in range(60)]
    rounding = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    # Rounding grows with the number of terms of a sum, and only the 50 of a batch meet in one float32 sum.
    assert_same(observe(site, batches[0]), direct(batches[0].mT.unsqueeze(0)), 50 * rounding)
    assert_same(observe(site, *batches), direct(torch.cat(batches).mT.unsqueeze(0)), 50 * rounding)


@pytest.mark.parametrize("side", SIDES)
def test_small_variance_around_a_large_mean_survives_float32(side):
    module, site, x = conv("conv1d valid, skipping", side)
    shape = (20, *(x if side == "input" else module(x)).shape[1:])
    batches = [(1e4 + random(seed, *shape)).float() for seed in range(3)]
    exact = observe(site, *(batch.double() for batch in batches))
    assert float(exact.covariance().max()) < 2
    assert_same(observe(site, *batches), exact, 1e-5)


def test_a_first_batch_far_from_the_rest_costs_no_accuracy():
    _, site = linear("input")
    rest = [(1e4 + random(seed, 2000, 4)).float() for seed in range(1, 4)]
    batches = [random(0, 4, 4).float(), *rest]
    assert_same(observe(site, *batches), direct(torch.cat(batches).mT.unsqueeze(0)), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_finite_values_whose_squares_overflow_give_finite_statistics(dtype):
    _, site = linear("output")
    batches = [(1e25 * random(seed, 30, 2)).to(dtype) for seed in range(3)]
    assert_same(observe(site, *batches), direct(torch.cat(batches).mT.unsqueeze(0)))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_non_finite_values_name_the_site_and_leave_statistics_untouched(bad, side, first):
    module, site = linear(side)
    observer = CovarianceObserver(site)
    good = random(0, 6, 4) if side == "input" else module(random(0, 6, 4)).detach()
    if not first:
        observer(good)
    before = observer.moments
    poisoned = good.clone()
    poisoned[3, 1] = bad
    with pytest.raises(NonFiniteError, match=f"{side} of site 'fc' .*exclude"):
        observer(poisoned)
    assert observer.moments is before


def test_autocast_does_not_reach_the_statistics():
    _, site = linear("input")
    value = random(0, 40, 4).float()
    alone = observe(site, value)
    with torch.autocast(value.device.type, dtype=torch.bfloat16):
        assert (value.mT @ value).dtype == torch.bfloat16
        inside = observe(site, value)
    assert torch.equal(inside.scatter, alone.scatter)
    assert torch.equal(inside.mean, alone.mean)


def test_observing_keeps_no_autograd_graph():
    _, site = linear("input")
    moments = observe(site, random(0, 5, 4).requires_grad_())
    assert not moments.scatter.requires_grad
    assert not moments.mean.requires_grad


def test_a_copy_shares_what_was_seen_and_goes_its_own_way():
    _, site = linear("input")
    observer = CovarianceObserver(site)
    observer(random(0, 5, 4))
    seen = observer.moments
    twin = copy.deepcopy(observer)
    assert twin.moments is seen
    twin(random(1, 6, 4))
    assert observer.moments is seen
    assert twin.moments.count == 11


def test_reset_forgets():
    _, site = linear("input")
    observer = CovarianceObserver(site)
    observer(100 + random(0, 5, 4))
    observer.reset()
    assert observer.moments is None
    observer(random(1, 6, 4))
    assert_same(observer.moments, observe(site, random(1, 6, 4)), 0.0)


def test_dead_code_elimination_keeps_observers():
    _, site = linear("input")
    root = nn.ModuleDict({"observer": CovarianceObserver(site), "unused": nn.Identity()})
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_module("observer", (x,))
    graph.call_module("unused", (x,))
    graph.output(x)
    graph_module = fx.GraphModule(root, graph)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    assert graph_module.graph.find_nodes(op="call_module", target="unused") == []
    graph_module(random(0, 5, 4))
    assert graph_module.get_submodule("observer").moments.count == 5


@pytest.mark.parametrize("side", ["input", "output"])
def test_positions_without_weight_are_not_read(side):
    _, site = linear(side)
    size = site.in_features if side == "input" else site.out_features
    value, mask = random(0, 6, 5, size), random(1, 6, 5) > 0
    padded = value.masked_fill(~mask.unsqueeze(-1), torch.nan)
    for each in (padded, padded.flatten(0, 1), padded.unsqueeze(2).expand(6, 5, 3, size)):
        observer = CovarianceObserver(site, side=side)
        observer(each, Weights(mask))
        copies = each[0, 0].numel() // size if each.dim() == 4 else 1
        assert_same(observer.moments, observe_side(site, side, value[mask].repeat_interleave(copies, 0)), 1e-12)


def observe_side(site, side, value):
    observer = CovarianceObserver(site, side=side)
    observer(value)
    return observer.moments


@every_conv
def test_the_positions_of_a_convolution_are_those_of_its_output(kind, side):
    module, site, image = conv(kind, side)
    output = module(image).detach()
    assert site.conv.output_sizes(image.shape[2:]) == output.shape[2:]
    weights = (random(1, len(output), *output.shape[2:]) > 0).double() * 2
    value = image if side == "input" else output
    columns = (input_columns if side == "input" else output_columns)(value, site)
    observer = CovarianceObserver(site)
    observer(value, Weights(weights))
    seen = direct(columns[..., weights.flatten() > 0])
    assert_same(observer.moments, Moments(2 * seen.count, seen.mean, 2 * seen.scatter))


def test_an_observer_is_found_by_its_path_and_kind():
    graph_module = balf_fx.prepare(nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(4, 8))
    ((_, (node,)),) = sites(graph_module).items()
    path = annotation(node).observer
    assert observer_of(graph_module, path, CovarianceObserver) is graph_module.get_submodule(path)
    assert observer_of(graph_module, path, SensitivityObserver) is None
    assert observer_of(graph_module, None, CovarianceObserver) is None


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_of_gradients_stay_in_range(scale):
    site = Site("layer", "linear", "layer.weight", None, 1, 3, 8)
    value, gradient = torch.randn(6, 3), torch.randn(6, 3)
    plain, scaled = (SensitivityObserver(site, None, copies=False) for _ in range(2))
    recorded = Recorded(value, value, None, None)
    plain.take(recorded, gradient.double())
    scaled.take(recorded, gradient * scale)
    unit = float(scaled.sample.gradients.unit / plain.sample.gradients.unit)
    assert unit == pytest.approx(scale**2, rel=1e-5)
    torch.testing.assert_close(
        scaled.sample.gradients.scatter / unit, plain.sample.gradients.scatter, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        scaled.sample.moments.scatter / scaled.sample.moments.count, plain.sample.moments.covariance()
    )


@pytest.mark.parametrize("scale", [1e-18, 1e-20, 1e-21, 1e-25, 1e18, 1e25])
def test_moments_are_accurate_at_every_scale(scale):
    site, value = Site("layer", "linear", "layer.weight", None, 1, 8, 3), torch.randn(50, 3) * scale
    observer = CovarianceObserver(site)
    observer(value)
    wide = value.double()
    expected = (wide - wide.mean(0)).mT @ (wide - wide.mean(0)) / 50
    torch.testing.assert_close(observer.moments.covariance()[0] / scale**2, expected / scale**2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "finite"),
    [([1.0, -2.0], True), ([3e38, 3e38], True), ([1.0, math.nan], False), ([math.inf, -math.inf], False)],
    ids=["plain", "a sum that overflows", "NaN", "infinities of both signs"],
)
def test_values_are_finite_also_where_their_sum_is_not(values, finite):
    assert is_finite(torch.tensor(values)) == finite
