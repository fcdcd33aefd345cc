import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balf_fx.latency import table as module
from balf_fx.latency.granules import granule, probes
from balf_fx.latency.operations import Operation, Run
from balf_fx.latency.table import Table

LINEAR = Operation("linear", (10,), torch.float32, torch.device("cpu"))


def padded(step, overhead=0.0):
    """Nanoseconds of a kernel that pads its sizes to a multiple."""
    return lambda inputs, outputs: overhead + inputs * math.ceil(outputs / step) * step


@given(st.sampled_from([1, 8, 16, 32]), st.integers(64, 1000), st.floats(0, 100))
def test_a_kernel_that_pads_has_the_granule_to_which_it_pads(step, size, overhead):
    run, law = Run(LINEAR, 16, size), padded(step, overhead)
    times = {(probe.inputs, probe.outputs): law(probe.inputs, probe.outputs) for probe in probes(run, 1)}
    assert granule(run, 1, times) == step


@given(st.integers(1, 15))
def test_nothing_is_known_of_sizes_below_all_granules(size):
    run = Run(LINEAR, 16, size)
    times = {(probe.inputs, probe.outputs): 1.0 * probe.outputs for probe in probes(run, 1)}
    assert granule(run, 1, times) == 1


def test_sizes_that_are_less_regular_than_the_limit_do_not_count():
    run = Run(LINEAR, 16, 128)
    times = {(16, probe.outputs): probe.outputs * (1.02 if probe.outputs % 8 else 1.0) for probe in probes(run, 1)}
    assert granule(run, 1, times) == 1


def test_moves_and_groups_have_none():
    for operation in (replace(LINEAR, kind="cat"), replace(LINEAR, groups=4), LINEAR):
        assert bool(list(probes(Run(operation, 64, 64), 0))) == (operation is LINEAR)


def test_times_count_for_the_next_multiple(monkeypatch):
    law = padded(16)
    monkeypatch.setattr(module, "_seconds", lambda run: 1e-9 * law(run.inputs, run.outputs))
    table = Table()
    table.measure([Run(LINEAR, 64, 128)])
    assert table.granules == {LINEAR.family: (1, 16)}
    times = {size: table.nanoseconds(Run(LINEAR, 64, size)) for size in (65, 72, 80, 81)}
    assert times[65] == pytest.approx(times[72]) == pytest.approx(times[80])
    assert times[81] > 1.1 * times[80]
