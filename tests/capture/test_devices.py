import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.capture.devices import follow_inputs
from balf_fx.capture.normal_form import capture


class Positions(nn.Module):
    """New tensors in the graph and in a graph inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 8)

    def forward(self, batch, scale=1.0):
        x = batch["x"]
        places = torch.arange(5, device=x.device)
        with torch.no_grad():
            ramp = torch.linspace(0, 1, 8, device=x.device) + x[:, :, :1]
        return self.head(x * ramp + self.table[places]) * scale


X = torch.randn(4, 5, 8)


def to(device, tensor=X):
    return {"x": tensor.to(device)}


def test_an_exported_graph_works_on_another_device():
    model = Positions()
    small = balf_fx.compile(model, [(to("cpu"),)], params=1.0, effort="fast", capture="export", progress=False)
    torch.testing.assert_close(small(to("cpu", X[:2])), model(to("cpu", X[:2])))
    moved = small.to("meta")
    assert moved(to("meta")).device.type == "meta"


def test_export_names_the_device_where_nothing_is_done():
    """The oracle of the test above: it would fail without what it tests."""
    exported = capture(Positions(), (to("cpu"),), method="export").to("meta")
    with (
        pytest.raises((RuntimeError, NotImplementedError)),
        torch.enable_grad(),
    ):  # torch leaves gradients off where such a graph fails
        exported(to("meta"))


def test_other_devices_than_that_of_the_input_stay():
    class Named(nn.Module):
        def forward(self, x):
            return torch.ones(4, device=x.device) + x.sum(), torch.ones(4, device="meta")

    exported = torch.export.export(Named(), (X,)).module()
    follow_inputs(exported)
    assert [tensor.device.type for tensor in exported(X)] == ["cpu", "meta"]
    assert exported.code.count("device(type='meta')") == 1
    assert "device(type='cpu')" not in exported.code


def test_graphs_without_constants_or_values_stay_as_they_are():
    for graph_module in (torch.fx.symbolic_trace(nn.Linear(8, 8)), capture(nn.Linear(8, 8), X, method="export")):
        before = graph_module.code
        follow_inputs(graph_module)
        assert graph_module.code == before
