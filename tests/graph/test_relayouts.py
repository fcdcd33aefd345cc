import math

import pytest
import torch
from torch import fx, nn

from balf_fx.graph.relayouts import broadcasts, is_relayout, laid_back, relaid

BACK = {
    "view": lambda x: x.view(2, 3, 4, 30),
    "view of a size": lambda x: x.view(x.size(0), 12, -1),
    "reshape": lambda x: torch.reshape(x, (6, -1)),
    "flatten": lambda x: torch.flatten(x, start_dim=1),
    "module": nn.Flatten(2),
    "unsqueeze": lambda x: x[:, None].unsqueeze(-1),
    "permute": lambda x: x.permute(0, 3, 1, 2),
    "transpose and view": lambda x: x.transpose(1, 3).reshape(2, -1, 12),
    "windows": lambda x: x.view(2, 3, 2, 2, 5, 6).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 2, 5, 6),
    "roll": lambda x: torch.roll(x, shifts=(-1, 2), dims=(1, 2)),
    "roll of all entries": lambda x: x.roll(3),
    "features last in memory": lambda x: x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last),
    "slice": lambda x: x[:, 1:3, ..., :4],
}
NOT = {
    "a part of a list": lambda x: x.chunk(2, 1)[0],
    "sum": lambda x: x.sum(1),
    "another type": lambda x: x.view(torch.int32),
    "repeated": lambda x: x.expand(2, 3, 4, 30),
}


def relayouts(function):
    model = function if isinstance(function, nn.Module) else nn.Module()
    graph = fx.Tracer().trace(function) if not isinstance(function, nn.Module) else None
    graph_module = fx.symbolic_trace(model) if graph is None else fx.GraphModule(model, graph)
    nodes = list(graph_module.graph.nodes)
    sizes = {node: 2 for node in nodes if node.target == "size"}
    return graph_module, [node for node in nodes if node.op.startswith("call") and node not in sizes], sizes


@pytest.mark.parametrize("name", BACK)
def test_a_value_that_is_laid_back_has_every_entry_in_its_place(name):
    graph_module, nodes, sizes = relayouts(BACK[name])
    assert all(is_relayout(graph_module, node) for node in nodes)
    value = torch.arange(1, 1 + 2 * 3 * 4 * 30, dtype=torch.float64).view(2, 3, 4, 30)
    value = value if name != "unsqueeze" else value.mT  # in another order in memory
    values = [value]
    for node in nodes:
        values.append(relaid(graph_module, node, values[-1], sizes.__getitem__))
    assert torch.equal(values[-1], graph_module(value))
    found = values[-1]
    for node, earlier in zip(reversed(nodes), reversed(values[:-1]), strict=True):
        found = laid_back(graph_module, node, found, earlier.shape, sizes.__getitem__)
    read = torch.isin(value, values[-1])
    assert read.all() or name == "slice"
    assert torch.equal(found, torch.where(read, value, 0))


@pytest.mark.parametrize("name", NOT)
def test_nothing_else_is_a_relayout(name):
    graph_module, (node, *_), _ = relayouts(NOT[name])
    assert not is_relayout(graph_module, node)


def test_entries_that_a_tensor_selects_have_no_place():
    graph = fx.Graph()
    value, index = graph.placeholder("value"), graph.placeholder("index")
    node = graph.call_function(torch.ops.aten.slice.Tensor, (value, 0, 1, 3))
    picked = graph.call_method("__getitem__", (value, index))
    graph.output((node, picked))
    graph_module = fx.GraphModule(nn.Module(), graph)
    x, places = torch.arange(4.0), torch.tensor([0, 2])
    assert torch.equal(laid_back(graph_module, node, x[1:3], x.shape, {}.__getitem__), torch.tensor([0.0, 1, 2, 0]))
    assert laid_back(graph_module, picked, x[places], x.shape, {index: places}.__getitem__) is None


@pytest.mark.parametrize("shape", [(3,), (4, 1), (1, 3), (2, 4, 3), (2, 1, 1), (), (1, 2, 4, 3), (4,), (5, 3)])
def test_broadcasting_is_that_of_expand(shape):
    to = torch.Size((2, 4, 3))
    try:
        expands = torch.empty(math.prod(shape)).view(shape).expand(to) is not None
    except RuntimeError:
        expands = False
    assert broadcasts(torch.Size(shape), to) == expands
