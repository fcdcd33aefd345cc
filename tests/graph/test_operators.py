import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from balf_fx.graph.operators import argument_names, arguments, trains


class Call(nn.Module):
    """A call of a function on values and the statistics of a norm."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x):
        return self.function(self, x)


TRAINING = {
    "dropout": lambda own, x: F.dropout(x, 0.5, own.training),
    "dropout1d": lambda own, x: F.dropout1d(x, training=own.training),
    "dropout2d": lambda own, x: F.dropout2d(x[None], 0.5, own.training),
    "feature alpha dropout": lambda own, x: F.feature_alpha_dropout(x, 0.5, own.training),
    "alpha dropout": lambda own, x: F.alpha_dropout(x, 0.5, own.training),
    "builtin dropout": lambda own, x: torch.dropout(x, 0.5, own.training),
    "rrelu": lambda own, x: F.rrelu(x, 0.1, 0.3, own.training),
    "attention": lambda own, x: F.scaled_dot_product_attention(x, x, x, None, 0.5 if own.training else 0.0),
    "batch norm": lambda own, x: F.batch_norm(x, own.mean, own.variance, None, None, own.training),
    "instance norm": lambda own, x: F.instance_norm(x, own.mean, own.variance, use_input_stats=own.training),
}
EITHER = {
    "dropout of nothing": lambda own, x: F.dropout(x, 0.0, own.training),
    "attention without dropout": lambda own, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.0),
    "batch norm without statistics": lambda own, x: F.batch_norm(x, None, None, training=True),
    "instance norm without statistics": lambda own, x: F.instance_norm(x),
    "other functions": lambda own, x: torch.relu(x) + F.gelu(x).transpose(1, 2).transpose(1, 2),
}


def traced(function, training, method):
    model, x = Call(function).train(training), torch.randn(3, 4, 6)
    if method == "symbolic_trace":
        return fx.symbolic_trace(model)
    return torch.export.export(model, (x,)).module()


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", [*TRAINING, *EITHER])
def test_what_differs_in_training_mode_is_known(name, method):
    function = {**TRAINING, **EITHER}[name]
    found = [any(map(trains, traced(function, training, method).graph.nodes)) for training in (True, False)]
    assert found == [name in TRAINING, False]


def test_arguments_have_the_names_of_the_function():
    (node,) = fx.symbolic_trace(lambda x: F.dropout(x, 0.25, inplace=True)).graph.find_nodes(
        op="call_function", target=F.dropout
    )
    assert arguments(node) == {"input": node.args[0], "p": 0.25, "inplace": True, "training": True}
    assert argument_names(torch.ops.aten.roll.default) == ("self", "shifts", "dims")
    assert argument_names(torch.relu) == ()
