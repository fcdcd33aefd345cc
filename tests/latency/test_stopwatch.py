"""With a clock that tasks turn themselves: what is timed is known."""

import pytest
import torch

from balf_fx.latency import stopwatch

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have passed, and a function that makes a task which takes some more of them."""
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])

    def task(*durations):
        left = list(durations)

        def run():
            now[0] += left.pop(0) if len(left) > 1 else left[0]

        return run

    return task


def test_the_mean_of_several_calls(clock):
    assert stopwatch.seconds(clock(1.0, 2.0, 6.0), CPU, repeats=3) == pytest.approx(3.0)


def test_the_least_of_several_calls_does_not_count_the_first(clock):
    assert stopwatch.least_seconds(clock(0.001, 9.0, 3.0, 5.0), CPU) == pytest.approx(3.0)


def test_a_race_is_won_by_rounds(clock):
    slow = clock(*[1.0] * 2, 4.0, 2.0, 10.0)  # two rounds of warm-up, then the load of the machine changes
    fast = clock(*[1.0] * 2, 2.0, 1.0, 5.0)
    found = stopwatch.race(fast, slow, CPU, rounds=3)
    assert found.ratio == pytest.approx(2.0)
    assert (found.first, found.second) == (2.0, 4.0)


def test_short_tasks_are_repeated(clock):
    calls = []
    task = clock(1e-5)
    stopwatch.race(lambda: (calls.append(1), task()), lambda: task(), CPU, rounds=2, warmup=1)
    assert len(calls) == 1 + 2 * 20
