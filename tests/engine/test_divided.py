"""Convolutions with divided kernels: what they cost and compute, through refits, widths, files and plans."""

import copy
import pickle

import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.engine.settings import Settings
from balf_fx.errors import BalfError, NotCalibratedError
from balf_fx.graph.curves import DIVIDED
from balf_fx.graph.flops import count_flops
from balf_fx.passes import Refit

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = list(torch.randn(32, 3, 10, 11, generator=GENERATOR).split(16))


class Block(nn.Module):
    """Convolutions whose kernels are products of a column and a row, up to some noise, and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 24, 3, padding=1)
        self.down = nn.Conv2d(24, 16, (3, 5), stride=(2, 1), padding=(1, 2), bias=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.down(torch.relu(self.conv1(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Block().double().eval()
    with torch.no_grad():
        for conv in (model.conv1, model.down):
            columns, rows = torch.randn(*conv.weight.shape[:3], 1).double(), torch.randn(1, 1, 1, conv.kernel_size[1])
            conv.weight.copy_((columns * rows.double() + 0.01 * torch.randn_like(conv.weight)) / 10)
    return model


@pytest.fixture(scope="module")
def batches():
    return [batch.double() for batch in BATCHES]


@pytest.fixture(scope="module")
def few_channels():
    """The same layers, the second of which reads a few combinations of its inputs, up to some noise."""
    torch.manual_seed(0)
    model = Block().double().eval()
    with torch.no_grad():
        conv = model.conv1
        kernels, mixed = torch.randn(24, 5, 3, 3).double(), torch.randn(5, 16).double()
        conv.weight.copy_((torch.einsum("orhw,rc->ochw", kernels, mixed) + 0.01 * torch.randn_like(conv.weight)) / 10)
    return model


def compress(model, batches, **options):
    return balf_fx.compile(model, batches, **{"flops": 0.55, "separable": True, "progress": False, **options})


@pytest.fixture(scope="module")
def small(model, batches):
    return compress(model, batches)


def distance(model, other, batches):
    with torch.no_grad():
        return max(float((model(batch) - other(batch)).abs().max()) for batch in batches)


def error(model, other, batches):
    with torch.no_grad():
        return sum(float((model(batch) - other(batch)).square().sum()) for batch in batches)


def forms(small):
    return {row.name: row.form for row in balf_fx.report(small).sites}


def test_layers_are_two_stock_convolutions_of_the_counted_cost(model, small, batches):
    assert forms(small)["conv1"] == forms(small)["down"] == "separable"
    first, second = small.down
    assert (type(first), type(second)) == (nn.Conv2d, nn.Conv2d)
    assert (first.kernel_size, first.stride, first.padding) == ((3, 1), (2, 1), (1, 0))
    assert (second.kernel_size, second.stride, second.padding) == ((1, 5), (1, 1), (0, 2))
    report = balf_fx.report(small)
    assert report.flops_after == count_flops(small, batches[0]) <= 0.55 * count_flops(model, batches[0])
    assert report.params_after == sum(parameter.numel() for parameter in small.parameters())


@pytest.mark.parametrize(
    "options", [{"effort": "fast"}, {"effort": "balanced"}, {"refit": "up"}, {}, {"widths": False}, {"centred": False}]
)
def test_kernels_of_a_column_and_a_row_lose_less(model, batches, options):
    lost = error(compress(model, batches, **options), model, batches)
    assert lost < 0.3 * error(compress(model, batches, separable=False, **options), model, batches)


def test_a_pointwise_convolution_comes_first(few_channels, batches):
    small = compress(few_channels, batches, separable=None)
    assert forms(small)["conv1"] == "pointwise_first"
    first, second = small.conv1
    assert (type(first), first.kernel_size, first.padding, first.bias) == (nn.Conv2d, (1, 1), (0, 0), None)
    assert (type(second), second.kernel_size, second.padding) == (nn.Conv2d, (3, 3), (1, 1))
    report = balf_fx.report(small)
    assert report.flops_after == count_flops(small, batches[0]) <= 0.55 * count_flops(few_channels, batches[0])
    assert report.params_after == sum(parameter.numel() for parameter in small.parameters())


@pytest.mark.parametrize(
    "options", [{"effort": "fast"}, {"effort": "balanced"}, {"refit": "up"}, {}, {"centred": False}]
)
def test_kernels_of_few_channels_lose_less(few_channels, batches, options):
    options = {"widths": False, **options}
    lost = error(compress(few_channels, batches, **{"separable": None, **options}), few_channels, batches)
    assert lost < 0.4 * error(compress(few_channels, batches, separable=False, **options), few_channels, batches)


def test_trials_map_the_outputs_of_divided_kernels(few_channels, batches, monkeypatch):
    second = nn.Conv2d(24, 16, 3, padding=1).double()
    with torch.no_grad():
        second.weight.copy_(torch.einsum("orhw,rc->ochw", torch.randn(16, 5, 3, 3), torch.randn(5, 24)) / 10)
    model = nn.Sequential(few_channels.stem, nn.ReLU(), few_channels.conv1, nn.ReLU(), second).eval()
    options = {"separable": None, "widths": False}
    up = compress(model, batches, refit="up", flops=0.3, **options)
    options |= {"flops": None, "allocation": balf_fx.plan(up)}
    once = compress(model, batches, refit=False, **options)
    monkeypatch.setattr("balf_fx.engine.solving.Refit", lambda inputs, _, *given: Refit(inputs, "outputs", *given))
    mapped = compress(model, batches, refit="up", **options)
    assert {forms(small)["4"] for small in (up, once, mapped)} == {"pointwise_first"}
    assert torch.equal(once.get_submodule("4.0").weight, mapped.get_submodule("4.0").weight)
    before, after = (net.get_submodule("4.1").weight.detach().flatten(1) for net in (once, mapped))
    assert len(before) < before.shape[1]
    by_outputs = torch.linalg.lstsq(before.mT, after.mT).solution.mT
    torch.testing.assert_close(by_outputs @ before, after)
    lost = [error(small, model, batches) for small in (up, mapped, once)]
    assert lost[0] < lost[1] < lost[2]


def test_files_and_plans_of_a_pointwise_convolution_first(few_channels, batches, tmp_path):
    small = compress(few_channels, batches, separable=None)
    balf_fx.save(small, tmp_path / "small.safetensors")
    assert distance(balf_fx.load(tmp_path / "small.safetensors", few_channels), small, batches) == 0
    again = compress(few_channels, batches, flops=None, allocation=balf_fx.plan(small), separable=None)
    assert forms(again) == forms(small)
    assert distance(again, small, batches) < 1e-9
    assert distance(compress(few_channels, batches, separable=None, result="module"), small, batches) < 1e-9


def test_narrower_channels_around_them(model, batches):
    small = compress(model, batches, flops=0.3)
    assert forms(small)["down"] == "separable"
    assert any(width.size < width.features for width in balf_fx.plan(small).widths)
    assert balf_fx.report(small).flops_after == count_flops(small, batches[0])


def test_files_copies_and_plans(model, small, batches, tmp_path):
    balf_fx.save(small, tmp_path / "small.safetensors")
    loaded = balf_fx.load(tmp_path / "small.safetensors", model)
    for other in (loaded, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert distance(other, small, batches) == 0
    again = compress(model, batches, flops=None, allocation=balf_fx.plan(small), separable=None)
    assert forms(again) == forms(small)
    assert distance(again, small, batches) < 1e-9


def test_a_plan_whose_strips_were_not_observed_is_refused(model, small, batches):
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")  # observes single pixels
    balf_fx.calibrate(prepared, batches, progress=False)
    with pytest.raises(NotCalibratedError, match="pass separable=True to"):
        balf_fx.convert(prepared, allocation=balf_fx.plan(small), progress=False)


def test_few_positions_do_not_show_which_channels_matter(few_channels):
    images = [torch.randn(1, 3, 4, 4).double()]
    assert "pointwise_first" not in forms(compress(few_channels, images, separable=None, effort="fast")).values()


def test_a_file_with_a_rank_that_only_a_separable_layer_can_have(model, batches, tmp_path):
    small = compress(model, batches, flops=0.8, effort="fast")
    (row,) = (row for row in balf_fx.report(small).sites if row.name == "down")
    assert row.rank > model.down.out_channels
    balf_fx.save(small, tmp_path / "small.safetensors")
    assert distance(balf_fx.load(tmp_path / "small.safetensors", model), small, batches) == 0


def test_a_module_of_the_models_own_class(model, small, batches):
    grafted = compress(model, batches, result="module")
    assert type(grafted) is Block
    assert distance(grafted, small, batches) < 1e-9


@pytest.mark.parametrize(
    "options", [{"separable": False}, {"factors": "air"}, {"factors": "svd"}, {"allocation": "uniform"}]
)
def test_by_choice_and_without_statistics_there_are_none(model, batches, options):
    assert not set(DIVIDED) & set(forms(compress(model, batches, **{"separable": None, **options})).values())


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.Conv2d(16, 16, 3),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.Conv2d(16, 16, (5, 1), padding=(2, 0)),
        nn.Conv2d(16, 16, 2, padding="same"),
        nn.ConvTranspose2d(16, 16, 3, padding=1),
    ],
    ids=str,
)
def test_others_stay_as_they_are(conv):
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), conv, nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    try:
        small = compress(model, BATCHES, effort="balanced", flops=0.7)
    except BalfError as error:
        pytest.fail(str(error))
    allowed = {"pointwise_first"} if conv.kernel_size == (5, 1) else set()
    assert set(DIVIDED) & set(forms(small).values()) <= allowed


def test_by_default_only_a_budget_of_time_allows_one_along_each_axis():
    assert Settings(latency=0.7).divisions == DIVIDED[::-1]
    assert Settings(disagreement=0.1, minimise="latency", validation=[1]).divisions == DIVIDED[::-1]
    assert Settings(flops=0.7, separable=True).divisions == DIVIDED[::-1]
    assert Settings(flops=0.7).divisions == ("pointwise_first",)


@pytest.mark.parametrize("options", [{"separable": False}, {"factors": "air"}, balf_fx.BALF, balf_fx.AIR])
def test_published_methods_divide_no_kernel_otherwise(options):
    assert Settings(latency=0.7, **options).divisions == ()


def test_kernels_whose_strips_were_not_observed_are_not_divided_in_silence(model, batches):
    prepared = balf_fx.prepare(model, batches[0])
    balf_fx.calibrate(prepared, batches, progress=False)
    with pytest.raises(NotCalibratedError, match="pass separable=True to"):
        balf_fx.convert(prepared, flops=0.5, separable=True, progress=False)
    balf_fx.convert(prepared, flops=0.5, progress=False)
