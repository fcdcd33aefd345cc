"""The times of stages add up to that of a compression."""

import pytest
import torch
from torch import nn

import balf_fx
from balf_fx import api


@pytest.fixture
def stages(load_benchmark):
    return load_benchmark("stages")


class Clock:
    """A second passes each time that it is read."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


def test_the_time_since_the_last_event_is_that_of_the_stage_which_ends(stages, monkeypatch):
    machine, clock = Clock(), stages.StageClock()
    monkeypatch.setattr(stages, "time", machine)
    with clock.bar(True, "capturing") as bar:
        machine.now += 10
        first, second = bar.spans([1, 2], ["calibrating", "scoring"])
        for _ in first.track(range(3)):
            machine.now += 100
        half, other = second.spans([1, 1])
        machine.now += 1000
        half.done()
        other.done()
        machine.now += 5000
    rounded = {name: 10 * int(seconds // 10) for name, seconds in clock.seconds[0].items()}
    assert rounded == {"capturing": 10, "calibrating": 300, "scoring": 1000, "rewriting": 5000}
    assert sum(clock.seconds[0].values()) == machine.now - 1
    assert list(clock.peaks) == list(clock.seconds[0])


def test_each_compression_is_timed_by_stage(stages):
    model, batches = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), list(torch.randn(2, 8, 8))
    shown, clock = api.progress_bar, stages.StageClock()
    timed = clock.around(lambda: balf_fx.compile(model, batches, flops=0.7))
    for _ in range(2):
        timed()
    assert api.progress_bar is shown
    for seconds in clock.seconds:
        wanted = {"capturing", "calibrating", "scoring", "trying allocations", "solving layers", "rewriting"}
        assert wanted <= set(seconds) <= wanted | {"compressing"}
    assert 0 < stages.resident_gib() <= stages.peak_gib() < 100
