import pytest
import torch
from torch import nn
from torch.nn import functional as F

from balf_fx.capture import capture
from balf_fx.errors import CalibrationError, CaptureError, TrainingModeError
from balf_fx.sites import annotation, graph_record


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:
            return self.linear(x)
        return x


class Counting(nn.Module):
    """Keeps state in a buffer, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) + self.calls


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return F.dropout(self.linear(x), 0.5, training=self.training)


class Noisy(FunctionalDropout):
    def forward(self, x):
        return self.linear(x) + torch.rand_like(x)


class Nested(FunctionalDropout):
    def forward(self, x, flag=False, **extra):
        y = self.linear(x)
        return {"out": (y, [y * 2]), "flag": flag}


X = torch.randn(3, 4)


def test_every_node_knows_its_flops():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph_module = capture(model, X)
    assert [annotation(node).flops for node in graph_module.graph.nodes] == [0, 2 * 3 * 32, 0, 2 * 3 * 16, 0]
    assert graph_record(graph_module).flops == 2 * 3 * 48
    assert graph_record(graph_module).params == 32 + 8 + 16 + 2


def test_an_untraceable_model_names_the_line():
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+: `if x\.sum\(\) > 0:`.*control flow"):
        capture(Branching(), X)


def test_a_graph_that_computes_something_else_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(CaptureError, match="computes something else"):
        capture(model, X)


def test_state_that_forward_changes_is_refused_and_put_back():
    model = Counting()
    with pytest.raises(CaptureError, match="state that forward changes"):
        capture(model, X)
    assert float(model.calls) == 0.0


def test_a_random_model_is_captured_and_leaves_the_random_state():
    model = Noisy().eval()
    before = torch.get_rng_state()
    capture(model, X)
    assert torch.equal(torch.get_rng_state(), before)


def test_nested_outputs_and_unused_arguments():
    graph_module = capture(Nested().eval(), X)
    assert torch.equal(graph_module(X)["out"][1][0], Nested.forward(graph_module, X)["out"][1][0])


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)),
        FunctionalDropout(),
    ],
    ids=["BatchNorm", "Dropout", "F.dropout"],
)
def test_training_mode_is_refused(model):
    with pytest.raises(TrainingModeError, match=r"model\.eval\(\)"):
        capture(model, X)
    capture(model.eval(), X)


def test_training_mode_without_effect_is_fine():
    graph_module = capture(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.ReLU()), X)
    assert graph_module.training


def test_a_forward_that_does_not_call_the_model():
    with pytest.raises(CalibrationError, match="did not call the model"):
        capture(nn.Linear(4, 4), X, forward=lambda model, batch: None)


@torch.fx.wrap
def _first_set(values, x):
    values[0] = 2.0  # legal on the list that generated code passes
    return x * values[0]


class MutatesArgument(nn.Module):
    def forward(self, x):
        return _first_set([0.0], x)


def test_functions_may_change_their_list_arguments():
    torch.testing.assert_close(capture(MutatesArgument(), X)(X), 2 * X)
