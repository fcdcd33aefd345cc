import math

import architectures
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import balf_fx
from balf_fx.budget.problem import Problem, Totals, pose
from balf_fx.errors import BudgetError, OptionError, PassError, UnknownSiteError
from balf_fx.graph.annotation import annotation, graph_record, sites
from balf_fx.passes import Allocate, Annotate, Score


@pytest.fixture(scope="module")
def scored() -> fx.GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 16)).double()
    x = torch.randn(300, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    graph_module = balf_fx.prepare(model, x)
    graph_module(x)
    return Score()(graph_module).graph_module


def allocate(graph_module: fx.GraphModule, **options):
    result = Allocate(**options)(graph_module)
    assert not result.modified
    return graph_record(graph_module).allocation


def costs(allocation, measure):
    return [choice.chosen.cost(measure) for choice in allocation.choices]


@settings(max_examples=60)
@given(st.floats(0.2, 1.0), st.sampled_from(["flops", "params"]), st.sampled_from(["budget", "uniform", "energy"]))
def test_a_budget_is_kept_and_used_up(scored, target, measure, method):
    allocation = allocate(scored, **{measure: target}, method=method)
    total = getattr(graph_record(scored), measure)
    dense = [choice.dense.cost(measure) for choice in allocation.choices]
    spent = sum(costs(allocation, measure)) + (total - sum(dense))
    assert spent <= target * total
    steps = [
        candidate.cost(measure) - choice.chosen.cost(measure)
        for choice, (node, *_) in zip(allocation.choices, sites(scored).values(), strict=True)
        for candidate in annotation(node).curve.candidates
        if choice.chosen.cost(measure) < candidate.cost(measure) <= choice.dense.cost(measure)
    ]
    assert not steps or spent + min(steps) > target * total


@settings(max_examples=40)
@given(st.floats(0.2, 1.0))
def test_the_optimum_is_between_its_bound_and_the_simpler_methods(scored, target):
    best = allocate(scored, flops=target)
    assert best.bound <= best.primal + 1e-12
    assert best.gap == pytest.approx(best.primal - best.bound, abs=1e-12)
    for method in ("uniform", "energy"):
        other = allocate(scored, flops=target, method=method)
        assert other.bound is other.gap is None
        assert best.primal <= other.primal + 1e-12


def test_the_whole_budget_keeps_every_site_dense(scored):
    for measure in ("flops", "params"):
        allocation = allocate(scored, **{measure: 1.0})
        assert all(choice.chosen.rank is None for choice in allocation.choices)
        assert allocation.primal == 0.0


def test_a_larger_budget_never_loses_more(scored):
    lost = [allocate(scored, flops=target).primal for target in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
    assert lost == sorted(lost, reverse=True)


def test_uniform_keeps_nearly_the_same_share_of_each_site(scored):
    allocation = allocate(scored, flops=0.5, method="uniform")
    for choice in allocation.choices:
        step = (choice.site.out_features + choice.site.in_features) / (
            choice.site.out_features * choice.site.in_features
        )
        assert abs(choice.chosen.flops / choice.dense.flops - 0.5) <= step


@given(st.floats(0.3, 1.0), st.floats(0.0, 1.0), st.sampled_from(["flops", "params"]))
def test_evenness_keeps_a_part_of_the_common_share_in_each_site(scored, target, evenness, measure):
    allocation = allocate(scored, **{measure: target}, evenness=evenness)
    plain = allocate(scored, **{measure: target})
    dense = [choice.dense.cost(measure) for choice in allocation.choices]
    fixed = getattr(graph_record(scored), measure) - sum(dense)
    share = evenness * (target * (sum(dense) + fixed) - fixed) / sum(dense)
    assert sum(costs(allocation, measure)) + fixed <= target * (sum(dense) + fixed)
    assert allocation.primal >= plain.primal - 1e-12
    kept = [cost / full for cost, full in zip(costs(allocation, measure), dense, strict=True)]
    # a site may fall below where no choice above fits into the budget: then the condition does not apply at all
    assert min(kept) >= share - 1 / min(dense) or costs(allocation, measure) == costs(plain, measure)


def test_an_energy_threshold_takes_the_smallest_rank_that_keeps_it(scored):
    allocation = allocate(scored, method="energy", energy=0.9)
    assert allocation.target is None
    for choice, (node, *_) in zip(allocation.choices, sites(scored).values(), strict=True):
        assert choice.energy_kept >= 0.9
        smaller = [c for c in annotation(node).curve.candidates[:-1] if c.flops < choice.chosen.flops]
        assert all(1 - c.distortion / annotation(node).curve.energy < 0.9 for c in smaller)


def test_explicit_ranks_are_taken_as_they_are(scored):
    allocation = allocate(scored, ranks={"0": 3, "2": None})
    assert [choice.chosen.rank for choice in allocation.choices] == [3, None, None]
    assert (allocation.method, allocation.target) == ("ranks", None)


def test_a_budget_below_reach_names_the_reachable_minimum(scored):
    with pytest.raises(BudgetError, match=r"flops=0\.01 is out of reach.*Ask for flops=0\.\d+ or more") as caught:
        allocate(scored, flops=0.01)
    minimum = caught.value.minimum
    assert all(choice.chosen.rank == 1 for choice in allocate(scored, flops=minimum).choices)
    with pytest.raises(BudgetError):
        allocate(scored, flops=math.floor(minimum * 1e3) / 1e3 - 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one budget.*got none"),
        ({"flops": 0.5, "params": 0.5}, "exactly one budget.*got flops, params"),
        ({"flops": 0.5, "method": "free"}, "takes no budget: drop flops"),
        ({"flops": 0}, r"fraction in \(0, 1\].*not 0"),
        ({"flops": 55}, r"fraction in \(0, 1\].*not 55"),
        ({"params": -0.1}, r"fraction in \(0, 1\]"),
        ({"flops": float("nan")}, r"fraction in \(0, 1\]"),
        ({"flops": "0.5"}, r"fraction in \(0, 1\]"),
        ({"flops": True}, r"fraction in \(0, 1\]"),
        (
            {"flops": 0.5, "method": "best"},
            "allocation must be one of 'budget', .*, or a mapping",
        ),
        ({"energy": 0.5}, "requires allocation='energy'"),
        ({"method": "energy"}, "energy=0.95.*got none"),
        ({"method": "energy", "energy": 0.5, "flops": 0.5}, "exactly one"),
        ({"flops": 0.5, "ranks": {}}, "drop flops"),
    ],
)
def test_options_that_mean_nothing_are_refused_at_once(options, message):
    with pytest.raises(OptionError, match=message):
        Allocate(**options)


@pytest.mark.parametrize("rank", [0, 16, -1, 2.0, True])
def test_a_rank_outside_of_what_saves_is_refused(scored, rank):
    with pytest.raises(OptionError, match=r"rank of '0' must be a whole number from 1 to 14"):
        allocate(scored, ranks={"0": rank})


def test_an_unknown_site_is_refused(scored):
    with pytest.raises(UnknownSiteError, match="there is no site named 9; the sites are: 0, 2, 4"):
        allocate(scored, ranks={"9": 1})


def test_what_an_earlier_pass_leaves_is_required():
    graph_module = Annotate()(fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8)))).graph_module
    with pytest.raises(PassError, match="run Score first"):
        Allocate(params=0.5)(graph_module)
    Score(factors="svd")(graph_module)
    with pytest.raises(PassError, match="the graph's FLOPs were not counted"):
        Allocate(flops=0.5)(graph_module)
    assert allocate(graph_module, params=0.8).choices[0].chosen.rank == 3


@pytest.mark.parametrize("name", ["mlp", "fused", "transformer"])
@pytest.mark.parametrize("target", [0.4, 0.6, 0.8, 1.0])
def test_the_bound_holds_for_sizes_of_the_finer_grid_too(name, target):
    graph_module = architectures.scored(*architectures.make(name))
    Allocate(flops=target, importance=0.6, strict=False)(graph_module)
    allocation = graph_record(graph_module).allocation
    assert target == 1.0 or allocation.sizes
    assert 0 <= allocation.bound <= allocation.primal + 1e-12


@pytest.fixture(scope="module")
def with_widths() -> Problem:
    torch.manual_seed(0)
    prepared = architectures.scored(*architectures.make("inverted residual"))
    record = graph_record(prepared)
    return pose([(prepared, 1)], Totals(record.flops, record.params, architectures.count_params(prepared)))


@pytest.mark.parametrize("measure", ["flops", "params"])
def test_no_choice_is_better_than_the_bound(with_widths, measure):
    """The bound holds for all sizes that were tried, those of the second, finer grid included."""
    for percent in range(30, 100, 2):
        found = Allocate(**{measure: percent / 100}, strict=False, importance=0.6).solve(with_widths)
        assert found.bound <= found.primal * (1 + 1e-9)
