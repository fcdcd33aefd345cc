"""Work is shared out evenly, and samples are numbered in turn."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from balf_fx.distributed.shares import assigned, others_in_turn, starts_in_turn


def total_of(costs, owners, processes):
    return max(sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == p) for p in range(processes))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 3))
def test_the_largest_load_is_within_a_third_of_the_least_possible(costs, processes):
    owners = assigned(costs, processes)
    best = min(total_of(costs, each, processes) for each in itertools.product(range(processes), repeat=len(costs)))
    assert total_of(costs, owners, processes) <= (4 / 3) * best


def test_large_items_come_first():
    assert assigned([1.0, 1.0, 3.0, 1.0], 2) == [1, 1, 0, 1]
    assert assigned([], 2) == []


def one_by_one(counts):
    return [list(range(len(own))) for own in counts]


def test_processes_take_turns():
    counts = [[4, 4, 2], [8], []]
    assert starts_in_turn(counts, one_by_one(counts)) == [[0, 12, 16], [4], []]
    assert starts_in_turn(counts, [[0, 0, 1], [0], []]) == [[0, 4, 16], [8], []]  # two pieces of one batch


def test_others_have_their_turn_between_the_batches_of_a_process():
    counts = [[4, 4, 2], [8], [3, 5]]
    found = [others_in_turn(counts, one_by_one(counts), rank) for rank in range(3)]
    assert found == [[[], [8, 3], [5]], [[4]], [[4, 8], [4]]]
    assert others_in_turn(counts, [[0, 0, 1], [0], [1, 1]], 0) == [[], [], [8]]


@given(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=4))
def test_every_sample_has_one_number(counts):
    pairs = zip(counts, starts_in_turn(counts, one_by_one(counts)), strict=True)
    numbers = [
        n
        for own, starts in pairs
        for count, start in zip(own, starts, strict=True)
        for n in range(start, start + count)
    ]
    assert sorted(numbers) == list(range(sum(map(sum, counts))))
