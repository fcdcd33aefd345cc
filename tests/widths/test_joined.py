import pytest
import torch
from architectures import make, rewritten, scored
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.graph.annotation import graph_record
from balf_fx.widths.joined import embedded, grouped, restricted, same_from


def sets_of(sizes):
    numbers = iter(range(sum(sizes)))
    return [tuple(next(numbers) for _ in range(size)) for size in sizes]


def test_a_matrix_over_some_features_is_embedded():
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    wanted = torch.tensor([[4.0, 0.0, 3.0], [0.0, 9.0, 0.0], [2.0, 0.0, 1.0]])
    assert torch.equal(embedded(matrix, (2, 0), 3, 9.0), wanted)
    assert embedded(matrix, None, 2, 9.0) is matrix


def test_an_order_is_restricted_to_some_features():
    order, counts = restricted(torch.tensor([3, 0, 2, 1]), [0, 1, 2, 4], (1, 3, 2))
    assert order.tolist() == [1, 2, 0]  # feature 3 is at place 1 of those that are held, 2 at place 2
    assert counts == [0, 1, 1, 3]
    whole, sizes = restricted(torch.tensor([1, 0]), [1], None)
    assert whole.tolist() == [1, 0]
    assert sizes == [1]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 8), st.integers(0, 99))
def test_each_set_keeps_multiples_of_the_step(sizes, step, seed):
    sets, count = sets_of(sizes), sum(sizes)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    found = grouped(order, sets, step).tolist()
    assert sorted(found) == list(range(count))
    first = {feature for own in sets for feature in sorted(own, key=order.tolist().index)[:step]}
    assert set(found[: len(first)]) == first
    whole = sum(len(own) // step * step for own in sets)
    if all(len(own) >= step for own in sets):
        for size in range(step * len(sets), whole + 1, step):
            assert all(len(set(own) & set(found[:size])) % step == 0 for own in sets)
    for own in sets:  # within a set, the order is the old one
        assert [f for f in found if f in own] == sorted(own, key=order.tolist().index)


@given(st.permutations(range(7)), st.permutations(range(7)))
def test_from_a_size_on_orders_keep_the_same(first, second):
    found = same_from(torch.tensor(first), torch.tensor(second))
    same = [set(first[:size]) == set(second[:size]) for size in range(8)]
    assert all(same[found:])
    assert found == 0 or not same[found - 1]


def test_without_a_step_features_keep_their_order_behind_the_first_of_each_set():
    order = torch.tensor([2, 3, 1, 0])
    assert grouped(order, [(0, 1), (2, 3)], 1).tolist() == [2, 1, 3, 0]


class Whole(nn.Module):
    """`Joined` with one layer in place of its branches."""

    def __init__(self, other):
        super().__init__()
        self.squeeze, self.wide, self.last = other.squeeze, other.wide, other.last
        self.conv, self.norm = nn.Conv2d(8, 24, 3, padding=1), nn.BatchNorm2d(24)
        small = F.pad(other.one[0].weight, (1, 1, 1, 1))
        self.conv.weight.data = torch.cat([small, other.three[0].weight])
        self.conv.bias.data = torch.cat([other.one[0].bias, other.three[0].bias])
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(self.norm, name).data = torch.cat([getattr(each[2], name) for each in (other.one, other.three)])

    def forward(self, x):
        x = self.norm(F.relu(self.conv(self.squeeze(x))))
        return self.wide(F.max_pool2d(x, 2)).mean((2, 3)) + self.last(x).mean((2, 3))


def width_and_curve(model, batches):
    record = graph_record(scored(model, batches))
    return next((w, c) for w, c in zip(record.widths, record.width_curves, strict=True) if w.name == "last")


def test_branches_lose_what_one_layer_in_their_place_does():
    model, batches = make("joined", torch.float64)
    other = Whole(model).double().eval().requires_grad_(False)
    torch.testing.assert_close(other(batches[0]), model(batches[0]))
    width, curve = width_and_curve(model, batches)
    _, wanted = width_and_curve(other, batches)
    assert torch.equal(curve.order, grouped(wanted.order, width.branches, 1))
    assert curve.loss == pytest.approx(wanted.loss)
    same = [n for n in range(25) if set(curve.order[:n].tolist()) == set(wanted.order[:n].tolist())]
    assert len(same) > 12
    for size in same:
        assert curve.distortion[size] == pytest.approx(wanted.distortion[size], rel=1e-6, abs=1e-9)
    small, whole = (
        rewritten(scored(each, batches), {"channels last": same[12]})(batches[0]) for each in (model, other)
    )
    torch.testing.assert_close(small, whole)


def test_readers_of_some_features_predict_these_alone():
    """What a reader sees of removed features is their prediction from those that it reads, too."""
    model, batches = make("skip", torch.float64)
    record = graph_record(scored(model, batches))
    width, curve = next((w, c) for w, c in zip(record.widths, record.width_curves, strict=True) if w.held)
    kept = curve.kept(12)
    for reader, name in enumerate(width.consumers):
        held = torch.tensor(width.read_by(name) or range(width.features))
        maps = curve.maps(12, reader, width.read_by(name))
        assert held[maps.kept].tolist() == [f for f in held.tolist() if f in kept.tolist()]
        assert maps.left.shape == (1, len(held), len(maps.kept))
        torch.testing.assert_close(maps.left[0, maps.kept], torch.eye(len(maps.kept), dtype=torch.float64))


@pytest.mark.parametrize("name", ["joined", "skip", "aggregated", "chain"])
def test_all_doors_narrow_them(name, tmp_path):
    model, batches = make(name)
    options = {"flops": 0.5, "progress": False}
    small = balf_fx.compile(model, batches, **options)
    plan = balf_fx.plan(small)
    assert any(width.is_narrower for width in plan.widths)
    x = batches[0][:5]
    wanted = small(x)
    balf_fx.save(small, tmp_path / "small")
    torch.testing.assert_close(balf_fx.load(tmp_path / "small", make(name)[0])(x), wanted)
    exported = balf_fx.compile(model, batches, capture="export", **options)
    torch.testing.assert_close(exported(x), wanted)
    module = balf_fx.compile(model, batches, result="module", **options)
    torch.testing.assert_close(module(x), wanted)
    again = balf_fx.compile(model, batches, allocation=balf_fx.Plan.from_json(plan.to_json()), progress=False)
    torch.testing.assert_close(again(x), wanted)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="balf", options={"flops": 0.5, "calibration_steps": 2, "inner": "eager"})
    for batch in batches:
        compiled(batch)
    torch.testing.assert_close(compiled(x), wanted)


@pytest.mark.parametrize("multiple", [4, 8])
def test_each_branch_keeps_a_multiple(multiple):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Branches(), nn.Conv2d(80, 10, 1), nn.AdaptiveAvgPool2d(1))
    batches = [torch.randn(16, 3, 8, 8)]
    small = balf_fx.compile(model.eval(), batches, flops=0.4, multiple_of=multiple, progress=False)
    kept = [layer.weight.shape[0] for name, layer in small.named_modules() if name in ("2.one", "2.three")]
    assert sum(kept) < 80 or not kept
    assert all(count % multiple == 0 for count in kept)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.three = nn.Conv2d(8, 32, 1), nn.Conv2d(8, 48, 3, padding=1)

    def forward(self, x):
        return F.relu(torch.cat([self.one(x), self.three(x)], 1))


class Summed(nn.Module):
    """A layer that outputs the features of two branches, which are added to theirs."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 9, 1), nn.Conv2d(3, 15, 1)
        self.both, self.last = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 10, 1)

    def forward(self, x):
        return self.last(F.relu(torch.cat([self.one(x), self.two(x)], 1) + self.both(x))).mean((2, 3))


def test_a_layer_may_hold_what_several_others_do():
    torch.manual_seed(0)
    model, batches = Summed().eval().requires_grad_(False), [torch.randn(32, 3, 6, 6)]
    prepared = scored(model, batches)
    (width,) = graph_record(prepared).widths
    assert sorted(map(len, width.branches)) == [9, 15]
    assert sorted(feature for own in width.branches for feature in own) == list(range(24))
    narrow = rewritten(prepared, {width.key: 7})
    assert narrow(batches[0]).shape == (32, 10)
    kept = {name: layer.weight.shape[0] for name, layer in narrow.named_modules() if isinstance(layer, nn.Conv2d)}
    assert kept["both"] == kept["one"] + kept["two"] == 7
    assert min(kept["one"], kept["two"]) > 0
