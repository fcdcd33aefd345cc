import operator
import types

import pytest
import torch
from torch import fx, nn

from balf_fx.capture.normal_form import capture
from balf_fx.graph.layers import read_layer
from balf_fx.refit.targets import Target, additions_of, limits_of, summands_first

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


def _once(_, compute):
    return compute()


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
    return [addition.node for addition in additions_of(graph_module, nodes["layer"])], nodes["sin"]


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_found_however_it_is_written(name):
    additions, other = found(SUMS[name])
    assert additions == [other]


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_is_a_sum(name):
    additions, _ = found(OTHERS[name])
    assert additions == []


class Residual(nn.Module):
    """A sum before ReLU, whose other summand is computed first, or last."""

    def __init__(self, first):
        super().__init__()
        self.layer, self.shortcut, self.first = nn.Linear(3, 4), nn.Linear(3, 4), first

    def forward(self, value):
        one, other = (self.shortcut, self.layer) if self.first else (self.layer, self.shortcut)
        return torch.relu(one(value) + other(value))


@pytest.mark.parametrize("first", [True, False])
def test_limits_hold_for_the_sum_alone(first):
    graph_module = capture(Residual(first).eval(), torch.randn(5, 3))
    nodes = {str(node.target): node for node in graph_module.graph.nodes}
    layer, shortcut = nodes["layer"], nodes["shortcut"]
    found = Target.of(graph_module, layer, read_layer(graph_module, layer))
    assert found.limits == (0, float("inf"))
    wanted, other, given = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    values = {layer: wanted, **({shortcut: other} if first else {})}  # in a walk, later nodes have no value yet
    batch = types.SimpleNamespace(original=values, before=values.get, current=values.get, once=_once)
    window = types.SimpleNamespace(of=lambda value: value)
    target = found.outputs(batch, window, lambda value: value.reshape(5, 4), given)
    if first:  # errors where both sums are below 0 do not count, and others are those of the sum
        errors = torch.relu(wanted + other) - torch.relu(given + other)
        same = (wanted + other < 0) & (given + other < 0)
        torch.testing.assert_close((target - given)[same], errors[same])
        assert bool(same.any())
        torch.testing.assert_close(torch.relu(target + other), torch.relu(wanted + other))
    else:
        torch.testing.assert_close(target, wanted)


class Shortcut(nn.Module):
    """Sums of a layer's output and a shortcut that is computed later: without a layer, with one, or from the output."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.other, self.kind = nn.Linear(4, 4), nn.Linear(4, 4), kind
        self.dropout = nn.Dropout()

    def forward(self, value):
        y = self.layer(torch.sin(value))
        if self.kind == "plain":
            return y + torch.cos(value[:, :4])
        if self.kind == "of itself":
            return y + torch.zeros(y.size())
        return y + (self.other(value) if self.kind == "layer" else self.dropout(self.other(value)))


@pytest.mark.parametrize(
    ("kind", "moves"),
    [("plain", ["getitem", "cos"]), ("layer", []), ("layer and dropout", []), ("of itself", [])],
    ids=str,
)
def test_shortcuts_are_computed_before_the_layer_to_which_they_are_added(kind, moves):
    graph_module = fx.symbolic_trace(Shortcut(kind).eval())
    nodes = list(graph_module.graph.nodes)
    layers = {node for node in nodes if node.target in ("layer", "other")}
    found = summands_first(graph_module, nodes, layers)
    assert sorted(found) == sorted(nodes)
    assert (found == nodes) == (not moves)
    names = [node.name for node in found]
    assert names[names.index("layer") - len(moves) : names.index("layer")] == moves
    assert all(found.index(source) < found.index(node) for node in found for source in node.all_input_nodes)


class Parallel(nn.Module):
    """Two branches beside a stream, in the order in which a user writes them."""

    def __init__(self, stream_first):
        super().__init__()
        self.stem, self.one, self.other = (nn.Linear(6, 6) for _ in range(3))
        self.stream_first = stream_first

    def forward(self, value):
        x = torch.tanh(self.stem(value))
        one, other = self.one(torch.sin(x)), self.other(torch.cos(x))
        return torch.relu((x + one) + other if self.stream_first else (one + other) + x)


@pytest.mark.parametrize("stream_first", [True, False])
def test_all_values_of_a_sum_are_found_in_any_order(stream_first):
    graph_module = fx.symbolic_trace(Parallel(stream_first))
    nodes = {node.name: node for node in graph_module.graph.nodes}
    for name, rest in (("one", "other"), ("other", "one")):
        found = [addition.node.name for addition in additions_of(graph_module, nodes[name])]
        if stream_first and name == "other":
            assert found == ["add"]  # of the stream and the first branch
        else:
            assert sorted(found) == sorted(["tanh", rest])
        assert limits_of(graph_module, nodes[name]) == (0, float("inf"))


def test_what_is_known_of_a_sum_is_corrected():
    graph_module = capture(Parallel(stream_first=False).eval(), torch.randn(5, 6))
    nodes = {str(node.target): node for node in graph_module.graph.nodes}
    (stream,) = (node for node in graph_module.graph.nodes if "tanh" in str(node.target))
    layer = nodes["one"]
    found = Target.of(graph_module, layer, read_layer(graph_module, layer))
    wanted, before, now, given = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    originals = {layer: wanted, stream: before}
    batch = types.SimpleNamespace(original=originals, before=originals.get, current={stream: now}.get, once=_once)
    window = types.SimpleNamespace(of=lambda value: value)
    target = found.outputs(batch, window, lambda value: value.reshape(5, 6), given)
    torch.testing.assert_close(target, wanted + before - now)  # without limits, since the other branch is not known


class Laid(nn.Module):
    """A layer whose output is added to a value in another layout."""

    def __init__(self, way):
        super().__init__()
        self.layer, self.way = nn.Linear(4, 4), way

    def forward(self, value, order):
        return self.way(self.layer(value), torch.sin(value), order)


LAYOUTS = {
    "as it is": (lambda y, other, order: y + other, True),
    "transposed": (lambda y, other, order: (y.mT + other.mT).mT, True),
    "of a size": (lambda y, other, order: y.view(y.size(0), -1) + other.flatten(1), True),
    "broadcast": (lambda y, other, order: y + other.mean(1, keepdim=True), True),
    "repeated": (lambda y, other, order: y.mean(1, keepdim=True) + other, False),
    "larger": (lambda y, other, order: y[:, :1] + other, False),
    "selected": (lambda y, other, order: y[:, order] + other, False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_error_is_known_in_the_layout_of_the_output(name):
    way, known = LAYOUTS[name]
    value, order = torch.randn(2, 3, 4), torch.tensor([2, 0, 1])
    graph_module = capture(Laid(way).eval(), (value, order))
    originals, (layer,) = {}, graph_module.graph.find_nodes(op="call_module", target="layer")

    class Kept(fx.Interpreter):
        def run_node(self, node):
            originals[node] = super().run_node(node)
            return originals[node]

    Kept(graph_module).run(value, order)
    found = Target.of(graph_module, layer, read_layer(graph_module, layer))
    batch = types.SimpleNamespace(original=originals, before=originals.get, current=originals.get, once=_once)
    pairs = list(found._others(batch))
    assert bool(pairs) == known
    for before, now in pairs:
        assert torch.equal(before, now)
        assert before.shape == value.shape
        wanted = torch.sin(value)
        assert torch.equal(before, wanted.mean(1, keepdim=True).expand_as(value) if name == "broadcast" else wanted)
