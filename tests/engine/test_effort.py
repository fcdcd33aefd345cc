import pytest
import torch
from architectures import count_flops, count_params, make

import balf_fx
from balf_fx.errors import OptionError
from balf_fx.graph.annotation import graph_record

EFFORTS = ["fast", "balanced", "best"]


def distance(model, other, x):
    with torch.no_grad():
        return float((model(x).log_softmax(-1) - other(x).log_softmax(-1)).square().sum())


@pytest.mark.parametrize("name", ["mlp", "inverted residual", "transformer"])
@pytest.mark.parametrize("effort", EFFORTS)
def test_every_effort_keeps_the_budget_and_the_model(name, effort):
    model, batches = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    for measure in ("flops", "params"):
        narrow = balf_fx.compile(model, iter(batches), effort=effort, progress=False, **{measure: 0.7})
        report = balf_fx.report(narrow)
        assert (report.flops_kept if measure == "flops" else report.params_kept) <= 0.7
        assert count_flops(narrow, batches[0]) == report.flops_after
        assert count_params(narrow) == report.params_after
        assert narrow(batches[0][:5]).shape == (5, 10)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("effort", EFFORTS)
def test_the_same_seed_gives_the_same_model(effort):
    model, batches = make("transformer")
    first, second = (balf_fx.compile(model, batches, flops=0.6, effort=effort, progress=False) for _ in range(2))
    assert [a.shape for a in first.parameters()] == [b.shape for b in second.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_more_effort_stays_closer():
    model, batches = make("transformer", count=8)
    seen, fresh = batches[:6], torch.cat(batches[6:])
    errors = [
        distance(model, balf_fx.compile(model, seen, flops=0.6, effort=effort, progress=False), fresh)
        for effort in EFFORTS
    ]
    assert errors[2] < errors[1] < errors[0]


def test_widths_are_found_unless_told_not_to_be():
    model, batches = make("transformer")
    without = balf_fx.prepare(model, batches[0], factors="sensitivity", widths=False, pivot=False)
    assert graph_record(without).widths == ()
    assert graph_record(balf_fx.prepare(model, batches[0], factors="activations", pivot=False)).widths == ()
    assert len(graph_record(balf_fx.prepare(model, batches[0], factors="sensitivity")).widths) == 3
    narrow, wide = (
        balf_fx.compile(model, batches, flops=0.6, effort="balanced", widths=widths, progress=False)
        for widths in (True, False)
    )
    assert any("unflatten" in str(node.target) for node in narrow.graph.nodes)
    assert not any("unflatten" in str(node.target) for node in wide.graph.nodes)
    assert distance(model, narrow, batches[0]) < distance(model, wide, batches[0])


def test_fast_knows_no_widths():
    model, batches = make("mlp")
    narrow = balf_fx.compile(model, batches, flops=0.6, effort="fast", progress=False)
    assert {row.shape for row in balf_fx.report(narrow).sites} == {"32 x 12 x 1", "10 x 32 x 1"}
    assert all(row.rank is None or row.rank > 0 for row in balf_fx.report(narrow).sites)
    assert any(row.rank is not None for row in balf_fx.report(narrow).sites)


@pytest.mark.parametrize("options", [{"allocation": "uniform"}, {"allocation": "energy"}, {"factors": "activations"}])
def test_other_options_leave_widths_alone(options):
    model, batches = make("transformer")
    narrow = balf_fx.compile(model, batches, flops=0.7, effort="balanced", progress=False, **options)
    assert balf_fx.report(narrow).flops_after == count_flops(narrow, batches[0])
    assert not any("unflatten" in str(node.target) for node in narrow.graph.nodes)


def test_explicit_ranks_leave_widths_alone():
    model, batches = make("mlp")
    narrow = balf_fx.compile(model, batches, effort="balanced", allocation={"up": 4}, progress=False)
    assert narrow.get_submodule("down").weight.shape == (10, 32)
    assert narrow.get_submodule("up.0").weight.shape == (4, 12)


def test_a_full_budget_changes_nothing():
    model, batches = make("mlp")
    narrow = balf_fx.compile(model, batches, flops=1.0, effort="balanced", progress=False)
    assert torch.equal(narrow(batches[0]), model(batches[0]))


def test_another_factoring_can_follow_from_the_same_graph():
    model, batches = make("mlp")
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False)
    results = [
        balf_fx.convert(prepared, flops=0.6, factors=factors, progress=False)
        for factors in ("sensitivity", "activations", "sensitivity")
    ]
    shapes = [[parameter.shape for parameter in result.parameters()] for result in results]
    assert shapes[0] == shapes[2] != shapes[1]
    assert torch.equal(results[0](batches[0]), results[2](batches[0]))


def test_an_unknown_effort_is_an_error():
    model, batches = make("mlp")
    with pytest.raises(OptionError, match="'fast', 'balanced', 'best'"):
        balf_fx.compile(model, batches, flops=0.5, effort="slow")


def test_a_users_loss_is_measured_too():
    model, batches = make("mlp")
    seen = []

    def loss(output, batch):
        seen.append(len(batch))
        return output.square().mean()

    balf_fx.compile(model, batches, flops=0.7, effort="balanced", loss=loss, progress=False)
    runs, rest = divmod(len(seen), len(batches))
    assert runs > 1  # one for the gradients, and one for each allocation that differs from those before
    assert rest == 0
