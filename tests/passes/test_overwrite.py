import operator

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

import balf_fx
from balf_fx.graph.operators import changes_in_place
from balf_fx.passes import Overwrite


class Net(nn.Module):
    """A layer, an operation on what it returns, and another layer."""

    def __init__(self, forward, **modules) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.relu = nn.ReLU(inplace=True)
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


class Residual(nn.Module):
    """A residual block whose activation is called twice, as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.b(self.relu(self.norm(self.a(x))))
        out += x
        return self.relu(out)


def overwriting(graph_module):
    """The names of the nodes that change their argument."""
    return [node.name for node in graph_module.graph.nodes if changes_in_place(graph_module, node)]


def compiled(model, x, **options):
    return balf_fx.compile(model.eval(), [x], effort="fast", progress=False, **({"flops": 0.99} | options))


SAFE = {
    "a module": lambda m, x: m.b(m.relu(m.a(x))),
    "a flag": lambda m, x: m.b(F.relu(m.a(x), inplace=True)),
    "a flag by position": lambda m, x: m.b(F.hardtanh(m.a(x), -1.0, 0.5, True)),
    "a function": lambda m, x: m.b(torch.relu_(m.a(x))),
    "a method": lambda m, x: m.b(m.a(x).relu_()),
    "with a number": lambda m, x: m.b(m.a(x).clamp_(-0.5, 0.5)),
    "a sum": lambda m, x: m.b(operator.iadd(m.a(x), x)),
    "after a sum": lambda m, x: m.b(m.relu(m.a(x) + x)),
    "after a sum in place": lambda m, x: m.b(m.relu(operator.iadd(m.a(x), x))),
    "after a concatenation": lambda m, x: m.b(m.relu(torch.cat([m.a(x)[:, :4], x[:, 4:]], 1))),
    "a view of all elements": lambda m, x: m.b(m.relu(m.a(x).reshape(-1, 2, 4)).flatten(1)),
}
READ_ELSEWHERE = {
    "what made the argument is not known": lambda m, x: m.b(m.relu(x * 1.0)),
    "an input": lambda m, x: m.b(m.relu(x)),
    "an input, by a flag": lambda m, x: m.b(F.hardtanh(x, -1.0, 0.5, True)),
    "autograd needs the argument": lambda m, x: m.b(m.relu(torch.tanh(m.a(x)))),
    "a view of some elements": lambda m, x: m.b(m.relu(m.a(x)[:, :4]).repeat(1, 2)),
    "the argument is read before": lambda m, x: (lambda y: m.b(y) + m.relu(y))(m.a(x)),
    "a value of a wider type": lambda m, x: m.b(operator.iadd(m.a(x), x.double())),
}


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", SAFE)
def test_operations_are_in_place_as_in_the_model(name, capture, monkeypatch):
    torch.manual_seed(0)
    model, x = Net(SAFE[name]), torch.randn(64, 8)
    small = compiled(model, x, capture=capture)
    assert overwriting(small)
    before = x.clone()
    with monkeypatch.context() as patched:
        patched.setattr(Overwrite, "call", lambda _, graph_module: PassResult(graph_module, False))
        functional = compiled(model, x, capture=capture)
    assert not overwriting(functional)
    assert torch.equal(small(x), functional(x))
    assert torch.equal(x, before)
    torch.testing.assert_close(compiled(model, x, flops=1.0)(x), model(x.clone()))
    small(x).sum().backward()  # autograd does not miss a value


@pytest.mark.parametrize("name", READ_ELSEWHERE)
def test_a_value_that_something_else_reads_is_left_alone(name):
    torch.manual_seed(0)
    model, x = Net(READ_ELSEWHERE[name]), torch.randn(64, 8)
    small = compiled(model, x, flops=1.0)
    assert set(overwriting(small)) <= {"copy__default"}  # what the model writes to its input
    small(x).sum().backward()
    torch.testing.assert_close(small(x), model(x.clone()))


def test_a_module_is_in_place_only_if_all_of_its_calls_may_be():
    torch.manual_seed(0)
    model, x = Net(lambda m, x: m.b(m.relu(m.a(x))) + m.relu(x * 1.0)), torch.randn(64, 8)
    assert not overwriting(compiled(model, x, pivot=False))


def test_a_module_with_two_names_is_in_place_under_one():
    torch.manual_seed(0)
    relu = nn.ReLU(inplace=True)
    model = Net(lambda m, x: m.b(m.one(m.a(x))) + m.other(x * 1.0), one=relu, other=relu)
    x = torch.randn(64, 8)
    small = compiled(model, x, flops=1.0)
    torch.testing.assert_close(small(x), model(x.clone()))
    assert sum(module.inplace for module in small.modules() if isinstance(module, nn.ReLU)) <= 1
    assert relu.inplace


def test_residual_blocks_write_as_much_in_place_as_the_model_does(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(Residual(), Residual()).eval(), torch.randn(4, 4, 8, 8)
    small = compiled(model, x, flops=0.7)
    assert len(overwriting(small)) == 6
    balf_fx.save(small, tmp_path / "small")
    loaded = balf_fx.load(tmp_path / "small", model)
    assert overwriting(loaded) == overwriting(small)
    assert torch.equal(loaded(x), small(x))


@pytest.mark.parametrize("product", [F.linear, lambda x, weight: torch.matmul(x, weight.mT)])
@pytest.mark.parametrize("convolves", [True, False])
def test_products_of_matrices_that_convolutions_read_are_not_overwritten(product, convolves):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.weight = nn.Linear(4, 8), nn.Parameter(torch.randn(6, 8))
            self.conv = nn.Conv2d(6, 5, 3)

        def forward(self, x):
            x = product(self.first(x), self.weight).permute(0, 3, 1, 2).relu_()
            return self.conv(x) if convolves else x.sum()

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(4, 9, 9, 4)
    small = compiled(model, x, include=["first"])
    assert ("relu_" in overwriting(small)) == (not convolves)


@pytest.mark.usefixtures("any_pivots")
@pytest.mark.slow
def test_what_linear_layers_return_for_convolutions_is_not_overwritten():
    """Inductor would give the convolution a view whose features are not last, where there is one sample."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU6(inplace=True)]
    model, x = nn.Sequential(*layers, nn.Conv2d(24, 24, 3, groups=24)).eval(), torch.randn(1, 3, 9, 9)
    small = balf_fx.compile(model, [torch.randn(16, 3, 9, 9)], allocation={"2": 9}, effort="fast", progress=False)
    assert isinstance(small.get_submodule("2.1"), nn.Linear)
    assert overwriting(small) == ["_3"]  # what the sum of the bias returned
    with torch.no_grad():
        found, (code, *_) = run_and_get_code(torch.compile(small), x)
    torch.testing.assert_close(found, small(x.clone()))
    (call,) = (line for line in code.splitlines() if "convolution(" in line and "groups=24" in line)
    assert ", (0, " not in call.partition("stride=")[0]  # the stride of the only sample
