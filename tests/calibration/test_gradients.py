import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.calibration.gradients import TEMPERATURE, probe
from balf_fx.calibration.observers import SensitivityObserver
from balf_fx.calibration.outputs import find_logits
from balf_fx.errors import CalibrationError
from balf_fx.graph.annotation import annotation, sites
from balf_fx.ranks.spectra import damped_roots, spectrum_from_input, spectrum_from_output, thin_qr


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prepared(model, batches, **options):
    graph_module = balf_fx.prepare(model, batches[0], sensitivity=True)
    balf_fx.calibrate(graph_module, batches, progress=False, **options)
    return graph_module


def observer(graph_module, name):
    for site, nodes in sites(graph_module).items():
        if site.name == name:
            return graph_module.get_submodule(annotation(nodes[0]).sensitivity)
    raise KeyError(name)


def test_the_probe_of_logits_has_the_second_moment_of_the_divergence():
    logits = torch.randn(1, 4, dtype=torch.float64)
    p = (logits / TEMPERATURE).softmax(-1)[0]
    samples, draws = 20_000, generator()
    rows = logits.expand(samples, 4).detach().requires_grad_()
    (gradients,) = torch.autograd.grad(probe(rows, None, draws), rows)
    second = gradients.mT @ gradients / samples
    torch.testing.assert_close(second, torch.diag(p) - p[:, None] * p, rtol=0.05, atol=0.01)


def test_a_confident_answer_is_sensitive_too():
    """The divergence itself has a curvature of 1e-6 there, as if errors of any size changed nothing."""
    rows = torch.tensor([[14.0, 0.0, 0.0, 0.0]]).expand(2000, 4).double().requires_grad_()
    (gradients,) = torch.autograd.grad(probe(rows, None, generator()), rows)
    assert float(gradients.square().sum(1).mean()) > 0.1


def test_what_counts_as_logits():
    ids = torch.zeros(2, 3, dtype=torch.long)
    x = torch.randn(2, 3, 7, requires_grad=True)
    row = torch.randn(2, 7, requires_grad=True)
    assert find_logits(row, None) is row
    assert find_logits({"logits": x, "hidden": row}, None) is x
    assert find_logits(x, ids) is x
    assert find_logits(x, torch.randn(2, 3)) is None
    assert find_logits((row, row), None) is None
    plain = torch.randn(2, 7)
    assert find_logits(plain, None) is plain


class TwoTokens(nn.Module):
    """Only the first position reaches the answer, and of it only the first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        with torch.no_grad():
            self.head.weight[:, 1:] = 0

    def forward(self, x):
        return self.head(self.mix(x)[:, 0])


def test_gradients_tell_positions_and_directions_that_matter():
    x = torch.randn(64, 2, 6)
    found = observer(prepared(TwoTokens().eval(), [x]), "mix")
    scatter = found.sample.gradients.scatter[0]
    assert found.sample.gradients.samples == 64
    assert found.positions[0] > 0
    assert found.positions[1] == 0
    basis = torch.eye(6, dtype=torch.float64) if found.basis is None else found.basis[0].double()
    full = basis @ scatter @ basis.mT
    assert float(full[0, 0]) == pytest.approx(float(scatter.trace()), rel=1e-4)
    torch.testing.assert_close(found.sample.moments.mean[0], x[:, 0].mean(0).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 6), (6, 12)], ids=["output side", "input side"])
def test_two_sided_factors_lose_least_of_what_the_loss_minds(shape):
    inputs, outputs = shape
    generator_ = generator(1)
    weight = torch.randn(1, outputs, inputs, dtype=torch.float64, generator=generator_)
    x = torch.randn(1, inputs, 200, dtype=torch.float64, generator=generator_)
    g = torch.randn(1, outputs, outputs, dtype=torch.float64, generator=generator_) @ torch.randn(
        1, outputs, 300, dtype=torch.float64, generator=generator_
    )
    second = g @ g.mT / 300
    y = weight @ x
    if inputs < outputs:
        basis = thin_qr(weight)[0]
        roots = damped_roots(basis.mT @ second @ basis, 0.0)
        metric = basis @ roots[0].mT @ roots[0] @ basis.mT
        spectrum = spectrum_from_input(weight, x @ x.mT / 200, None, roots)
    else:
        roots = damped_roots(second, 0.0)
        metric = roots[0].mT @ roots[0]
        spectrum = spectrum_from_output(y @ y.mT / 200, None, roots)
    for rank in (1, 2, 4):
        left, right = spectrum.maps(rank)

        def lost(left, right):
            error = y - left @ (right @ y)
            return float((error * (metric @ error)).sum() / 200)

        best = lost(left, right)
        assert best == pytest.approx(float(spectrum.energies[0, rank:].sum()), rel=1e-6, abs=1e-9)
        for scale in (1e-3, 1e-1, 1.0):
            moved = [
                part + scale * torch.randn(part.shape, dtype=torch.float64, generator=generator_)
                for part in (left, right)
            ]
            assert best <= lost(*moved) + 1e-9


def test_roots_of_nothing_are_the_identity():
    root, inverse = damped_roots(torch.zeros(1, 3, 3, dtype=torch.float64), 0.1)
    torch.testing.assert_close(root[0], torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(inverse[0], torch.eye(3, dtype=torch.float64))


def test_frozen_models_are_calibrated_and_stay_frozen(conv_net, images):
    conv_net.requires_grad_(False)
    graph_module = prepared(conv_net, images)
    assert observer(graph_module, "stem").sample is not None
    assert not any(parameter.requires_grad for parameter in graph_module.parameters())


def test_in_place_changes_do_not_reach_the_statistics():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)).eval()
    x = torch.randn(32, 6)
    found = observer(prepared(model, [x]), "0")
    assert isinstance(found, SensitivityObserver)
    with torch.no_grad():
        model[0].bias.copy_(-10 * torch.ones(4))  # now all that ReLU leaves is zero
    found = observer(prepared(nn.Sequential(model[0], nn.Identity(), model[2]).eval(), [x]), "0")
    assert (found.sample.moments.mean < -5).all()
    model[0].bias.data += 9.5  # some outputs are positive, so that gradients flow
    found = observer(prepared(model, [x]), "0")
    assert (found.sample.moments.mean < 0).all()


def test_a_plain_call_of_the_graph_keeps_nothing(conv_net, images):
    graph_module = balf_fx.prepare(conv_net, images[0], sensitivity=True)
    graph_module(images[0])
    found = observer(graph_module, "stem")
    with torch.enable_grad():
        output = graph_module(images[0])
        with found.recording() as recorded:
            graph_module(images[0])
        graph_module(images[0])
    assert output.requires_grad
    assert len(recorded) == 1
    assert found.sample is None


def test_a_users_loss_takes_the_place_of_ours(conv_net, images):
    labels = torch.zeros(8, dtype=torch.long)
    loss = lambda output, batch: nn.functional.cross_entropy(output, labels)  # noqa: E731
    found = observer(prepared(conv_net, images, loss=loss), "head")
    assert float(found.sample.gradients.unit) > 0
    with pytest.raises(CalibrationError, match="scalar"):
        prepared(conv_net, images, loss=lambda output, batch: output)


class Hard(nn.Module):
    """Its answer has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        return self.linear(x).argmax(-1)


def test_where_no_gradient_flows_the_plain_error_counts(caplog):
    x = torch.randn(32, 6)
    with caplog.at_level("INFO", "balf_fx"):
        compressed = balf_fx.compile(nn.Sequential(Hard()).eval(), x, flops=0.9, factors="sensitivity", progress=False)
    assert "no gradient has reached" in caplog.text
    assert balf_fx.report(compressed).flops_kept <= 0.9


def test_the_same_seed_gives_the_same_model(conv_net, images):
    first, second = (
        balf_fx.compile(conv_net, images, flops=0.5, factors="sensitivity", progress=False) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_batch_beyond_the_memory_runs_in_pieces(conv_net, images):
    whole = prepared(conv_net, images)
    pieces, again = (prepared(conv_net, images, memory=200_000) for _ in range(2))
    for site, nodes in sites(whole).items():
        path = annotation(nodes[0]).sensitivity
        seen, apart, repeated = (model.get_submodule(path) for model in (whole, pieces, again))
        assert apart.sample.gradients.samples == seen.sample.gradients.samples == sum(map(len, images)), site.name
        assert torch.equal(apart.sample.gradients.scatter, repeated.sample.gradients.scatter)
        assert not torch.equal(apart.sample.gradients.scatter, seen.sample.gradients.scatter)
        path = annotation(nodes[0]).observer
        torch.testing.assert_close(
            pieces.get_submodule(path).moments.covariance(), whole.get_submodule(path).moments.covariance()
        )


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).relu()))


def test_halves_have_no_sample_in_common_where_a_layer_is_used_twice():
    """Batches of one sample go to either half in turn, with both uses of the layer."""
    model, batches = Twice().eval(), list(torch.randn(6, 1, 6))
    options = {"loss": lambda output, _: output.square().sum()}
    whole = observer(prepared(model, batches, **options), "layer")
    for half in range(2):
        own = observer(prepared(model, batches[half::2], **options), "layer").sample
        torch.testing.assert_close(whole.halves[half].gradients.scatter, own.gradients.scatter)
        torch.testing.assert_close(whole.halves[half].moments.scatter, own.moments.scatter)


def test_an_output_of_zeros_has_no_gradient_and_any_other_scale_the_same():
    generator = torch.Generator()
    value = torch.randn(4, 3, 5)
    assert not probe([torch.zeros(4, 3, requires_grad=True)], None, generator).requires_grad
    found = []
    for scale in (1e-30, 1.0, 1e30):
        output, zeros = (value * scale).requires_grad_(), torch.zeros(4, requires_grad=True)
        scalar = probe({"image": output, "zeros": zeros}, None, generator.manual_seed(0))
        gradient, nothing = torch.autograd.grad(scalar, [output, zeros], allow_unused=True)
        assert nothing is None
        found.append(gradient.double() * scale)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[2], found[1], rtol=1e-5, atol=0)


class Rows(nn.Module):
    """A layer that sees samples, or their tokens as rows."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer, self.head = how, nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        rows = self.how == "rows"
        y = self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if rows else self.layer(x)
        return self.head(torch.tanh(y).mean(1))


def test_the_loss_of_a_sample_does_not_depend_on_how_it_is_laid_out():
    batches, found = list(torch.randn(3, 16, 6, 8)), []
    for each in ("rows", "samples"):
        torch.manual_seed(0)
        prepared = balf_fx.prepare(Rows(each).eval(), batches[0], factors="sensitivity")
        balf_fx.calibrate(prepared, batches, progress=False)
        (observer,) = (
            module
            for module in prepared.modules()
            if isinstance(module, SensitivityObserver) and module.site.name == "layer"
        )
        found.append([half.gradients for half in observer.halves])
    for own, other in zip(*found, strict=True):
        assert own.samples == pytest.approx(other.samples) == 24
        torch.testing.assert_close(own.scatter, other.scatter)
