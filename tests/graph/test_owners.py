"""Which modules may be replaced in the user's model."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from balf_fx.capture.normal_form import capture
from balf_fx.graph.layers import read_layer
from balf_fx.graph.owners import owner_of, parameters_named_once, stock_modules
from balf_fx.graph.site import Site


class Mine(nn.Linear):
    pass


def test_stock_modules():
    model = nn.Sequential(
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        Mine(8, 8),
        weight_norm(nn.Linear(8, 8)),
        nn.ModuleDict({"same": nn.Embedding(4, 8), "hooked": nn.Linear(8, 8)}),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 3, 3),
    )
    model[4]["hooked"].register_forward_hook(lambda module, args, output: None)
    model[4]["again"] = model[0]
    found = stock_modules(model)
    assert found == {"0": "layer", "1": "norm", "4.same": "table", "4.again": "layer", "6": "layer"}


def test_parameters_with_several_names_are_not_replaced():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.PReLU())
    model[1].weight = model[0].weight
    model.append(model[2])
    assert parameters_named_once(model) == {"0.bias"}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.block(self.block(x)) @ self.weight


def test_owners_are_the_innermost_modules():
    for method in ("symbolic_trace", "export"):
        graph_module = capture(Nested().eval(), torch.randn(4, 8), method=method)
        layers = [node for node in graph_module.graph.nodes if isinstance(read_layer(graph_module, node), Site)]
        assert [owner_of(node) for node in layers] == ["block.0", "block.0", None]
