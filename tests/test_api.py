import copy
import io
import pickle

import pytest
import torch
from small_models import ConvNet, randomise_batchnorm
from torch import fx, nn
from torch.utils.data import DataLoader, TensorDataset

import balf_fx
from balf_fx.errors import (
    BudgetError,
    CalibrationError,
    CaptureError,
    NonFiniteError,
    NoSiteError,
    NotCalibratedError,
    OptionError,
    TrainingModeError,
)
from balf_fx.graph.flops import count_flops


def compress(model: nn.Module, batches, **options) -> fx.GraphModule:
    return balf_fx.compile(model, batches, progress=False, **({"flops": 0.6} | options))


def snapshot(model: nn.Module):
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    return copy.deepcopy(model.state_dict()), modes, hooks, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("measure", ["flops", "params"])
@pytest.mark.parametrize("target", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("allocation", ["budget", "uniform", "energy"])
def test_the_budget_holds_as_counted_on_the_result(measure, target, allocation, images):
    model = randomise_batchnorm(ConvNet(48)).eval()
    compressed = compress(model, images, **{"flops": None, measure: target}, allocation=allocation)
    report = balf_fx.report(compressed)
    flops = count_flops(compressed, images[0]), count_flops(model, images[0])
    params = [sum(p.numel() for p in module.parameters()) for module in (compressed, model)]
    assert (report.flops_after, report.flops_before) == flops
    assert [report.params_after, report.params_before] == params
    kept = report.flops_kept if measure == "flops" else report.params_kept
    assert target - 0.005 <= kept <= target


def test_the_whole_budget_returns_the_same_function(conv_net, images):
    for options in ({"flops": 1.0}, {"flops": 1, "fold_batchnorm": False}, {"flops": None, "params": 1.0}):
        compressed = compress(conv_net.double(), [image.double() for image in images], **options)
        torch.testing.assert_close(compressed(images[0].double()), conv_net(images[0].double()))


def test_untouched_layers_keep_their_names(conv_net, images):
    compressed = compress(conv_net, images, allocation={"block.0": 4}, flops=None, fold_batchnorm=False, effort="fast")
    before, after = conv_net.state_dict(), compressed.state_dict()
    assert set(after) - set(before) == {"block.0.0.weight", "block.0.1.weight", "block.0.1.bias"}
    assert set(before) - set(after) == {"block.0.weight"}
    assert all(torch.equal(after[key], before[key]) for key in set(after) & set(before))


def test_the_model_and_the_random_state_stay_as_they_are(conv_net, images):
    for parameter in conv_net.block.parameters():
        parameter.requires_grad_(False)
    state, *rest = snapshot(conv_net)
    random_state = torch.get_rng_state()
    compressed = compress(conv_net, DataLoader(TensorDataset(torch.cat(images)), batch_size=8, shuffle=True))
    after, *rest_after = snapshot(conv_net)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert rest_after == rest
    assert all(torch.equal(state[key], after[key]) for key in state)
    original = {parameter.data_ptr() for parameter in conv_net.parameters()}
    assert not any(parameter.data_ptr() in original for parameter in compressed.parameters())


class Tied(nn.Module):
    """Two layers with one weight, in features last, and a table with a view of its memory."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.first.weight = nn.Parameter(self.first.weight.detach().to(memory_format=torch.channels_last))
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(2, 16, 1, 1), requires_grad=False)
        self.register_buffer("shift", self.scale.detach()[0])
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))) * self.scale[1] + self.shift)


@pytest.mark.parametrize("result", ["graph", "module"])
def test_what_is_kept_has_its_own_memory_and_stays_tied(result):
    torch.manual_seed(0)
    model, batches = Tied().eval(), [torch.randn(8, 16, 6, 6)]
    small = compress(model, batches, flops=None, allocation={"last": 2}, effort="fast", result=result)
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {name: tensor for name, tensor in small.state_dict(keep_vars=True).items() if name in model.state_dict()}
    assert {"first.weight", "second.weight", "scale"} <= set(kept)
    assert not any(tensor.untyped_storage().data_ptr() in held for tensor in small.state_dict().values())
    assert kept["first.weight"] is kept["second.weight"]
    assert kept["first.weight"].stride() == model.first.weight.stride()
    assert not kept["scale"].requires_grad


@pytest.mark.parametrize("options", [{"effort": "best"}, {"factors": "air"}])
def test_hooks_on_the_parameters_of_the_model_are_not_called(options, conv_net, images):
    called = []
    for parameter in conv_net.parameters():
        parameter.register_hook(called.append)
    compress(conv_net, images, **options)
    assert not called


def test_a_parameter_that_forward_changes_stays_as_it_is(images):
    class Drifting(ConvNet):
        def forward(self, x):
            self.head.weight.data.mul_(0.5)
            return super().forward(x)

    model = Drifting().eval()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError):
        compress(model, images)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_no_global_state_changes(conv_net, images):
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    with torch.inference_mode():
        compressed = compress(conv_net, images)
    assert not any(parameter.is_inference() for parameter in compressed.parameters())
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, gradients)
    assert torch.get_default_dtype() is torch.float32


def test_the_result_is_deterministic(conv_net, images):
    first, second = (compress(conv_net, images).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_many_budgets_from_one_calibration(conv_net, images):
    prepared = balf_fx.prepare(conv_net, images[0])
    balf_fx.calibrate(prepared, images, progress=False)
    shares = [balf_fx.report(balf_fx.convert(prepared, flops=f, progress=False)).flops_kept for f in (0.8, 0.6, 0.4)]
    assert shares == sorted(shares, reverse=True)
    same = compress(conv_net, images, flops=0.6, effort="fast").state_dict()
    again = balf_fx.convert(prepared, flops=0.6, progress=False).state_dict()
    assert all(torch.equal(same[key], again[key]) for key in same)
    prepared(images[0])


def test_more_calibration_after_a_conversion_counts(conv_net, images):
    prepared = balf_fx.prepare(conv_net, images[0])
    prepared(images[0])
    balf_fx.convert(prepared, flops=0.6, progress=False)
    for image in images[1:]:
        prepared(image)
    late = balf_fx.convert(prepared, flops=0.6, progress=False).state_dict()
    early = compress(conv_net, images, effort="fast").state_dict()
    assert all(torch.allclose(late[key], value) for key, value in early.items())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, y=None, *, scale=1.0):
        return self.a(x) + (0 if y is None else self.b(y)) * scale


def test_batches_in_every_form_give_the_same_result(conv_net, images):
    labels = torch.zeros(8, dtype=torch.int64)
    loader = DataLoader(TensorDataset(torch.cat(images), torch.zeros(32, dtype=torch.int64)), batch_size=8)
    forms = {
        "list": images,
        "generator": (image for image in images),
        "tuples": [(image,) for image in images],
        "labelled": [(image, labels) for image in images],
        "keywords": [{"x": image} for image in images],
        "keywords, labelled": [{"x": image, "labels": labels} for image in images],
        "loader": loader,
    }
    expected = compress(conv_net, images).state_dict()
    for name, form in forms.items():
        got = compress(conv_net, form).state_dict()
        assert all(torch.equal(got[key], value) for key, value in expected.items()), name
    own = compress(conv_net, [{"images": i} for i in images], forward=lambda model, batch: model(batch["images"]))
    assert all(torch.equal(own.state_dict()[key], value) for key, value in expected.items())


def test_keyword_and_optional_arguments():
    model, x, y = TwoInputs().double(), *torch.randn(2, 20, 16, dtype=torch.float64)
    both = compress(model, [{"x": x, "y": y, "scale": 2.0}], flops=1.0)
    torch.testing.assert_close(both(x, y, scale=2.0), model(x, y, scale=2.0))
    with pytest.raises(AssertionError, match=r"'scale' was 2\.0 when the graph was captured"):
        both(x, y, scale=3.0)
    alone = compress(model, x, flops=1.0)
    torch.testing.assert_close(alone(x), model(x))
    with pytest.raises(AssertionError, match="'y' was None when the graph was captured"):
        alone(x, y)
    assert [row.name for row in balf_fx.report(alone).sites] == ["a"]


def test_batches_may_differ_in_shape(conv_net):
    batches = [torch.randn(shape) for shape in ((2, 3, 12, 12), (5, 3, 16, 8), (1, 3, 20, 20))]
    assert compress(conv_net, batches)(batches[1]).shape == (5, 10)


@pytest.mark.parametrize(
    "batches",
    [torch.zeros(4, 3, 12, 12), torch.ones(1, 3, 12, 12), torch.randn(1, 3, 4, 4)],
    ids=["zeros", "constant", "one small image"],
)
def test_degenerate_calibration_data_gives_a_finite_model(conv_net, batches):
    compressed = compress(conv_net, [batches])
    assert torch.isfinite(compressed(torch.randn(2, 3, 12, 12))).all()
    assert balf_fx.report(compressed).flops_kept <= 0.6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_memory_formats(dtype, layout, images):
    model = randomise_batchnorm(ConvNet()).eval().to(dtype, memory_format=layout)
    batches = [image.to(dtype, memory_format=layout) for image in images]
    compressed = compress(model, batches, flops=0.8)
    assert {parameter.dtype for parameter in compressed.parameters()} == {dtype}
    exact = compress(model.double(), [batch.double() for batch in batches], flops=0.8)
    tolerance = 30 * torch.finfo(dtype).eps
    got, want = compressed(batches[0]).double(), exact(batches[0].double())
    assert (got - want).norm() <= tolerance * want.norm() + 1e-12


def test_the_result_is_an_ordinary_module(conv_net, images):
    compressed = compress(conv_net, images, effort="fast")
    expected = compressed(images[0])
    copies = {
        "deepcopy": copy.deepcopy(compressed),
        "pickle": pickle.loads(pickle.dumps(compressed)),
        "state_dict": compress(conv_net, images[:1], allocation=ranks(compressed), flops=None, effort="fast"),
        "to": copy.deepcopy(compressed).to(torch.float64).to(torch.float32),
    }
    copies["state_dict"].load_state_dict(compressed.state_dict())
    for name, other in copies.items():
        assert torch.equal(other(images[0]), expected), name
        assert balf_fx.report(other).flops_after == balf_fx.report(compressed).flops_after
    buffer = io.BytesIO()
    torch.save(compressed, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(images[0]), expected)


def test_a_pickle_does_not_need_balf_fx(conv_net, images):
    compressed = compress(conv_net, images)
    assert b"balf_fx" not in pickle.dumps(compressed)


def ranks(compressed: fx.GraphModule) -> dict[str, int | None]:
    return {row.name: row.rank for row in balf_fx.report(compressed).sites}


@pytest.mark.slow
def test_torch_compile_takes_the_result(conv_net, images):
    compressed = compress(conv_net, images)
    with torch.no_grad():
        optimised = torch.compile(compressed, fullgraph=True)(images[0])
        torch.testing.assert_close(optimised, compressed(images[0]), rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_factors(conv_net, images):
    compressed = compress(conv_net, images)
    compressed(images[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in compressed.parameters())


def test_the_published_preset(conv_net, images):
    compressed = compress(conv_net, images, **balf_fx.BALF)
    assert isinstance(compressed.get_submodule("bn"), nn.BatchNorm2d)
    report = balf_fx.report(compressed)
    uncentred = compress(conv_net, images, centred=False, fold_batchnorm=False, effort="fast")
    assert ranks(uncentred) == {row.name: row.rank for row in report.sites}


def test_the_published_influence_aware_preset(conv_net, images):
    labelled = [(image, torch.randint(10, (8,))) for image in images]
    loss = lambda output, batch: nn.functional.cross_entropy(output, batch[1])  # noqa: E731
    state, *rest = snapshot(conv_net)
    compressed = compress(conv_net, labelled, loss=loss, **balf_fx.AIR)
    after, *rest_after = snapshot(conv_net)
    assert rest_after == rest
    assert all(torch.equal(state[key], after[key]) for key in state)
    assert isinstance(compressed.get_submodule("bn"), nn.BatchNorm2d)
    once = compress(conv_net, images, **(dict(balf_fx.AIR) | {"factors": "activations"}))
    assert ranks(compressed) == ranks(once)
    assert balf_fx.report(compressed).flops_kept <= 0.6
    assert not torch.allclose(compressed(images[0]), once(images[0]))
    again = compress(conv_net, labelled, loss=loss, **balf_fx.AIR)
    assert all(torch.equal(a, b) for a, b in zip(compressed.parameters(), again.parameters(), strict=True))


def test_a_graph_prepared_for_several_factors_gives_each_of_them(conv_net, images):
    prepared = balf_fx.prepare(conv_net, images[0], factors=("sensitivity", "air"))
    balf_fx.calibrate(prepared, images, progress=False)
    for factors in ("activations", "sensitivity", "air", "svd"):
        measured = {"batches": images, "refit": False} if factors == "sensitivity" else {}
        got = balf_fx.convert(prepared, flops=0.6, factors=factors, progress=False, **measured)
        alone = compress(conv_net, images, factors=factors, effort="balanced")
        assert ranks(got) == ranks(alone)
        torch.testing.assert_close(got(images[0]), alone(images[0]), rtol=1e-3, atol=1e-3)


def test_factors_that_a_graph_was_not_prepared_for(conv_net, images):
    with pytest.raises(OptionError, match=r"factors must be among .*not 'cp'"):
        balf_fx.prepare(conv_net, images[0], factors=["air", "cp"])
    for wrong in (None, 5, [["svd"]]):
        with pytest.raises(OptionError, match=r"factors must be among 'sensitivity', .*, not "):
            balf_fx.prepare(conv_net, images[0], factors=wrong)
    prepared = balf_fx.prepare(conv_net, images[0], sensitivity=True)
    balf_fx.calibrate(prepared, images, progress=False)
    with pytest.raises(
        NotCalibratedError, match=r"site 'stem' was not observed: pass factors='air' to balf_fx\.prepare"
    ):
        balf_fx.convert(prepared, flops=0.6, factors="air", progress=False)
    with pytest.raises(OptionError, match="drop one of them"):
        balf_fx.convert(prepared, flops=0.6, factors="air", batches=images, refit=True, progress=False)
    plain = balf_fx.prepare(conv_net, images[0], factors="activations")
    balf_fx.calibrate(plain, images, progress=False)
    with pytest.raises(NotCalibratedError, match=r"needs gradients.*pass factors='sensitivity' to balf_fx\.prepare"):
        balf_fx.convert(plain, flops=0.6, factors="sensitivity", progress=False)
    called = balf_fx.prepare(conv_net, images[0], factors="sensitivity")
    called(images[0])
    with pytest.raises(NotCalibratedError, match=r"balf_fx\.calibrate"):
        balf_fx.convert(called, flops=0.6, factors="sensitivity", progress=False)
    with pytest.raises(OptionError, match="drop one of them"):
        compress(conv_net, images, factors="air", refit=True)


def test_weights_alone_ignore_the_data(conv_net, images):
    first = compress(conv_net, images, factors="svd").state_dict()
    second = compress(conv_net, [10 * images[0]], factors="svd").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_no_batches(conv_net):
    for empty in ([], iter(()), DataLoader(TensorDataset(torch.empty(0, 3)))):
        with pytest.raises(CalibrationError, match="no calibration batches"):
            compress(conv_net, empty)


def test_a_batch_the_model_cannot_run(conv_net, images):
    with pytest.raises(CalibrationError, match=r"batch 0, which is a float32 tensor of shape \(2, 5, 8, 8\)"):
        compress(conv_net, [torch.randn(2, 5, 8, 8)])
    with pytest.raises(CalibrationError, match="batch 1, which is a str"):
        compress(conv_net, [images[0], "image"])
    with pytest.raises(CalibrationError, match="not int"):
        compress(conv_net, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_site(conv_net, images, value):
    images[2][0, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match="site 'stem' contains NaN or infinity"):
        compress(conv_net, images)


@pytest.mark.parametrize("options", [{"params": 0.5}, {"flops": 0.0}, {"flops": 1.5}, {"flops": "55 %"}])
def test_a_budget_that_is_none(conv_net, images, options):
    with pytest.raises(OptionError, match=r"budget|fraction"):
        compress(conv_net, images, **options)


def test_unknown_option_values(conv_net, images):
    with pytest.raises(OptionError, match="allocation must be"):
        compress(conv_net, images, allocation="magic")
    with pytest.raises(OptionError, match=r"factors must be one of None, .*'svd', not 'cp'"):
        compress(conv_net, images, factors="cp")


def test_a_budget_out_of_reach_names_the_minimum(conv_net, images):
    with pytest.raises(BudgetError, match="out of reach") as caught:
        compress(conv_net, images, flops=0.02)
    reached = balf_fx.report(compress(conv_net, images, flops=caught.value.minimum)).flops_kept
    assert caught.value.minimum - 1e-3 < reached <= caught.value.minimum


def test_a_model_without_sites(images):
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU())
    with pytest.raises(NoSiteError, match=r"nothing in the model .*0: one output channel per group"):
        compress(model, images)
    with pytest.raises(NoSiteError, match="it uses no parameters"):
        compress(nn.Sequential(nn.ReLU()), images)


def test_training_mode(conv_net, images):
    conv_net.block[1].train()
    with pytest.raises(TrainingModeError, match=r"block\.1 \(BatchNorm2d\) is in training mode.*model\.eval\(\)"):
        compress(conv_net, images)


class Noisy(nn.Module):
    """Draws numbers in each call."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.last((self.first(x) + 0.01 * torch.randn_like(x[:, :1])).relu())


def test_calibration_and_conversion_leave_the_random_state():
    prepared = balf_fx.prepare(Noisy().eval(), torch.randn(8, 16), sensitivity=True)
    batches = list(torch.randn(2, 8, 16))
    before = torch.random.get_rng_state()
    balf_fx.calibrate(prepared, batches, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    balf_fx.convert(prepared, batches=batches, flops=0.7, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_the_default_dtype_does_not_change_the_model(conv_net, images, effort):
    wanted = compress(conv_net, images, flops=0.6, effort=effort).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        found = compress(conv_net, images, flops=0.6, effort=effort).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.keys() == wanted.keys()
    assert all(value.dtype == found[name].dtype and torch.equal(value, found[name]) for name, value in wanted.items())


@pytest.mark.parametrize("kind", [lambda net: net, fx.symbolic_trace])
def test_only_prepared_graphs_are_calibrated_and_converted(conv_net, images, kind, tmp_path):
    plain = kind(conv_net)
    with pytest.raises(NotCalibratedError, match=r"balf_fx\.prepare"):
        balf_fx.calibrate(plain, images, progress=False)
    for options in ({}, {"checkpoint": tmp_path}, {"result": "module", "model": conv_net}):
        with pytest.raises(NotCalibratedError, match=r"balf_fx\.prepare"):
            balf_fx.convert(plain, flops=0.5, progress=False, **options)


def test_graphs_that_were_never_prepared_or_calibrated(conv_net, images):
    with pytest.raises(NotCalibratedError, match=r"balf_fx\.prepare"):
        balf_fx.convert(fx.symbolic_trace(conv_net), flops=0.5)
    with pytest.raises(NotCalibratedError, match="no calibration data has reached site"):
        balf_fx.convert(balf_fx.prepare(conv_net, images[0]), flops=0.5, progress=False)


def test_progress_goes_to_stderr_and_can_be_silenced(conv_net, images, capfd):
    balf_fx.compile(conv_net, images, flops=0.6)
    shown = capfd.readouterr()
    assert "calibrating" in shown.err
    assert "scoring" in shown.err
    compress(conv_net, images)
    silent = capfd.readouterr()
    assert shown.out == silent.out == silent.err == ""


def test_a_tensor_or_a_mapping_is_one_batch_at_every_door():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    x = torch.randn(16, 3, 10, 10)
    found = []
    for batches in (x, {"input": x}, [x]):
        prepared = balf_fx.prepare(model, x)
        balf_fx.calibrate(prepared, batches, progress=False)
        found.append(balf_fx.convert(prepared, batches=batches, flops=0.6, progress=False)(x))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    with pytest.raises(CalibrationError, match="must be a tensor, a mapping or an iterable"):
        balf_fx.calibrate(prepared, "folder", progress=False)
