"""Times of nodes, with a clock that counts calls."""

import pytest
import torch
from torch import fx, nn

from balf_fx.latency import profile as module
from balf_fx.latency.profile import node_seconds

CPU = torch.device("cpu")


class Layered(nn.Module):
    """Features that are stored last could not be viewed as rows."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.watched = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.Identity()

    def forward(self, x):
        self.watched(x)
        hidden = self.pool(torch.relu(self.conv(x)))
        return torch.nn.functional.avg_pool2d(hidden, 2).view(2, 8, 2, 2).view(2, -1) + 1


@pytest.fixture
def clock(monkeypatch):
    """Each call takes a second more than the one before."""
    calls = []

    def seconds(task, device):
        calls.append(task())
        return float(len(calls))

    monkeypatch.setattr(module, "seconds", seconds)
    return calls


def test_each_node_has_its_median_and_what_is_skipped_does_not_run(clock):
    graph_module = fx.symbolic_trace(Layered().eval())
    graph_module.watched.forward = None
    times, whole = node_seconds(graph_module, [torch.randn(2, 3, 8, 8)], CPU, "watched")
    names = [node.name for node in graph_module.graph.nodes if node.name != "watched"]
    assert list(times) == names
    assert whole is None
    middle = len(names) * (module._ROUNDS // 2 + 1)  # the first of all rounds does not count
    assert [times[name] for name in names] == [middle + place + 1 for place in range(len(names))]


def test_the_compiled_graph_runs_in_turn(clock):
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)).eval())
    runs = []
    _, whole = node_seconds(graph_module, [torch.randn(2, 4)], CPU, "watched", lambda: runs.append(len(clock)))
    each = len(graph_module.graph.nodes) + 1
    assert runs == [each * done - 1 for done in range(1, module._ROUNDS + 2)]
    assert whole == each * (module._ROUNDS // 2 + 2)


@pytest.mark.parametrize("compiled", [None, lambda: None])
def test_images_are_stored_as_inductor_stores_them(compiled):
    graph_module, value = fx.symbolic_trace(Layered().eval()), torch.randn(2, 3, 8, 8)
    last = []

    def see(_, inputs):
        last.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    graph_module.conv.register_forward_pre_hook(see)
    graph_module.pool.register_forward_pre_hook(see)
    node_seconds(graph_module, [value], CPU, "watched", compiled)
    assert set(last) == {compiled is not None}
    assert value.is_contiguous()
