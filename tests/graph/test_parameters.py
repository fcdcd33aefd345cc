"""What a graph computes from its own tensors alone."""

import torch
from torch import fx, nn

from balf_fx.graph.parameters import constant_nodes, is_constant


class Computed(nn.Module):
    """Constants that are computed in several steps, values of inputs, and a random number."""

    def __init__(self):
        super().__init__()
        self.layer, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        doubled = self.weight + self.weight
        square = doubled.t() @ doubled
        noise = torch.rand_like(square) + square
        mixed = square + x
        return self.layer(mixed) @ square + noise + mixed.sum()


def test_one_node_is_constant_as_in_the_list_of_all():
    graph = fx.symbolic_trace(Computed())
    found = {node for node in graph.graph.nodes if is_constant(node)}
    assert found == constant_nodes(graph)
    assert [node.name for node in graph.graph.nodes if node in found] == ["weight", "add", "t", "matmul"]
