"""A graph from torch.export returns what the model returns, in the same containers."""

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import balf_fx
from balf_fx.capture.normal_form import capture
from balf_fx.errors import CaptureError


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    hidden: Any = None


class Holder:
    def __init__(self, logits):
        self.logits = logits


pytree.register_dataclass(Answer)
pytree.register_pytree_node(
    Holder, lambda held: ([held.logits], None), lambda leaves, _: Holder(*leaves), serialized_type_name="tests.Holder"
)


class Net(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.first, self.last, self.answer = nn.Linear(12, 24), nn.Linear(24, 5), answer

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.answer(self.last(hidden), hidden)


FORMS = {
    "a dataclass": Answer,
    "without an optional field": lambda y, _: Answer(y),
    "in containers": lambda y, hidden: {"answers": [Answer(y, (hidden, None))]},
    "with containers": lambda y, hidden: Answer(y, {"all": [hidden, y]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_dataclasses_of_outputs(form):
    """FX sees no nodes in one: it took the whole model for dead code, which "uses no parameters"."""
    model, x = Net(FORMS[form]).eval(), torch.randn(32, 12)
    graph_module = capture(model, x, method="export")
    small = balf_fx.compile(model, x, flops=0.6, capture="export", effort="fast", progress=False)
    for found in (graph_module(x), pickle.loads(pickle.dumps(small))(x)):
        expected = model(x)
        assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    torch.testing.assert_close(pytree.tree_leaves(graph_module(x)), pytree.tree_leaves(model(x)))


def test_a_class_that_a_graph_cannot_build_is_told():
    with pytest.raises(CaptureError, match="an output is of type Holder, which a graph cannot build"):
        capture(Net(lambda y, _: Holder(y)).eval(), torch.randn(4, 12), method="export")
