import dataclasses
import itertools
import math
from random import Random

import architectures
import pytest
import torch
from architectures import EVERYTHING, count_flops, count_params, make, rewritten, scored
from hypothesis import given
from hypothesis import strategies as st

from balf_fx.budget.finding import find_clusters
from balf_fx.budget.members import Member, Ranks
from balf_fx.budget.menus import Menu, _on_hulls
from balf_fx.graph.annotation import annotation, graph_record, sites
from balf_fx.graph.curves import FREE, Cost
from balf_fx.ranks.hulls import segments, steepest_first

MEASURES = pytest.mark.parametrize("measure", ["flops", "params"])


def options_of(prepared, cluster, measure, weight=1.0):
    curves = {site: annotation(nodes[0]).curve for site, nodes in sites(prepared).items()}
    own = [curves[member.site] for member in cluster.members]
    found = cluster.options(own, [weight] * len(own), [1.0] * len(cluster.widths), measure)
    options = list(found)
    assert found.costs == [option.cost(measure) for option in options]
    assert found.losses == [option.loss for option in options]
    return options


def carried_out(prepared, cluster, option):
    sizes = dict(zip(cluster.keys, option.sizes, strict=True))
    ranks = {member.site.name: c.rank for member, c in zip(cluster.members, option.ranks, strict=True)}
    return rewritten(prepared, sizes, ranks)


@pytest.mark.parametrize(
    ("name", "centred"), [*((name, True) for name in EVERYTHING), ("gated mlp", False), ("transformer", False)]
)
def test_options_are_efficient_and_their_costs_are_real(name, centred):
    model, batches = make(name)
    prepared = scored(model, batches, centred=centred)
    x = batches[0][:8]
    base = rewritten(prepared, {})
    share = len(x) / len(batches[0])
    for cluster, measure in itertools.product(find_clusters(prepared), ("flops", "params")):
        options = options_of(prepared, cluster, measure)
        costs = [option.cost(measure) for option in options]
        assert costs == sorted(costs)
        assert all(a.loss >= b.loss for a, b in itertools.pairwise(options))
        last = options[-1]
        assert last.loss == 0
        assert last.sizes == tuple(width.features for width in cluster.widths)
        assert last.others == cluster.full
        assert [c.rank for c in last.ranks] == [None] * len(cluster.members)
        assert len({option.sizes for option in options}) > 4
        for option in options[:: max(len(options) // 3, 1)]:
            narrow = carried_out(prepared, cluster, option)
            saved = count_flops(base, x) - count_flops(narrow, x)
            assert saved == pytest.approx((last.total.flops - option.total.flops) * share, abs=0.01)
            assert count_params(base) - count_params(narrow) == last.total.params - option.total.params


@MEASURES
def test_weights_scale_losses(measure):
    model, batches = make("transformer")
    prepared = scored(model, batches)
    cluster = next(c for c in find_clusters(prepared) if len(c.widths) == 2)
    curves = [next(annotation(n[0]).curve for s, n in sites(prepared).items() if s == m.site) for m in cluster.members]
    once = cluster.options(curves, [1.0] * len(curves), [1.0, 1.0], measure)
    twice = cluster.options(curves, [2.0] * len(curves), [2.0, 2.0], measure)
    assert [option.loss * 2 for option in once] == pytest.approx([option.loss for option in twice])
    assert [option.sizes for option in once] == [option.sizes for option in twice]


def test_a_loss_is_the_sum_of_its_parts():
    model, batches = make("gated mlp")
    prepared = scored(model, batches)
    (cluster,) = find_clusters(prepared)
    curves = {site: annotation(nodes[0]).curve for site, nodes in sites(prepared).items()}
    (width,) = graph_record(prepared).width_curves
    for option in options_of(prepared, cluster, "flops"):
        lost = width.normalised(width.distortion[option.sizes[0]])
        for member, candidate in zip(cluster.members, option.ranks, strict=True):
            lost += curves[member.site].normalised(candidate.distortion)
        assert option.loss == pytest.approx(lost)


@MEASURES
def test_options_near_one_are_finer_and_their_costs_are_real(measure):
    model, batches = make("gated mlp")
    prepared = scored(model, batches)
    (cluster,) = find_clusters(prepared)
    own = [next(annotation(n[0]).curve for s, n in sites(prepared).items() if s == m.site) for m in cluster.members]
    options = options_of(prepared, cluster, measure)
    near = options[len(options) // 2]
    found = list(cluster.options(own, [1.0] * len(own), [1.0], measure, near))
    assert any(o.cost(measure) <= near.cost(measure) and o.loss <= near.loss + 1e-12 for o in found)
    assert [o.cost(measure) for o in found] == sorted(o.cost(measure) for o in found)
    base = rewritten(prepared, {})
    for option in found[:: max(len(found) // 4, 1)]:
        narrow = carried_out(prepared, cluster, option)
        saved = count_flops(base, batches[0]) - count_flops(narrow, batches[0])
        assert saved == options[-1].total.flops - option.total.flops
        assert count_params(base) - count_params(narrow) == options[-1].total.params - option.total.params


@MEASURES
def test_options_of_other_weights_are_those_of_a_fresh_cluster(measure, monkeypatch):
    model, batches = make("transformer")
    prepared = scored(model, batches)
    curves = {site: annotation(nodes[0]).curve for site, nodes in sites(prepared).items()}
    for cluster, fresh in zip(find_clusters(prepared), find_clusters(prepared), strict=True):
        own = [curves[member.site] for member in cluster.members]
        weights, of_widths = [3.0 + index for index in range(len(own))], [0.5] * len(cluster.widths)
        options_of(prepared, cluster, "flops")
        options_of(prepared, cluster, "params")
        with monkeypatch.context() as context:
            context.setattr(Member, "candidates", lambda *_: pytest.fail("priced again"))
            found = list(cluster.options(own, weights, of_widths, measure))
        assert found == list(fresh.options(own, weights, of_widths, measure))
        near = found[len(found) // 2]
        wanted = fresh.options(own, weights, of_widths, measure, near)
        assert list(cluster.options(own, weights, of_widths, measure, near)) == list(wanted)


def test_options_of_other_curves_are_priced_again():
    model, batches = make("gated mlp")
    prepared = scored(model, batches)
    (cluster,) = find_clusters(prepared)
    own = [next(annotation(n[0]).curve for s, n in sites(prepared).items() if s == m.site) for m in cluster.members]
    double = [dataclasses.replace(curve, energy=2 * curve.energy) for curve in own]
    once = cluster.options(own, [1.0] * len(own), [0.0], "flops")
    half = cluster.options(double, [1.0] * len(own), [0.0], "flops")
    assert [option.loss for option in half] == pytest.approx([option.loss / 2 for option in once])


def test_clusters_are_the_joint_widths():
    model, batches = make("transformer")
    found = find_clusters(scored(model, batches))
    assert sorted(sorted(width.name for width in cluster.widths) for cluster in found) == [
        ["down"],
        ["proj", "qkv:queries"],
    ]
    attention = next(cluster for cluster in found if len(cluster.widths) == 2)
    assert {member.site.name: member.mixed for member in attention.members} == {"qkv": True, "proj": False}
    (share,) = attention.shares  # the product: what is smaller is padded
    assert sorted(part for _, part in share.shrinks) == [0.5, 0.5]
    assert share.cost([1.0, 1.0]) == Cost(share.full.flops)
    assert share.cost([0.5, 0.5]) == Cost(share.full.flops // 2)
    assert share.cost([0.5, 1.0]) == share.cost([1.0, 0.5]) == Cost(share.full.flops)
    assert share.cost([0.5, 0.75]) == Cost(share.full.flops * 3 // 4)
    apart = dataclasses.replace(share, padded=False)
    assert apart.cost([0.5, 1.0]) == Cost(share.full.flops * 3 // 4)


def test_mixed_layers_have_no_ranks_of_their_own_once_narrowed():
    model, batches = make("fused")
    (cluster,) = find_clusters(prepared := scored(model, batches))
    options = options_of(prepared, cluster, "flops")
    (index,) = (i for i, member in enumerate(cluster.members) if member.site.name == "qkv")
    narrowed = [o for o in options if o.sizes != tuple(width.features for width in cluster.widths)]
    assert narrowed
    assert all(option.ranks[index].rank is None for option in narrowed)


def test_what_has_not_been_scored_is_in_no_cluster():
    model, batches = make("mlp")
    prepared = scored(model, batches)
    record = graph_record(prepared)
    assert len(find_clusters(prepared)) == 1
    prepared.meta["balf"] = type(record)(**{**record.__dict__, "width_curves": (None,)})
    assert find_clusters(prepared) == []


@pytest.mark.parametrize(("hidden", "step"), [(256, 8), (272, 8), (128, 4), (132, 4), (100, 1)])
def test_sizes_suit_the_hardware(hidden, step):
    prepared = scored(architectures.Mlp(hidden=hidden).eval(), [torch.randn(64, 12)])
    (cluster,) = find_clusters(prepared)
    sizes = {option.sizes[0] for option in options_of(prepared, cluster, "flops")}
    assert len(sizes) > 4
    assert max(sizes) == hidden
    assert math.gcd(*(sizes - {hidden})) == step


@st.composite
def menus(draw):
    """Menus of three members, which share some of their candidates, with many choices."""
    rng = Random(draw(st.integers(0, 10_000)))

    def ranks():
        count = rng.choice((9, 12, 20))
        costs = [rng.randrange(100) for _ in range(count)]
        losses = [rng.choice((rng.random(), 0.25, 0.5)) for _ in range(count)]
        costs, losses = torch.tensor(costs), torch.tensor(losses, dtype=torch.float64)
        return Ranks(None, tuple(range(count)), costs, losses)

    pools = [[ranks() for _ in range(2)] for _ in range(3)]
    found = [Menu(FREE, tuple(map(rng.choice, pools))) for _ in range(5)]
    weights = [rng.choice((0.0, 1.0, 1.0, 3.0)) for _ in range(3)]
    return [*found, Menu(FREE, (pools[0][0], pools[1][0], ranks()))], weights


@given(menus())
def test_choices_on_hulls_take_the_steepest_segment_that_is_left(drawn):
    found, weights = drawn
    for menu, priced in zip(found, _on_hulls(found, weights), strict=True):
        rows = [(row.costs.tolist(), row.losses.tolist(), row.hull.points.tolist()) for row in menu.rows]
        picked = [points[0] for _, _, points in rows]
        expected = [tuple(picked)]
        steps = [
            [(weight * steepness, point) for steepness, point in segments(*row)]
            for row, weight in zip(rows, weights, strict=True)
        ]
        for _, member, point in steepest_first(steps):
            picked[member] = point
            expected.append(tuple(picked))
        assert list(map(tuple, priced.picks.tolist())) == expected
        for choice, cost, loss in zip(expected, priced.costs.tolist(), priced.losses.tolist(), strict=True):
            assert cost == sum(costs[own] for (costs, _, _), own in zip(rows, choice, strict=True))
            lost = (weight * losses[own] for weight, (_, losses, _), own in zip(weights, rows, choice, strict=True))
            assert loss == pytest.approx(sum(lost))
