import pytest
import torch
from expert_models import EXPERTS, INPUTS, OUTPUTS, Batched, Selected, SelectedTwo

from balf_fx.calibration.experts import ExpertObserver, ExpertSensitivityObserver, expert_moments
from balf_fx.capture.normal_form import capture
from balf_fx.graph.experts import read_experts
from balf_fx.graph.layers import read_site

ROWS = 40


@pytest.fixture
def selected():
    """A layer with a selected expert for each row, an input and the experts."""
    torch.manual_seed(0)
    graph_module = capture(Selected(inputs_first=False).eval(), torch.randn(2, 5, INPUTS))
    (node,) = [each for each in graph_module.graph.nodes if read_experts(each) is not None]
    x = torch.randn(ROWS, INPUTS).double()
    return read_site(graph_module, node), read_experts(node).rows, x, torch.randint(0, 2, (ROWS,))


def by_hand(values, weights):
    mean = (weights[:, None] * values).sum(0) / weights.sum()
    centred = values - mean
    return mean, (weights[:, None] * centred).T @ centred


def test_moments_are_those_of_each_experts_rows(selected):
    site, rows, x, ids = selected
    observer = ExpertObserver(site, rows, side="input")
    for part in (slice(0, 15), slice(15, 15), slice(15, None)):  # in batches, one of them empty
        observer(x[part].unsqueeze(1), ids[part])
    seen = observer.moments
    assert seen.count.tolist() == [int((ids == 0).sum()), int((ids == 1).sum()), 0]
    for expert in range(2):
        mean, scatter = by_hand(x[ids == expert], torch.ones(seen.count[expert].int()))
        torch.testing.assert_close(seen.mean[expert], mean)
        torch.testing.assert_close(seen.scatter[expert], scatter)
        torch.testing.assert_close(seen.covariance()[expert], scatter / seen.count[expert])
    assert not seen.scatter[2].any()
    assert not seen.second_moment()[2].any()


def test_gradients_weight_each_experts_rows(selected):
    site, rows, x, ids = selected
    observer = ExpertSensitivityObserver(site, rows, None, copies=False)
    gradient = torch.randn(ROWS, 1, OUTPUTS).double()
    output = torch.randn(ROWS, 1, OUTPUTS).double().requires_grad_()
    with observer.recording(samples=8) as recorded:
        observer(x.unsqueeze(1), output, ids)
    observer.take(recorded[0], gradient)
    sample = observer.sample
    g, seen = gradient.squeeze(1), (x if site.side == "input" else output.detach().squeeze(1))
    assert sample.gradients.samples == 8
    for expert in range(2):
        own = ids == expert
        mean, scatter = by_hand(seen[own], g[own].square().sum(-1))
        torch.testing.assert_close(sample.gradients.scatter[expert], g[own].T @ g[own])
        torch.testing.assert_close(sample.moments.mean[expert], mean)
        torch.testing.assert_close(sample.moments.scatter[expert], scatter)
        halves = [half.gradients.scatter[expert] for half in observer.halves]
        torch.testing.assert_close(halves[0], g[own][: len(g[own]) // 2].T @ g[own][: len(g[own]) // 2])
        torch.testing.assert_close(halves[0] + halves[1], sample.gradients.scatter[expert])


def test_rows_of_zeros_that_fill_up_places_do_not_count():
    rows = [torch.cat([torch.randn(5, 3), torch.zeros(4, 3)]), torch.zeros(9, 3)]
    seen = expert_moments(rows, torch.float64)
    assert seen.count.tolist() == [5, 0]
    mean, scatter = by_hand(rows[0][:5].double(), torch.ones(5).double())
    torch.testing.assert_close(seen.mean[0], mean)
    torch.testing.assert_close(seen.scatter[0], scatter)
    assert expert_moments(rows[1:], torch.float64) is None


@pytest.mark.parametrize(("form", "repeats"), [(SelectedTwo, 2), (Batched, EXPERTS)])
def test_a_row_counts_for_each_expert_that_sees_it(form, repeats):
    torch.manual_seed(0)
    model, x = form(inputs_first=False).eval().double(), torch.randn(4, 5, INPUTS).double()
    graph_module = capture(model, x)
    (node,) = [each for each in graph_module.graph.nodes if read_experts(each) is not None]
    observer = ExpertObserver(read_site(graph_module, node), read_experts(node).rows, side="input")
    flat, chosen = x.reshape(-1, INPUTS), model.router(x.reshape(-1, INPUTS)).topk(2, -1)[1]
    observer(*((flat, chosen) if repeats == 2 else (flat.expand(EXPERTS, -1, -1),)))
    assert observer.moments.count.sum() == repeats * len(flat)
    first = flat[(chosen == 0).any(-1)] if repeats == 2 else flat
    torch.testing.assert_close(observer.moments.second_moment()[0], first.T @ first / len(first))
