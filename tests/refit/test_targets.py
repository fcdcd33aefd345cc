import operator

import pytest
import torch
from torch import fx, nn

from balf_fx.refit.targets import addition_of

SUMS = {
    "operator": lambda layer, other: layer + other,
    "the other first": lambda layer, other: other + layer,
    "function": torch.add,
    "method": lambda layer, other: layer.add(other),
    "in place": operator.iadd,
    "difference from a negative": lambda layer, other: torch.sub(layer, other, alpha=-1),
}
OTHERS = {
    "difference": torch.sub,
    "scaled sum": lambda layer, other: torch.add(layer, other, alpha=2),
    "scaled difference": lambda layer, other: torch.sub(layer, other, alpha=2),
    "number": lambda layer, other: layer + 1 + 0 * other,
    "itself": lambda layer, other: layer + layer + other,
    "product": torch.mul,
}


class Joined(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.layer, self.join = nn.Linear(3, 3), join

    def forward(self, value):
        other = torch.sin(value)
        return self.join(self.layer(value), other)


def found(join):
    graph_module = fx.symbolic_trace(Joined(join))
    nodes = {node.name: node for node in graph_module.graph.nodes}
    return addition_of(graph_module, nodes["layer"]), nodes["sin"]


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_found_however_it_is_written(name):
    addition, other = found(SUMS[name])
    assert addition is other


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_is_a_sum(name):
    addition, _ = found(OTHERS[name])
    assert addition is None
