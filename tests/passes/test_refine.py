import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import balf_fx
from balf_fx.calibration.moments import input_columns
from balf_fx.errors import OptionError, PassError
from balf_fx.graph.annotation import annotation, sites
from balf_fx.graph.parameters import get_tensor, weight_matrix
from balf_fx.passes import Allocate, Annotate, Factorize, InsertObservers, Refine, Score
from balf_fx.progress import Progress
from balf_fx.ranks.influence import error_weights, influence

LAYERS = {
    "linear": (nn.Linear(12, 10), (40, 12)),
    "widening linear": (nn.Linear(6, 14), (40, 6)),
    "conv": (nn.Conv2d(4, 12, 3, stride=2, padding=1), (12, 4, 7, 7)),
    "conv of many channels": (nn.Conv2d(16, 12, (1, 3), bias=False), (12, 16, 5, 5)),
    "grouped conv": (nn.Conv2d(8, 16, 3, groups=2), (12, 8, 6, 6)),
    "conv1d": (nn.Conv1d(8, 12, 3, padding="same", dilation=2), (12, 8, 9)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def calibrated(model: nn.Module, batches, **options) -> fx.GraphModule:
    prepared = balf_fx.prepare(model, batches[0], factors="air", fold_batchnorm=False)
    balf_fx.calibrate(prepared, batches, progress=False, **options)
    return prepared


def chosen(prepared: fx.GraphModule, ranks, centred=False) -> fx.GraphModule:
    graph_module = copy.deepcopy(prepared)
    Score("air", centred=centred)(graph_module)
    Allocate(ranks=ranks)(graph_module)
    return graph_module


def solution(graph_module: fx.GraphModule, name: str):
    return {site.name: annotation(nodes[0]).refit for site, nodes in sites(graph_module).items()}[name]


def layer_and_batches(kind):
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    layer = copy.deepcopy(layer).double().eval()
    return nn.Sequential(layer, nn.Flatten()), [torch.randn(shape, dtype=torch.float64) for _ in range(2)]


@every_layer
def test_the_factors_lose_less_of_what_counts(kind):
    model, batches = layer_and_batches(kind)
    graph_module = chosen(calibrated(model, batches), {"0": 2})
    ((site, (node,)),) = sites(graph_module).items()
    weight = weight_matrix(model[0].weight, site.groups)
    gradients = graph_module.get_submodule(annotation(node).influence).gradients
    weights = error_weights(influence(gradients, weight, "weight_gradient"), 2.0, 100.0)
    x = torch.cat([input_columns(batch, site) for batch in batches], -1)
    root = torch.linalg.cholesky(x @ x.mT / x.shape[-1])

    def lost(product, weights):
        return float((weights * ((weight - product) @ root).square()).sum())

    left = annotation(node).curve.spectrum.left[..., :2]
    once = left @ left.mT @ weight
    Refine(dtype=torch.float64)(graph_module)
    (refined,) = solution(graph_module, "0")
    product = refined.left @ refined.right
    assert lost(product, weights) < lost(once, weights)
    assert lost(product, torch.ones_like(weights)) > lost(once, torch.ones_like(weights))  # which is optimal there
    Refine(dtype=torch.float64, sweeps=20)(graph_module)
    (further,) = solution(graph_module, "0")
    assert lost(further.left @ further.right, weights) < lost(product, weights)


@every_layer
@pytest.mark.parametrize("centred", [True, False])
def test_without_influence_the_one_shot_factors_stay(kind, centred):
    model, batches = layer_and_batches(kind)
    graph_module = chosen(calibrated(model, batches), {"0": 2}, centred)
    once = copy.deepcopy(graph_module)
    Refine(delta=0.0, dtype=torch.float64)(graph_module)
    for module in (graph_module, once):
        Factorize()(module)
    torch.testing.assert_close(graph_module(batches[0]), once(batches[0]), rtol=1e-4, atol=1e-4)


@every_layer
def test_the_mean_of_what_is_lost_moves_into_the_bias(kind):
    model, batches = layer_and_batches(kind)
    graph_module = chosen(calibrated(model, batches), {"0": 1}, centred=True)
    Refine()(graph_module)
    Factorize()(graph_module)
    assert isinstance(graph_module.get_submodule("0.1"), nn.Linear | nn.Conv1d | nn.Conv2d)

    def means(model):
        outputs = torch.cat([model(batch) for batch in batches]).detach()
        return outputs.reshape(len(outputs), LAYERS[kind][0].weight.shape[0], -1).mean((0, 2))

    torch.testing.assert_close(means(graph_module), means(model))


def test_gradients_of_the_weight_are_those_of_each_batch():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double().eval()
    batches = [(torch.randn(9, 6, dtype=torch.float64), torch.randint(4, (9,))) for _ in range(3)]

    def loss(output, batch):
        return F.cross_entropy(output, batch[1])

    prepared = calibrated(model, batches, loss=loss)
    expected = [
        torch.autograd.grad(loss(model(batch[0]), batch), [model[0].weight, model[2].weight]) for batch in batches
    ]
    for (_, (node,)), gradients in zip(sites(prepared).items(), zip(*expected, strict=True), strict=True):
        seen = prepared.get_submodule(annotation(node).influence).gradients
        torch.testing.assert_close(seen.absolute[0], sum(g.abs() for g in gradients).float())
        torch.testing.assert_close(seen.squares[0], sum(g.square() for g in gradients).float())
    assert all(parameter.grad is None for parameter in [*prepared.parameters(), *model.parameters()])


def test_every_site_but_transposed_convolutions_is_observed_at_its_input():
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Flatten(2), nn.Linear(36, 5)).eval()
    prepared = calibrated(model, [torch.randn(4, 8, 6, 6)])
    sides = [prepared.get_submodule(annotation(node).observer).side for node, *_ in sites(prepared).values()]
    assert sides == ["input", "output", "input"]
    graph_module = chosen(prepared, {"0": 2, "1": 2, "3": 2})
    Refine()(graph_module)
    assert [solution(graph_module, name) is None for name in ("0", "1", "3")] == [False, True, False]
    Factorize()(graph_module)
    assert torch.isfinite(graph_module(torch.randn(2, 8, 6, 6))).all()


class Shared(nn.Module):
    """One weight with two uses, and a product with a constant weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.matrix = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 12))

    def forward(self, x):
        x = torch.tanh(self.linear(x))
        return torch.tanh(self.linear(x)) @ self.matrix


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_shared_weights_and_products(capture):
    model, x = Shared().eval(), torch.randn(30, 8)
    compressed = balf_fx.compile(model, x, params=0.6, capture=capture, progress=False, **balf_fx.AIR)
    ranks = {row.name: row.rank for row in balf_fx.report(compressed).sites}
    assert len(ranks) == 2
    assert None not in ranks.values()
    assert sum(p.numel() for p in compressed.parameters()) <= 0.6 * sum(p.numel() for p in model.parameters())
    assert compressed(x).shape == (30, 12)


class Attention(nn.Module):
    """A fused projection, whose parts `activations` would give factors of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


def test_fused_projections_stay_whole():
    x = torch.randn(6, 5, 12)
    compressed = balf_fx.compile(Attention().eval(), x, flops=0.6, factors="air", progress=False)
    assert all(row.rank is None or isinstance(row.rank, int) for row in balf_fx.report(compressed).sites)
    assert isinstance(compressed.get_submodule("qkv.1"), nn.Linear)


class Hard(nn.Module):
    """No gradient passes the first layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(self.first(x).sign())


def test_where_no_gradient_flows_the_one_shot_factors_stay(caplog):
    prepared = calibrated(nn.Sequential(Hard()).eval(), [torch.randn(40, 6)])
    graph_module = chosen(prepared, {"0.first": 2, "0.second": 2})
    for node, *_ in sites(graph_module).values():  # autograd hands sign a gradient of zero: leave none at all
        if annotation(node).site.name == "0.first":
            graph_module.get_submodule(annotation(node).influence).gradients = None
    with caplog.at_level("INFO", "balf_fx"):
        Refine()(graph_module)
    assert "0.first keeps its one-shot factors: no gradient has reached its weight" in caplog.text
    assert solution(graph_module, "0.first") is None
    assert solution(graph_module, "0.second") is not None


def test_gradients_that_are_not_finite_do_not_count():
    model, x = nn.Sequential(nn.Linear(6, 6)).eval(), torch.randn(40, 6)
    prepared = calibrated(model, [x], loss=lambda output, batch: (0 * output).sum().sqrt())
    ((_, (node,)),) = sites(prepared).items()
    assert prepared.get_submodule(annotation(node).influence).gradients is None


def test_the_prepared_graph_and_its_statistics_stay_as_they_are(conv_net, images):
    prepared = calibrated(conv_net, images)
    weights = {name: value.clone() for name, value in prepared.state_dict().items()}
    sums = [module.gradients for module in prepared.modules() if hasattr(module, "gradients")]
    copies = copy.deepcopy([vars(seen).copy() for seen in sums])
    first, second = (balf_fx.convert(prepared, flops=0.5, factors="air", progress=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(weights[name], value) for name, value in prepared.state_dict().items())
    assert all(annotation(node).refit is None for node in prepared.graph.nodes)
    for seen, before in zip(sums, copies, strict=True):
        assert torch.equal(seen.absolute, before["absolute"])
        assert torch.equal(seen.squares, before["squares"])


def test_dense_sites_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    graph_module = chosen(calibrated(model, [torch.randn(20, 8)]), {"0": 2})
    assert not Refine()(graph_module).modified
    assert solution(graph_module, "1") is None
    assert get_tensor(graph_module, "1.weight").shape == (8, 8)


def test_missing_passes_are_named():
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8)))
    Annotate()(graph_module)
    InsertObservers()(graph_module)
    graph_module(torch.randn(20, 8))
    with pytest.raises(PassError, match="run Score and Allocate first"):
        Refine()(graph_module)
    Score()(graph_module)
    Allocate(params=0.5)(graph_module)
    with pytest.raises(PassError, match=r"InsertObservers\(influence=True\)"):
        Refine()(graph_module)


@pytest.mark.parametrize(
    "options",
    [{"signal": "taylor"}, {"delta": -1.0}, {"limit": 0.0}, {"damping": 0.0}, {"sweeps": 0}, {"block": 0}],
    ids=str,
)
def test_options_that_mean_nothing(options):
    with pytest.raises(OptionError):
        Refine(**options)


def test_progress_is_shown_the_sites_and_their_work():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)).eval()
    graph_module = chosen(calibrated(model, [torch.randn(20, 8)]), {"0": 2, "2": 4})
    seen = []

    class Recording(Progress):
        def track(self, items, weights=()):
            seen.extend(zip([site.name for site, _ in items], weights, strict=True))
            return iter(items)

    Refine(progress=Recording())(graph_module)
    work = dict(seen)
    assert list(work) == ["0", "1", "2"]
    assert work["2"] > work["0"] > work["1"] == 0
    assert solution(graph_module, "2") is not None
