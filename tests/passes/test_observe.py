import weakref

import pytest
import torch
from torch import fx, nn

from balf_fx.calibration.observers import CovarianceObserver
from balf_fx.errors import PassError
from balf_fx.graph.annotation import annotation, sites
from balf_fx.passes import Annotate, InsertObservers


def observed(model: nn.Module) -> fx.GraphModule:
    graph_module = fx.symbolic_trace(model.double())
    for apply in (Annotate(), InsertObservers()):
        graph_module = apply(graph_module).graph_module
    return graph_module


def observers(graph_module: fx.GraphModule) -> list[CovarianceObserver]:
    return [module for module in graph_module.modules() if isinstance(module, CovarianceObserver)]


class Branches(nn.Module):
    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.between = between

    def forward(self, x):
        q = self.q(x)
        if self.between is not None:
            self.between(x)
        return q, self.k(x), self.v(x)


def test_running_the_graph_gathers_and_computes_what_the_model_does(conv_net, images):
    conv_net = conv_net.double()
    graph_module = observed(conv_net)
    for batch in images:
        torch.testing.assert_close(graph_module(batch.double()), conv_net(batch.double()))
    assert all(observer.moments is not None for observer in observers(graph_module))


def test_sites_that_read_one_value_share_an_observer():
    graph_module = observed(Branches())
    assert len(observers(graph_module)) == 1
    graph_module(torch.randn(5, 8, dtype=torch.float64))
    assert observers(graph_module)[0].moments.count == 5


def test_sites_kept_apart_have_observers_of_their_own():
    graph_module = fx.symbolic_trace(Branches().double())
    Annotate()(graph_module)
    InsertObservers(apart={"k"})(graph_module)
    paths = {site.name: annotation(nodes[0]).observer for site, nodes in sites(graph_module).items()}
    assert paths["q"] == paths["v"] != paths["k"]
    x = torch.randn(5, 8, dtype=torch.float64)
    graph_module(x)
    first, second = (graph_module.get_submodule(paths[name]).moments for name in "qk")
    assert first.count == second.count == 5
    assert torch.equal(first.scatter, second.scatter)


def test_a_value_changed_in_place_is_observed_for_each_site():
    graph_module = observed(Branches(nn.ReLU(inplace=True)))
    x = torch.randn(50, 8, dtype=torch.float64)
    graph_module(x.clone())
    means = [observer.moments.mean[0] for observer in observers(graph_module)]
    torch.testing.assert_close(means[0], x.mean(0))
    torch.testing.assert_close(means[1], x.relu().mean(0))


def test_an_output_is_seen_before_it_is_changed_in_place():
    graph_module = observed(nn.Sequential(nn.Linear(16, 8), nn.ReLU(inplace=True)))
    x = torch.randn(50, 16, dtype=torch.float64)
    graph_module(x)
    expected = x @ graph_module.get_submodule("0").weight.T + graph_module.get_submodule("0").bias
    torch.testing.assert_close(observers(graph_module)[0].moments.mean[0], expected.mean(0))


def test_dead_code_elimination_keeps_the_observers(conv_net):
    graph_module = observed(conv_net)
    before = len(graph_module.graph.nodes)
    graph_module.graph.eliminate_dead_code()
    assert len(graph_module.graph.nodes) == before


def test_no_activation_outlives_its_last_user(monkeypatch):
    alive: list[list[bool]] = []
    seen: list[weakref.ref[torch.Tensor]] = []

    def watch(self, value, *_):
        alive.append([reference() is not None for reference in seen])
        seen.append(weakref.ref(value))

    monkeypatch.setattr(CovarianceObserver, "forward", watch)
    graph_module = observed(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 12), nn.Linear(12, 8), nn.Linear(8, 6)))
    with torch.no_grad():
        graph_module(torch.randn(3, 32, dtype=torch.float64))
    assert len(alive) == 4
    assert not any(state for states in alive for state in states[:-1])


def test_observers_need_sites_and_go_in_once(conv_net):
    with pytest.raises(PassError, match="run Annotate first"):
        InsertObservers()(fx.symbolic_trace(conv_net))
    with pytest.raises(PassError, match="has observers already"):
        InsertObservers()(observed(conv_net))
