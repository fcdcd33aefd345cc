"""Operations in place become operations out of place, and compute the same."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import balf_fx
from balf_fx.capture.functional import make_functional
from balf_fx.capture.normal_form import capture
from balf_fx.errors import CaptureError
from balf_fx.graph.annotation import sites
from balf_fx.graph.effects import release_effects
from balf_fx.graph.operators import changes_in_place, is_opaque_call

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers and a function of them."""

    def __init__(self, function) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.relu, self.flatten = nn.ReLU(inplace=True), nn.Flatten()
        self.register_buffer("calls", torch.zeros(8))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def write(value, change):
    """The value, after a change of it or of a view."""
    change(value)
    return value


def two_views(m, x):
    y = m.a(x)
    half, other = y.view(6, 2, 4), y.t()
    half.transpose(1, 2).relu_()
    return y, half, other, y.sum()


def items(m, x):
    y = m.a(x)
    y[1:, 2] = 0.5
    y[:, [0, 3]] = m.b(x)[:, :2]
    y[y > 1] = -1.0
    y[..., -1] += 2
    y.view(-1, 2, 4)[0:4, None, 1, ::2] = x[:4, None, :2]
    return m.b(y)


def out(m, x):
    held = torch.empty(6, 8)
    torch.add(m.a(x), 1, out=held)
    return m.b(held)


def shapes(m, x):
    y = m.a(x)
    flat = y.detach()
    y.unsqueeze_(1)
    y.relu_()
    return y, flat


def pieces(m, x):
    c = m.a(x).chunk(2, 1)
    return torch.cat([c[0].relu_(), c[1]], 1)


def pieces_and_whole(m, x):
    y = m.a(x)
    y.split([3, 5], dim=1)[1].tanh_()
    y.unbind(1)[2].zero_()
    return y


def assigned(m, x):
    y = m.a(x)
    y += m.b(x)
    y *= 2
    z = y
    y -= 1
    y /= 3
    return z.sigmoid_() + y


FUNCTIONS = {
    "a saved value": lambda m, x: m.b(x).relu().add_(m.a(x)),
    "a module": lambda m, x: m.relu(m.b(m.relu(m.a(x).sigmoid()))),
    "a flag": lambda m, x: m.b(F.hardtanh(F.relu(m.a(x), inplace=True), -1, 0.5, True)),
    "a flag by position": lambda m, x: (lambda y: m.b(F.hardtanh(y, -1, 0.5, True)) + y)(m.a(x)),
    "functions": lambda m, x: m.b(F.leaky_relu_(torch.clamp_(m.a(x), min=-1))),
    "augmented assignments": assigned,
    "an item of chunk": pieces,
    "pieces and the whole": pieces_and_whole,
    "views of one tensor": two_views,
    "a view by a module": lambda m, x: write(m.a(x).view(6, 2, 4), lambda y: m.flatten(y).relu_()),
    "a diagonal": lambda m, x: write(m.a(x), lambda y: y.diagonal().mul_(2)),
    "permuted": lambda m, x: write(m.a(x).view(6, 2, 4), lambda y: y.permute(2, 0, 1)[1].exp_()),
    "items": items,
    "a comparison": lambda m, x: m.b(m.a(x).gt_(0)) + m.a(x),
    "a logical operation": lambda m, x: m.b(m.a(x).logical_or_(x[:, :1] > 0)) + m.a(x),
    "out=": out,
    "the shape": shapes,
    "constants": lambda m, x: m.b(write(m.a(x), lambda y: (y[:2].fill_(2.0), y.t()[0].zero_(), y[2:3].copy_(x[0])))),
    "powers": lambda m, x: m.b(m.a(x).pow_(2)) + m.a(x).abs_().pow_(x.sigmoid()),
    "a mask": lambda m, x: m.b(m.a(x).masked_fill_(x > 0, 0.0)),
    "another dtype": lambda m, x: m.a(x).half().mul_(m.b(x)),
    "a new tensor": lambda m, x: m.a(nn.init.constant_(torch.empty_like(x), 0.5).mul_(x)),
}


def same(one, other):
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(a.dtype == b.dtype and torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_operation_changes_a_value_in_place_and_the_graph_computes_the_same(name, method):
    model = Net(FUNCTIONS[name]).eval()
    graph_module = capture(model, X, method=method)
    left = [node for node in graph_module.graph.nodes if changes_in_place(graph_module, node)]
    assert all(node.all_input_nodes[0].target in ("clone", torch.ops.aten.clone.default) for node in left)
    other = X + 1
    for x in (X, other):
        with torch.no_grad():
            assert same(graph_module(x), model(x.clone()))
    with torch.enable_grad():
        leaves = pytree.tree_leaves(graph_module(X))
        sum(leaf.float().sum() for leaf in leaves if leaf.requires_grad).backward()
    assert graph_module.a.weight.grad is not None


@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("name", ["a saved value", "an item of chunk", "items", "out="])
def test_such_models_are_compressed(name, effort):
    model = Net(FUNCTIONS[name]).eval()
    small = balf_fx.compile(model, [X, X + 1], params=1.0, effort=effort, progress=False)
    with torch.no_grad():
        assert same(small(X), model(X))
    small = balf_fx.compile(model, [X, X + 1], params=0.7, effort=effort, progress=False)
    assert balf_fx.report(small).params_kept <= 0.7


INPUTS = {
    "sub_": lambda m, x: m.a(x.sub_(0.5)),
    "relu": lambda m, x: m.b(F.relu(x, inplace=True)) + x,
    "an item": lambda m, x: m.a(write(x, lambda y: y[:, 0].zero_())),
}


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", INPUTS)
def test_batches_are_left_as_they_are_and_the_result_writes_to_its_input_as_the_model_does(name, method):
    model, batches = Net(INPUTS[name]).eval(), [X.clone(), X + 1]
    small = balf_fx.compile(model, batches, params=1.0, capture=method, progress=False)
    prepared = balf_fx.prepare(model, batches[0], capture=method, sensitivity=True)
    balf_fx.calibrate(prepared, batches, progress=False)
    prepared(batches[0])
    balf_fx.convert(prepared, params=0.8, batches=batches, progress=False)
    assert torch.equal(batches[0], X)
    assert torch.equal(batches[1], X + 1)
    mine, theirs = X.clone(), X.clone()
    torch.testing.assert_close(small(mine), model(theirs))
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, X)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x):
        self.calls[0].add_(1)
        return self.a(x) + self.calls.sum()


def test_calibration_leaves_buffers_and_the_result_changes_them_as_the_model_does():
    model = Counting()
    small = balf_fx.compile(model, [X] * 3, params=1.0, progress=False)
    assert model.calls.tolist() == small.calls.tolist() == [0.0, 0.0]
    for again in (small, copy.deepcopy(small)):
        model.calls.zero_()
        for _ in range(2):
            torch.testing.assert_close(again(X), model(X))
        assert again.calls.tolist() == [2.0, 0.0]


def test_the_gradient_at_a_layer_is_that_before_an_activation_in_place():
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace), nn.Linear(16, 4)).eval()
        prepared = balf_fx.prepare(model, X, sensitivity=True)
        balf_fx.calibrate(prepared, [X], progress=False)
        (node,) = next(nodes for site, nodes in sites(prepared).items() if site.name == "0")
        path = node.meta["balf"].sensitivity
        found.append(prepared.get_submodule(path).sample.gradients.scatter)
    torch.testing.assert_close(*found)


def test_a_parameter_that_forward_changes_is_refused():
    model = Net(lambda m, x: m.a(x) + m.b.weight.data.add_(1).sum()).eval()
    with pytest.raises(CaptureError, match="forward changes"):
        capture(model, X)


def changing(x):
    x[0] = 1.0
    return x.sum()


fx.wrap("changing")


def test_a_function_of_the_user_gets_a_copy_to_change():
    def forward(m, x):
        y = m.a(x)
        total = changing(y)
        return y * total

    model = Net(forward).eval()
    graph_module = fx.symbolic_trace(model)
    expected = model(X)
    make_functional(graph_module, [X])
    torch.testing.assert_close(graph_module(X), expected)
    kept = graph_module.graph.find_nodes(op="call_function", target=changing)
    assert [node.args[0].target for node in kept] == ["clone"]


def test_a_graph_without_such_operations_is_not_touched():
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    before = graph_module.code
    make_functional(graph_module, [X])
    release_effects(graph_module)
    assert graph_module.code == before


@dataclass
class Answer:
    logits: torch.Tensor


pytree.register_pytree_node(Answer, lambda answer: ([answer.logits], None), lambda leaves, _: Answer(*leaves))


def test_a_class_that_holds_outputs_writes_to_nothing():
    """The example need not run to find what it writes to."""
    graph_module = fx.symbolic_trace(nn.Linear(8, 8))
    graph = graph_module.graph
    output = graph.output_node()
    with graph.inserting_before(output):
        held = graph.call_function(Answer, (output.args[0],))
    assert not is_opaque_call(held)
    held.target = changing
    assert is_opaque_call(held)


class Averaging(Counting):
    def forward(self, x):
        self.calls = 0.9 * self.calls + x.mean()
        return self.a(x) + self.calls.sum()


def test_a_buffer_that_forward_replaces():
    model = Averaging()
    words = "as buffer 'calls'" if torch.__version__ < (2, 9) else "state that forward changes"
    with pytest.raises(CaptureError, match=words):
        capture(model, X, method="symbolic_trace")
    small = balf_fx.compile(model, [X] * 3, params=1.0, effort="fast", progress=False)
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        expected = copy.deepcopy(model)
        for _ in range(2):
            torch.testing.assert_close(again(X), expected(X))


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        (lambda net, x: net.b(net.relu(net.a(x))), [2]),
        (lambda net, x: net.b(net.a(x).view(6, 8).relu_()), [6]),  # relu_ may be given a view
        (lambda net, x: net.b(net.relu(net.a(x)).view(6, 8)), [2, 6]),  # two samples do not have this shape
        pytest.param(
            lambda net, x: torch.cat(net.relu(net.a(x)).split(3)),
            [6],  # the number of pieces depends on the samples
            marks=pytest.mark.skipif(torch.__version__ < (2, 9), reason="torch 2.8 does not trace it"),
        ),
    ],
    ids=["elementwise", "method", "a fixed shape", "pieces of the batch"],
)
def test_memory_is_watched_on_two_samples_where_their_number_does_not_matter(monkeypatch, function, seen):
    sizes, run = [], fx.Interpreter.run

    def counted(self, *args, **kwargs):
        if type(self).__name__ == "_Watch":
            sizes.append(len(args[0]))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(fx.Interpreter, "run", counted)
    model = Net(function).eval()
    graph_module = capture(model, X, method="symbolic_trace")
    assert sizes == seen
    assert torch.equal(graph_module(X), model(X))
    assert not any(changes_in_place(graph_module, node) for node in graph_module.graph.nodes)
