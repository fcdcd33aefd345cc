"""Parameters that scale a value: multiplied, they multiply it, and nothing else."""

import dataclasses

import pytest
import torch
from small_models import ConvNet, randomise_batchnorm
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from balf_fx.calibration.batches import forward_for
from balf_fx.capture.normal_form import capture
from balf_fx.graph.parameters import get_tensor, put
from balf_fx.graph.scaling import returned_values, scaling_parameters, table_sizes

WIDTH, WORDS = 12, 20


class Model(nn.Module):
    """What `end` makes of the output of a layer."""

    def __init__(self, end, **layers):
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS)
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.norm.bias)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.end = end

    def forward(self, x):
        return self.end(self, torch.relu(self.first(x)))


class RmsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Tied(nn.Module):
    def __init__(self, norm, bias=False):
        super().__init__()
        self.table, self.norm = nn.Embedding(WORDS, WIDTH), norm
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.norm(self.layer(self.table(ids))))


FIRST, HEAD = ({f"{name}.{kind}" for kind in ("weight", "bias")} for name in ("first", "head"))
FOUND = {
    "layer": (lambda m, x: m.head(x), HEAD),
    "views": (lambda m, x: m.head(x).float().reshape(-1, 4, 5).transpose(1, 2).flatten(1), HEAD),
    "rectified and pooled": (lambda m, x: F.relu(m.head(x)).unflatten(-1, (4, 5)).mean(-1), HEAD),
    "a number": (lambda m, x: m.head(x) * 3.0 / 2.0, HEAD),
    "one of several outputs": (lambda m, x: (m.head(x), x), HEAD),
    "a mean of two": (lambda m, x: (m.head(x) + m.other(x)) / 2, {*HEAD, "other.weight", "other.bias"}),
    "side by side": (lambda m, x: torch.cat([m.head(x), m.other(x)], -1), {*HEAD, "other.weight", "other.bias"}),
    "rows and combinations": (lambda m, x: (lambda y: torch.cat([y, m.back(y)], -1))(m.head(x)), {*HEAD, "back.bias"}),
    "a bias apart": (lambda m, x: torch.sub(F.linear(x, m.weight), m.bias, alpha=-1), {"weight", "bias"}),
    "a factor": (lambda m, x: m.gamma * x, {"gamma"}),
    "a sum with its input": (lambda m, x: x + m.same(x), {*FIRST, "same.bias"}),
    "a weight that is read elsewhere": (lambda m, x: (m.head(x), m.head.weight.sum()), {*FIRST, "head.bias"}),
    "returned twice": (lambda m, x: (lambda y: (y, y))(m.head(x)), HEAD),
    "a norm": (lambda m, x: m.norm(x), {"norm.weight", "norm.bias"}),
    "a function": (lambda m, x: F.layer_norm(x, (WIDTH,), m.norm.weight, m.norm.bias), {"norm.weight", "norm.bias"}),
}
NOTHING = {
    "tanh": lambda m, x: 30 * torch.tanh(m.head(x) / 30),
    "a number is added": lambda m, x: m.head(x) + 1,
    "a number is divided": lambda m, x: 1 / m.head(x),
    "a product of values": lambda m, x: m.head(x) * m.other(x),
    "its value is read": lambda m, x: (lambda y: (y, y.exp()))(m.head(x)),
    "its first value is read": lambda m, x: (lambda y: (y.flatten(), y))(m.head(x)),
    "its input before the layer": lambda m, x: (lambda y: torch.cat([y, m.head(x)], -1))(2 * F.relu(x)),
    "its input before the norm": lambda m, x: (lambda y: torch.cat([y, m.norm(x)], -1))(F.relu(x)),
    "its input before a factor": lambda m, x: (lambda y: torch.cat([y, m.gamma * x], -1))(F.relu(x)),
    "called twice": lambda m, x: m.same(m.same(x)),
    "no parameters": lambda m, x: F.layer_norm(x, (WIDTH,)),
    "a bias for all": lambda m, x: torch.cat([m.head(x), m.fixed.expand(len(x), -1)], -1),
}


def captured(model, batch, method="auto"):
    torch.manual_seed(0)
    return capture(model.eval(), batch, forward_for(model), method)


def logits(graph_module):
    (output,) = graph_module.graph.find_nodes(op="output")
    value = output.args[0]
    return value[0] if isinstance(value, tuple | list) else value


def first(output):
    return output[0] if isinstance(output, tuple | list) else output


def model_of(end):
    layers = {"other": nn.Linear(WIDTH, WORDS), "same": nn.Linear(WIDTH, WIDTH), "back": nn.Linear(WORDS, 3)}
    model = Model(end, **layers)
    model.weight, model.bias = (nn.Parameter(torch.randn(size)) for size in ((WORDS, WIDTH), (WORDS,)))
    model.gamma = nn.Parameter(torch.rand(WIDTH))
    model.register_buffer("fixed", torch.randn(3))
    return model


def check(graph_module, batch, paths):
    """Multiply the parameters, and compare all outputs."""
    before = graph_module(batch)
    for path in paths:
        put(graph_module, path, nn.Parameter(get_tensor(graph_module, path).detach() * 0.7))
    after = graph_module(batch)
    torch.testing.assert_close(first(after), 0.7 * first(before))
    if isinstance(after, tuple) and after[1] is not after[0]:
        torch.testing.assert_close(after[1:], before[1:])


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", FOUND)
def test_a_value_is_multiplied(name, method):
    end, expected = FOUND[name]
    batch = torch.randn(6, WIDTH)
    graph_module = captured(model_of(end), batch, method)
    paths = scaling_parameters(graph_module, logits(graph_module), lambda _: True)
    assert set(paths) == expected
    check(graph_module, batch, paths)


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_found_where_more_would_change(name):
    graph_module = captured(model_of(NOTHING[name]), torch.randn(6, WIDTH))
    assert scaling_parameters(graph_module, logits(graph_module), lambda _: True) == ()


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, lambda _: RmsNorm()], ids=["layer", "rms", "written out"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_head_is_left_alone(norm, bias, method):
    model, ids = Tied(norm(WIDTH), bias), torch.randint(WORDS, (3, 7))
    graph_module = captured(model, ids, method)
    paths = scaling_parameters(graph_module, logits(graph_module), lambda _: True)
    names = {name for name, _ in model.named_parameters() if name.startswith("norm")}
    assert set(paths) == names | ({"head.bias"} if bias else set())
    check(graph_module, ids, paths)


def test_only_what_may_change_does():
    graph_module = captured(model_of(FOUND["layer"][0]), torch.randn(6, WIDTH))
    assert scaling_parameters(graph_module, logits(graph_module), lambda path: path != "head.bias") == ()
    tied = captured(Tied(nn.LayerNorm(WIDTH)), torch.randint(WORDS, (3, 7)))
    assert scaling_parameters(tied, logits(tied), lambda path: path != "norm.bias") == ()


def test_a_convolution_and_what_pools_it():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batch = torch.randn(2, 3, 9, 9)
    graph_module = captured(net, batch)
    paths = scaling_parameters(graph_module, logits(graph_module), lambda _: True)
    assert set(paths) == {"0.weight", "0.bias"}
    check(graph_module, batch, paths)
    net = randomise_batchnorm(ConvNet())
    graph_module = captured(net, torch.randn(2, 3, 12, 12))
    assert set(scaling_parameters(graph_module, logits(graph_module), lambda _: True)) == HEAD


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    state: torch.Tensor


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
def test_outputs_in_containers(method):
    if Answer not in pytree.SUPPORTED_NODES:
        pytree.register_dataclass(Answer)
    net = model_of(lambda m, x: {"first": x + 1, "answer": Answer(m.head(x), m.same(x))})
    batch = torch.randn(6, WIDTH)
    graph_module = captured(net, batch, method)
    values = returned_values(graph_module)
    assert len(values) == 3
    before = graph_module(batch)
    paths = scaling_parameters(graph_module, values[1], lambda _: True)
    assert set(paths) == HEAD
    for path in paths:
        put(graph_module, path, nn.Parameter(get_tensor(graph_module, path).detach() * 0.7))
    after = graph_module(batch)
    torch.testing.assert_close(after["answer"].logits, 0.7 * before["answer"].logits)
    assert torch.equal(after["answer"].state, before["answer"].state)
    assert torch.equal(after["first"], before["first"])


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
def test_sizes_of_tables(method):
    model = Tied(nn.LayerNorm(WIDTH))
    assert table_sizes(captured(model, torch.randint(WORDS, (3, 7)), method)) == [WORDS]
    assert table_sizes(captured(ConvNet(), torch.randn(2, 3, 12, 12), method)) == []
