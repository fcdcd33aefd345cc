import itertools

import pytest
import torch
from architectures import EVERYTHING, HEAD, HEADS, Mlp, make, rewritten, scored
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import balf_fx
from balf_fx.calibration.observers import SensitivityObserver
from balf_fx.graph.annotation import annotate, annotation, graph_record, record_graph, sites
from balf_fx.passes import Score, ScoreWidths, score_widths
from balf_fx.progress import Progress
from balf_fx.ranks.spectra import convex_energies, damped, damped_roots, held_out_errors, spectrum_from_output
from balf_fx.widths.elimination import conditioned, eliminate


def moment(size, seed, samples=40, groups=2):
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(groups, size, samples, dtype=torch.float64, generator=draws)
    return rows @ rows.mT / samples


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("sensitive", [True, False])
def test_held_out_errors_are_what_is_measured(centred, sensitive):
    draws = torch.Generator().manual_seed(0)
    own, other = (torch.randn(2, 6, 50, dtype=torch.float64, generator=draws) + shift for shift in (0.5, -0.2))
    mean = own.mean(-1) if centred else None
    centre = 0 if mean is None else mean.unsqueeze(-1)
    roots = damped_roots(moment(6, 1), 0.1) if sensitive else None
    spectrum = spectrum_from_output((own - centre) @ (own - centre).mT / 50, mean, roots)
    metric = moment(6, 2)
    seen = other - other.mean(-1, keepdim=True) if centred else other
    found = held_out_errors(spectrum, seen @ seen.mT / 50, other.mean(-1) if centred else None, metric)
    assert found.shape == (2, 7)
    for rank in range(7):
        left, right = spectrum.maps(rank)
        error = (other - centre) - left @ (right @ (other - centre))
        wanted = (error * (metric @ error)).sum((1, 2)) / 50
        torch.testing.assert_close(found[:, rank], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sensitive", [True, False])
def test_held_out_errors_on_the_very_samples_are_the_dropped_energies(sensitive):
    covariance, gradient = moment(6, 0), moment(6, 1)
    unit = gradient.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    roots = damped_roots(gradient, 0.1, unit) if sensitive else None
    metric = damped(gradient, 0.1, unit) if sensitive else torch.eye(6, dtype=torch.float64).expand(2, -1, -1)
    spectrum = spectrum_from_output(covariance, None, roots)
    tail = spectrum.energies.flip(-1).cumsum(-1).flip(-1)
    found = held_out_errors(spectrum, covariance, None, metric)
    torch.testing.assert_close(found[:, :-1], tail)
    torch.testing.assert_close(found[:, -1], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_damped_adds_a_share_of_the_unit():
    gradient, unit = moment(5, 3), torch.tensor([[0.7], [0.0]], dtype=torch.float64)
    found = damped(gradient, 0.2, unit)
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(found[0], (gradient[0] / 0.7 + 0.2 * identity) / 1.2)
    torch.testing.assert_close(found[1], identity)


@settings(max_examples=60)
@given(st.lists(st.lists(st.floats(0, 100), min_size=7, max_size=7), min_size=1, max_size=3))
def test_convex_energies_lie_below_the_errors(rows):
    errors = torch.tensor(rows, dtype=torch.float64)
    found = convex_energies(errors)
    assert found.shape == (len(rows), 6)
    assert (found[:, :-1] >= found[:, 1:] - 1e-9).all()
    assert (found >= -1e-12).all()
    lowest = errors.cummin(-1).values
    tails = torch.cat([found.flip(-1).cumsum(-1).flip(-1), torch.zeros(len(rows), 1, dtype=torch.float64)], -1)
    reached = tails + lowest[:, -1:]
    assert (reached <= lowest + 1e-9).all()
    torch.testing.assert_close(reached[:, 0], lowest[:, 0])
    for row, bound in zip(reached.tolist(), lowest.tolist(), strict=True):  # no convex function in between is larger
        for index in range(1, 6):
            chords = [
                bound[a] + (bound[b] - bound[a]) * (index - a) / (b - a) for a in range(index) for b in range(index, 7)
            ]
            assert row[index] == pytest.approx(min(bound[index], *chords), abs=1e-9)


def test_what_is_convex_already_stays():
    errors = torch.tensor([[10.0, 6, 3, 1, 0]])
    torch.testing.assert_close(convex_energies(errors), torch.tensor([[4.0, 3, 2, 1]]))


def squared(output, batch):
    """A loss whose gradients have the identity for a second moment, up to the noise of the draw."""
    return (output * torch.randn(output.shape, dtype=output.dtype)).sum(1).mean()


def linear_mlp(hidden=16):
    return Mlp(nn.Identity(), hidden).double().eval().requires_grad_(False)


def test_the_loss_of_a_width_is_what_is_measured(monkeypatch):
    """A linear network whose metric is exact: the error at every size is that of the output."""
    module = "balf_fx.passes.score_widths"
    monkeypatch.setattr(f"{module}.damped", lambda g, *_: torch.eye(g.shape[-1])[None].double())
    monkeypatch.setattr(f"{module}.conditioned", lambda c: conditioned(c, 1e-7, 1e-9))
    model = linear_mlp(12)
    batches = [torch.randn(200, 12, dtype=torch.float64)]
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, loss=lambda output, _: output.sum(), progress=False)
    for module in prepared.modules():
        if isinstance(module, SensitivityObserver):
            module.halves = [module.sample, None]
    Score("sensitivity")(prepared)
    ScoreWidths()(prepared)
    (curve,) = graph_record(prepared).width_curves
    for size in (2, 5, 8, 11):
        error = rewritten(prepared, {"channels down": size})(batches[0]) - model(batches[0]).detach()
        assert float(error.square().sum(-1).mean()) == pytest.approx(curve.distortion[size], rel=1e-4)


def test_what_losing_all_features_costs():
    """Half the expected square of the error along the gradient, where that has no direction."""
    model = linear_mlp()
    batches = list(torch.randn(40, 64, 12, dtype=torch.float64))
    torch.manual_seed(1)
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, loss=squared, progress=False)
    Score("sensitivity")(prepared)
    ScoreWidths()(prepared)
    (curve,) = graph_record(prepared).width_curves
    x = torch.cat(batches)
    error = model(x) - model(x).mean(0)
    assert curve.loss == pytest.approx(float(0.5 * error.square().sum(-1).mean()), rel=0.05)
    (site,) = (site for site in sites(prepared) if site.name == "down")
    rank = annotation(sites(prepared)[site][0]).curve
    assert rank.loss == pytest.approx(curve.loss, rel=0.05)  # ranks and widths are in the same unit
    assert rank.energy == pytest.approx(curve.distortion[0], rel=0.05)


def test_halves_count_samples_as_the_whole_does():
    """Where nothing can be overfitted, the held-out errors of the halves are those of the whole."""
    model = linear_mlp()
    batches = list(torch.randn(40, 64, 12, dtype=torch.float64))
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, loss=squared, progress=False)
    found = []
    for _ in range(2):
        Score("sensitivity")(prepared)
        ScoreWidths()(prepared)
        ranks = [annotation(nodes[0]).curve for nodes in sites(prepared).values()]
        found.append([*(c.energy for c in ranks), graph_record(prepared).width_curves[0].distortion[0]])
        for module in prepared.modules():
            if isinstance(module, SensitivityObserver):
                module.halves = [module.sample, None]
        for node in prepared.graph.nodes:
            if annotation(node).site is not None:
                annotate(node, scored_with=None)
    assert found[0] == pytest.approx(found[1], rel=0.05)


def test_each_half_predicts_features_of_the_other_that_all_samples_would_remove():
    model = linear_mlp()
    batches = list(torch.randn(6, 16, 12, dtype=torch.float64))
    prepared = scored(model, batches)
    (width,), (curve,) = graph_record(prepared).widths, graph_record(prepared).width_curves
    node = next(node for node in prepared.graph.nodes if node.name == width.consumers[0])
    _, *halves = score_widths._read(prepared, node, 0.0)
    size = width.features // 2
    kept, removed = curve.order[:size], curve.order[size:]
    expected = 0.0
    for own, other in itertools.permutations(halves):
        covariance = conditioned(own.features.covariance()[0])
        prediction = torch.eye(width.features, dtype=torch.float64)
        prediction[:, removed] = 0
        prediction[removed[:, None], kept] = covariance[removed][:, kept] @ covariance[kept][:, kept].inverse()
        residual = torch.eye(width.features, dtype=torch.float64) - prediction
        moment = residual @ other.features.second_moment(own.features.mean)[0] @ residual.mT
        expected += float((other.metric() * moment).sum()) / 2
    assert curve.distortion[size] == pytest.approx(expected, rel=1e-6)
    whole = score_widths._read(prepared, node, 0.0)[0]
    _, fitted = eliminate([conditioned(whole.features.covariance()[0])], [whole.metric()])
    assert expected > 1.05 * fitted[size]


@pytest.mark.parametrize("name", EVERYTHING)
def test_curves_fall_to_nothing(name):
    model, batches = make(name)
    record = graph_record(scored(model, batches))
    assert len(record.widths) == len(record.width_curves)
    for width, curve in zip(record.widths, record.width_curves, strict=True):
        assert len(curve.distortion) == width.features + 1
        assert curve.distortion[-1] == 0
        assert curve.distortion[0] > 0
        assert curve.loss > 0
        assert all(a >= b >= 0 for a, b in itertools.pairwise(curve.distortion))
        assert curve.normalised(curve.distortion[0]) == 1
        readers = max(len(width.consumers), 1)
        assert len(curve.means) == (0 if width.kind == "queries" else readers)
        if width.kind == "channels":
            assert sorted(curve.order.tolist()) == list(range(width.features))
            assert len(curve.covariances) == readers
            continue
        assert curve.left.shape == curve.right.shape == (width.heads, width.features, width.features)
        identity = torch.eye(width.features, dtype=torch.float64).expand(width.heads, -1, -1)
        torch.testing.assert_close(curve.right @ curve.left, identity)


@pytest.mark.parametrize("name", ["mlp", "convs", "squeeze and excite", "unfused", "grouped"])
def test_sizes_that_are_said_to_lose_more_lose_more(name):
    model, batches = make(name)
    prepared = scored(model, batches)
    x = torch.cat(batches)
    answer = model(x)
    for width in graph_record(prepared).widths:
        sizes = [1, width.features // 2, width.features - 1]
        errors = [float((rewritten(prepared, {width.key: size})(x) - answer).norm()) for size in sizes]
        assert errors == sorted(errors, reverse=True)


def test_chosen_features_are_better_than_others():
    model, batches = make("mlp", torch.float64)
    prepared = scored(model, batches)
    answer = model(batches[0])
    chosen = float((rewritten(prepared, {"channels down": 16})(batches[0]) - answer).norm())
    record = graph_record(prepared)
    (curve,) = record.width_curves
    object.__setattr__(curve, "order", curve.order.flip(0))
    assert float((rewritten(prepared, {"channels down": 16})(batches[0]) - answer).norm()) > chosen


def test_fresh_scores_are_kept_and_stale_ones_are_not():
    model, batches = make("mlp")
    prepared = scored(model, batches)
    first = graph_record(prepared).width_curves
    ScoreWidths()(prepared)
    assert graph_record(prepared).width_curves is first
    ScoreWidths(damping=0.5)(prepared)
    second = graph_record(prepared).width_curves
    assert second is not first
    balf_fx.calibrate(prepared, batches, progress=False)
    ScoreWidths(damping=0.5)(prepared)
    assert graph_record(prepared).width_curves is not second


def test_some_widths_may_be_scored_before_the_others():
    prepared = scored(*make("transformer"))
    widths, curves = graph_record(prepared).widths, graph_record(prepared).width_curves
    assert len(widths) == 3
    record_graph(prepared, width_curves=(), widths_scored_with=())
    for count, width in enumerate(reversed(widths), 1):
        before = graph_record(prepared).width_curves or (None,) * 3
        ScoreWidths(only={width.key})(prepared)
        found = graph_record(prepared).width_curves
        assert sum(curve is not None for curve in found) == count
        assert all(old is None or old is new for old, new in zip(before, found, strict=True))
    ScoreWidths()(prepared)
    assert graph_record(prepared).width_curves is found
    assert [curve.distortion for curve in found] == [curve.distortion for curve in curves]


def test_a_width_is_scored_again_where_its_own_statistics_have_changed():
    prepared = scored(*make("transformer"))
    widths, before = graph_record(prepared).widths, graph_record(prepared).width_curves
    (hidden,) = [width for width in widths if width.kind == "channels"]
    (name,) = hidden.consumers
    reader = next(node for node in prepared.graph.nodes if node.name == name)
    observer = prepared.get_submodule(annotation(reader).sensitivity)
    observer.halves = [half.merge(half) for half in observer.halves]
    ScoreWidths()(prepared)
    after = graph_record(prepared).width_curves
    assert [new is not old for old, new in zip(before, after, strict=True)] == [width is hidden for width in widths]


def test_without_gradients_nothing_is_narrowed(caplog):
    class Hard(Mlp):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    model, x = Hard().eval(), torch.randn(48, 12)
    with caplog.at_level("INFO", "balf_fx"):
        prepared = scored(model, [x])
    assert graph_record(prepared).width_curves == (None,)
    assert "keeps its width" in caplog.text
    narrow = balf_fx.convert(prepared, flops=0.9, factors="sensitivity", progress=False)
    assert narrow(x).shape == (48,)


def test_progress_follows_the_cubes_of_features():
    shares = []

    class Recorder(Progress):
        def track(self, items, weights=()):
            shares.append(list(weights))
            return super().track(items, weights)

    model, batches = make("transformer")
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False)
    ScoreWidths(progress=Recorder())(prepared)
    assert shares == [[width.features**3 for width in graph_record(prepared).widths]]
    assert ScoreWidths(progress=Recorder()) == ScoreWidths()


def test_one_sample_has_no_halves():
    model, _ = make("mlp")
    prepared = scored(model, [torch.randn(1, 12)])
    (curve,) = graph_record(prepared).width_curves
    assert curve.distortion[-1] == 0
    assert rewritten(prepared, {"channels down": 9})(torch.randn(3, 12)).isfinite().all()


def test_halves_make_up_the_whole():
    model, batches = make("transformer")
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False)
    readers = {name for width in graph_record(prepared).widths for name in width.consumers}
    for site, nodes in sites(prepared).items():
        observer = prepared.get_submodule(annotation(nodes[0]).sensitivity)
        first, second = observer.halves
        both = first.merge(second)
        assert first.gradients.samples == second.gradients.samples == 48
        torch.testing.assert_close(both.gradients.scatter, observer.sample.gradients.scatter)
        torch.testing.assert_close(both.moments.scatter, observer.sample.moments.scatter)
        assert (observer.sample.features is not None) == (nodes[0].name in readers), site.name
        if observer.sample.features is not None:
            torch.testing.assert_close(both.features.scatter, observer.sample.features.scatter)
            assert observer.sample.features.mean.shape[-1] == site.in_features


def test_features_of_a_convolution_are_its_channels():
    model, batches = make("convs")
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False)
    found = {site.name: nodes[0] for site, nodes in sites(prepared).items()}
    observer = prepared.get_submodule(annotation(found["second"]).sensitivity)
    hidden = model.first(torch.cat(batches)).relu().movedim(1, -1).reshape(-1, 16).double()
    torch.testing.assert_close(observer.sample.features.mean[0], hidden.mean(0), rtol=1e-4, atol=1e-5)
    centred = hidden - hidden.mean(0)
    wanted = centred.mT @ centred / len(centred)
    torch.testing.assert_close(observer.sample.features.covariance()[0], wanted, rtol=1e-3, atol=1e-5)


def test_each_half_of_the_samples_is_held_out_from_the_other():
    """Every other sample varies in other features: what one half leaves out, the other one misses."""
    model = linear_mlp(hidden=16)
    x = torch.randn(160, 12, dtype=torch.float64)
    with torch.no_grad():
        model.up.weight.zero_().fill_diagonal_(1.0)
    x[::2, 6:], x[1::2, :6] = 0.0, 0.0
    prepared = scored(model, [x])
    (curve,) = graph_record(prepared).width_curves
    assert curve.normalised(curve.distortion[6]) > 0.2


@pytest.mark.parametrize("idle", range(2))
def test_all_heads_that_share_keys_are_read(idle):
    """One of the two heads of queries for each head of keys is zero; the other one is not."""
    model, batches = make("grouped")
    with torch.no_grad():
        rows = torch.arange(2 * HEADS * HEAD).reshape(HEADS, 2, HEAD)[:, idle].flatten()
        model.q.weight[rows], model.q.bias[rows] = 0.0, 0.0
    prepared = scored(model, batches)
    record = graph_record(prepared)
    (curve,) = (c for width, c in zip(record.widths, record.width_curves, strict=True) if width.kind == "queries")
    assert curve.loss > 0
    assert all(loss > 0 for loss in curve.distortion[: HEAD // 2])
    moments = torch.stack([curve.left[head] @ curve.left[head].mT for head in range(HEADS)])
    assert (moments - torch.eye(HEAD, dtype=moments.dtype)).abs().amax() > 1e-3


@pytest.mark.parametrize("kind", ["queries", "values"])
def test_each_half_of_the_samples_is_held_out_from_the_heads_of_the_other(kind):
    """Every other sample lies in another subspace of three dimensions, and the bias in one more."""
    model, (x, *_) = make("unfused", count=1)
    with torch.no_grad():
        model.stem.bias.zero_()
        left, right = torch.randn(2, 3, x.shape[-1])
        x[::2], x[1::2] = x[::2, :, :3] @ left, x[1::2, :, :3] @ right
    record = graph_record(scored(model, [x]))
    (curve,) = (c for width, c in zip(record.widths, record.width_curves, strict=True) if width.kind == kind)
    assert curve.normalised(curve.distortion[4]) > 0.1


def test_damping_keeps_the_unit_of_the_queries():
    """Damped ever more strongly, the metric becomes the identity, and the errors become those of plain features."""
    prepared = scored(*make("unfused"))
    found = []
    for damping in (1e6, 1e9):
        ScoreWidths(damping)(prepared)
        record = graph_record(prepared)
        found += [c for width, c in zip(record.widths, record.width_curves, strict=True) if width.kind == "queries"]
    strong, stronger = found
    assert strong.distortion[0] > 0
    assert strong.distortion == pytest.approx(stronger.distortion, rel=1e-3)
    assert strong.loss == pytest.approx(stronger.loss, rel=1e-3)


def losses_of_all(model, batches):
    """What it costs to lose all features of the only width, and the output of the layer that reads them."""
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False)
    Score("sensitivity")(prepared)
    ScoreWidths()(prepared)
    (width,), (curve,) = graph_record(prepared).widths, graph_record(prepared).width_curves
    reader = next(node for node in prepared.graph.nodes if node.name == width.consumers[0])
    return curve.loss, annotation(reader).curve.loss


def test_errors_at_neighbouring_pixels_add_up_in_a_kernel():
    smooth, reader = nn.Conv2d(3, 12, 7, padding=3), nn.Conv2d(12, 5, 3, padding=1)
    model = nn.Sequential(smooth, nn.Identity(), reader, nn.Flatten()).double().eval()
    with torch.no_grad():
        smooth.weight.copy_(smooth.weight.mean((2, 3), keepdim=True).expand_as(smooth.weight))
        reader.weight.copy_(reader.weight.mean((2, 3), keepdim=True).expand_as(reader.weight))
    width, output = losses_of_all(model, list(torch.randn(4, 32, 3, 12, 12, dtype=torch.float64)))
    assert width == pytest.approx(output, rel=0.1)  # independent taps would give less than a third of it


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (4, 2), (3, 1), (6, 3)])
def test_a_transposed_convolution_adds_up_the_taps_that_meet(kernel, stride):
    model = nn.Sequential(nn.Conv2d(3, 12, 1, bias=False), nn.Identity(), nn.ConvTranspose2d(12, 5, kernel, stride))
    width, output = losses_of_all(model.double().eval(), list(torch.randn(4, 32, 3, 12, 12, dtype=torch.float64)))
    assert width == pytest.approx(output, rel=0.4)  # fewer taps meet at the borders; all of them are 4 or 9 times more


def test_what_never_varies_costs_something_where_outputs_read_other_taps():
    first = nn.Conv2d(3, 12, 1)
    model = nn.Sequential(first, nn.Identity(), nn.ConvTranspose2d(12, 5, 2, stride=2)).double().eval()
    with torch.no_grad():
        first.weight.mul_(1e-3)
        first.bias.fill_(1.0)
    width, output = losses_of_all(model, list(torch.randn(4, 32, 3, 12, 12, dtype=torch.float64)))
    assert width > 0.5 * output  # no bias makes up for a constant that outputs read by other taps
