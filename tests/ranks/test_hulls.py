import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balf_fx.ranks.hulls import lower_hull, segments, slope, steepest_first

POINTS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=9)
PROPERTY = settings(max_examples=300, derandomize=True)


def envelope(points, cost):
    """The least loss that a mixture of two points has at a cost, in exact arithmetic."""
    mixtures = []
    for (a, x), (b, y) in itertools.combinations_with_replacement(sorted(points), 2):
        if a <= cost <= b:
            share = Fraction(cost - a, b - a) if b > a else 0
            mixtures.append(x + share * (y - x) if b > a else min(x, y))
    return min(mixtures)


def reached(points, multiplier):
    """All points of the least loss + multiplier * cost."""
    least = min(loss + multiplier * cost for cost, loss in points)
    return {(cost, loss) for cost, loss in points if loss + multiplier * cost == least}


@PROPERTY
@given(POINTS)
def test_the_hull_is_the_least_loss_of_any_mixture(points):
    costs, losses = zip(*points, strict=True)
    hull = [points[i] for i in lower_hull(costs, losses)]
    assert hull[0] == min(points)
    assert hull[-1][1] == min(losses)
    for (a, x), (b, y) in itertools.pairwise(hull):
        assert b > a
        assert y < x
        for cost in range(a, b + 1):
            assert x + Fraction(cost - a, b - a) * (y - x) == envelope(points, cost)


@PROPERTY
@given(POINTS)
def test_corners_are_what_one_multiplier_alone_reaches(points):
    costs, losses = zip(*points, strict=True)
    hull = [points[i] for i in lower_hull(costs, losses)]
    slopes = [Fraction(x - y, b - a) for (a, x), (b, y) in itertools.pairwise(hull)]
    assert all(a > b for a, b in itertools.pairwise(slopes))
    limits = [max(slopes, default=Fraction(0)) + 1, *slopes, Fraction(0)]
    for point, (before, after) in zip(hull, itertools.pairwise(limits), strict=True):
        assert reached(points, (before + after) / 2) == {point}


@PROPERTY
@given(st.lists(POINTS, min_size=1, max_size=4))
def test_segments_of_several_hulls_come_steepest_first_and_in_the_order_of_each(rows):
    pairs = [tuple(zip(*points, strict=True)) for points in rows]
    hulls = [lower_hull(costs, losses) for costs, losses in pairs]
    own = [segments(*pair, hull) for pair, hull in zip(pairs, hulls, strict=True)]
    found = steepest_first(own)
    assert [gain for gain, *_ in found] == sorted((gain for gain, *_ in found), reverse=True)
    for row, (hull, pair) in enumerate(zip(hulls, pairs, strict=True)):
        assert [point for _, other, point in found if other == row] == hull[1:]
        assert [gain for gain, other, _ in found if other == row] == [
            slope(*pair, left, right) for left, right in itertools.pairwise(hull)
        ]


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e150])
def test_losses_of_any_scale_have_the_same_hull(scale):
    losses = [scale * loss for loss in (9.0, 5.0, 4.5, 1.0, 2.0, 1.0, 0.5)]
    assert lower_hull([0, 1, 2, 3, 4, 5, 6], losses) == [0, 1, 3, 6]
