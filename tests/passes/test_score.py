import pytest
import torch
from torch import fx, nn

import balf_fx
from balf_fx.capture.normal_form import capture
from balf_fx.errors import NotCalibratedError, PassError
from balf_fx.graph.annotation import annotation, sites
from balf_fx.passes import Annotate, InsertObservers, Score


def prepared(model: nn.Module, x: torch.Tensor, run: bool = True) -> fx.GraphModule:
    graph_module = balf_fx.prepare(model.double(), x, fold_batchnorm=False)
    if run:
        graph_module(x)
    return graph_module


def curves(graph_module: fx.GraphModule, **options):
    Score(**options)(graph_module)
    return {site.name: annotation(node).curve for site, (node, *_) in sites(graph_module).items()}


def test_energies_are_the_mean_squared_output():
    model, x = nn.Linear(12, 6), torch.randn(100, 12, dtype=torch.float64)
    graph_module = prepared(nn.Sequential(model), x)
    linear_part = x @ model.weight.T
    centred = linear_part - linear_part.mean(0)
    assert curves(graph_module)["0"].energy == pytest.approx(float(centred.square().sum(1).mean()))
    assert curves(graph_module, centred=False)["0"].energy == pytest.approx(float(linear_part.square().sum(1).mean()))
    assert curves(graph_module, factors="svd")["0"].energy == pytest.approx(float(model.weight.square().sum()))


@pytest.mark.parametrize("shape", [(12, 6), (6, 12)], ids=["output side", "input side"])
def test_distortion_falls_with_rank_down_to_zero_for_dense(shape):
    curve = curves(prepared(nn.Sequential(nn.Linear(*shape)), torch.randn(50, shape[0], dtype=torch.float64)))["0"]
    distortions = [candidate.distortion for candidate in curve.candidates]
    assert distortions == sorted(distortions, reverse=True)
    assert [candidate.rank for candidate in curve.candidates] == [1, 2, 3, None]
    assert curve.dense.distortion == 0.0


def test_weights_alone_need_no_observers():
    graph_module = capture(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8))
    Annotate()(graph_module)
    assert curves(graph_module, factors="svd")["0"].energy > 0
    with pytest.raises(PassError, match=r"'0' has no observer.*factors='svd'"):
        Score()(graph_module)


def test_observers_that_never_ran_are_an_error():
    graph_module = prepared(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8, dtype=torch.float64), run=False)
    with pytest.raises(NotCalibratedError, match="no calibration data has reached site '0'"):
        Score()(graph_module)


def test_a_graph_without_sites_is_an_error():
    with pytest.raises(PassError, match="run Annotate first"):
        Score()(fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8))))


def test_scores_are_kept_until_data_or_options_change():
    x = torch.randn(30, 8, dtype=torch.float64)
    graph_module = prepared(nn.Sequential(nn.Linear(8, 8)), x)
    first = curves(graph_module)["0"]
    assert curves(graph_module)["0"] is first
    assert curves(graph_module, centred=False)["0"] is not first
    again = curves(graph_module)["0"]
    graph_module(3 * x)
    assert curves(graph_module)["0"].energy > again.energy


def test_scoring_changes_nothing_but_annotations():
    graph_module = prepared(nn.Sequential(nn.Linear(8, 8)), torch.randn(30, 8, dtype=torch.float64))
    code, weight = graph_module.code, graph_module.get_parameter("0.weight").clone()
    assert not Score()(graph_module).modified
    assert graph_module.code == code
    assert torch.equal(graph_module.get_parameter("0.weight"), weight)


def test_passes_take_a_graph_that_was_traced_elsewhere():
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8)).double())
    for apply in (Annotate(), InsertObservers()):
        graph_module = apply(graph_module).graph_module
    graph_module(torch.randn(30, 8, dtype=torch.float64))
    assert curves(graph_module)["0"].candidates[0].params == 16 + 8


LAYERS = {
    "output side": nn.Linear(16, 6),
    "input side": nn.Linear(6, 16),
    "groups": nn.Conv1d(24, 24, 1, groups=3),
    "wide groups": nn.Conv1d(6, 15, 1, groups=3),
}


def measured(layer: nn.Module, shape: tuple[int, ...], least: float):
    """The layer's curve, the deviations of its outputs [N, P, O] from their mean, and the scales [O] of gradients.

    Gradients are independent of the outputs, so that half the expected square of an error along them is exact.
    """
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(layer).double().requires_grad_(False)
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=draws))
    if layer.weight.dim() > 2:  # of convolutions, the group with the largest gradients has nearly one component
        last = layer.weight[-len(layer.weight) // layer.groups :]
        last.copy_(last[:1] + 0.1 * last)
    x = torch.randn(shape, generator=draws, dtype=torch.float64)
    scales = torch.logspace(least, 0, len(layer.weight), dtype=torch.float64)

    def loss(output, batch):
        random = torch.randn(output.shape, generator=draws, dtype=output.dtype)
        return (output * random * scales.reshape(-1, *(1,) * (output.dim() - 2))).sum() / len(output)

    graph_module = balf_fx.prepare(model, x, factors="sensitivity")
    balf_fx.calibrate(graph_module, [x], loss=loss, progress=False)
    curve = curves(graph_module, factors="sensitivity")["0"]
    outputs = model(x).reshape(len(x), len(scales), -1).mT
    return curve, outputs - outputs.mean((0, 1)), scales


@pytest.mark.parametrize("name", LAYERS)
def test_the_loss_of_a_layer_is_what_is_measured(name):
    layer = LAYERS[name]
    shape = (3000, layer.in_features) if isinstance(layer, nn.Linear) else (3000, layer.in_channels, 2)
    curve, outputs, scales = measured(layer, shape, -1)
    assert curve.loss == pytest.approx(float(0.5 * (outputs * scales).square().sum((1, 2)).mean()), rel=0.05)


@pytest.mark.parametrize("name", ["output side", "input side", "groups"])
def test_the_loss_of_a_rank_is_what_is_measured(name):
    """Most directions of the output, and some groups, have nearly no gradient, where damping would see some."""
    layer = LAYERS[name]
    shape = (3000, layer.in_features) if isinstance(layer, nn.Linear) else (3000, layer.in_channels, 2)
    curve, outputs, scales = measured(layer, shape, -3)
    candidate = next(candidate for candidate in curve.candidates if candidate.rank == 2)
    left, right = curve.spectrum.maps(candidate.rank)
    errors = outputs - outputs @ torch.block_diag(*(left @ right)).mT
    wanted = float(0.5 * (errors * scales).square().sum((1, 2)).mean())
    assert curve.loss * curve.normalised(candidate.distortion) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=["output side", "input side"])
@pytest.mark.parametrize("centred", [True, False])
def test_each_half_of_the_samples_is_held_out_from_the_other(shape, centred):
    """Every other sample lies in another subspace of four dimensions: those of one half tell nothing of the other."""
    x, (left, right) = torch.randn(120, shape[0], dtype=torch.float64), torch.randn(2, 4, shape[0], dtype=torch.float64)
    x[::2], x[1::2] = x[::2, :4] @ left, x[1::2, :4] @ right
    graph_module = balf_fx.prepare(nn.Sequential(nn.Linear(*shape)).double(), x, factors="sensitivity")
    balf_fx.calibrate(graph_module, [x], progress=False)
    curve = curves(graph_module, factors="sensitivity", centred=centred)["0"]
    by_rank = {candidate.rank: curve.normalised(candidate.distortion) for candidate in curve.candidates}
    assert by_rank[4] > 0.3
    assert by_rank[8] > 0.2


class Repeated(nn.Module):
    """The same layers on every part of a sample."""

    def __init__(self, layers, parts):
        super().__init__()
        self.layers, self.parts = layers, parts

    def forward(self, x):
        return torch.cat([self.layers(part) for part in x.chunk(self.parts, 1)], 1)


@pytest.mark.parametrize("traced", [False, True])
def test_the_loss_of_a_layer_that_is_called_several_times_is_that_of_all_calls(traced):
    draws = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 12)).double()
    rows = torch.randn(2400, 8, generator=draws, dtype=torch.float64)

    def losses(parts):
        def loss(output, batch):  # the same gradients at each row, in whatever sample it is
            random = torch.randn(2400, 12, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
            return (output.reshape(2400, 12) * random).sum() / len(output)

        model, x = Repeated(layers, parts), rows.reshape(-1, 8 * parts)
        graph_module = balf_fx.prepare(model, x, factors="sensitivity", capture="export" if traced else "auto")
        balf_fx.calibrate(graph_module, [x], loss=loss, progress=False)
        return [curve.loss for curve in curves(graph_module, factors="sensitivity").values()]

    alone, together = losses(1), losses(3)
    assert together == pytest.approx([3 * loss for loss in alone], rel=0.05)


def test_samples_count_alike_in_batches_of_other_sizes():
    """The user's loss is a mean over samples, so that the gradient of each is larger in a small batch."""
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12)).double()
    x = torch.randn(200, 8, generator=draws, dtype=torch.float64)
    signs = torch.randn(200, 12, generator=draws, dtype=torch.float64).sign()

    def found(sizes):
        batches = list(zip(x.split(sizes), signs.split(sizes), strict=True))
        graph_module = balf_fx.prepare(
            model, batches[0], forward=lambda net, batch: net(batch[0]), factors="sensitivity"
        )
        balf_fx.calibrate(
            graph_module,
            batches,
            forward=lambda net, batch: net(batch[0]),
            loss=lambda output, batch: (output * batch[1]).sum(1).mean(),
            progress=False,
        )
        observer = graph_module.get_submodule(annotation(next(iter(sites(graph_module).values()))[0]).sensitivity)
        return observer.sample.gradients.scatter, curves(graph_module, factors="sensitivity")["0"].loss

    (whole, loss), (parts, other) = found([200]), found([99, 100, 1])
    torch.testing.assert_close(parts, whole)
    assert other == pytest.approx(loss, rel=0.05)  # by halves of other samples


class Towers(nn.Module):
    """Values of two kinds, of which a batch has different numbers, as a model of images and texts does."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, many, few):
        return self.one(many), self.other(few)


def test_layers_of_batches_whose_samples_cannot_be_counted_have_losses_on_one_scale():
    draws = torch.Generator().manual_seed(0)
    model = Towers().double()
    with torch.no_grad():
        model.other.load_state_dict(model.one.state_dict())
    batch = (torch.randn(4000, 8, dtype=torch.float64), torch.randn(1000, 8, dtype=torch.float64))

    def loss(outputs, batch):
        return sum((each * torch.randn(each.shape, generator=draws, dtype=each.dtype)).sum() for each in outputs)

    graph_module = balf_fx.prepare(model, batch, factors="sensitivity")
    balf_fx.calibrate(graph_module, [batch], loss=loss, progress=False)
    found = curves(graph_module, factors="sensitivity")
    assert found["one"].loss == pytest.approx(4 * found["other"].loss, rel=0.1)
