import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

import balf_fx
from balf_fx.capture import exporting
from balf_fx.capture.normal_form import capture
from balf_fx.capture.tracing import user_line
from balf_fx.errors import CalibrationError, CaptureError, ModelError, NoSiteError, OptionError, TrainingModeError
from balf_fx.graph.annotation import annotation, graph_record


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


class BranchingOnANumber(Branching):
    def forward(self, x):
        if x.abs().max().item() > 100.0:
            return x
        return self.linear(x)


def test_a_model_that_nothing_captures_gets_both_reasons_and_the_line():
    with pytest.raises(CaptureError, match=r"test_normal_form\.py:\d+: `if x\.abs.*`.*control flow") as caught:
        capture(BranchingOnANumber(), X)
    assert "cannot be exported" in str(caught.value)
    assert "backend='balf'" in str(caught.value)


def test_the_line_may_be_in_a_package_whose_name_begins_with_that_of_torch():
    models = pytest.importorskip("torchvision.models")
    with pytest.raises(ValueError, match="non-empty") as caught:
        models.mobilenet_v2(inverted_residual_setting=[])
    assert "torchvision" in user_line(caught.value)


def test_a_graph_of_one_branch_raises_an_error_where_the_model_takes_the_other(caplog):
    model = Branching()
    if not exporting._branches_are_asserted():
        with pytest.raises(CaptureError, match="cannot be exported"):
            capture(model, X.abs())
        pytest.skip("this version of torch does not assert branches, so they are refused")
    graph_module = capture(model, X.abs())
    assert "`if x.sum() > 0:`" in caplog.text
    assert "branches on values" in caplog.text
    values = torch.rand(7, 4)
    torch.testing.assert_close(graph_module(values), model(values))
    with pytest.raises(RuntimeError, match=r"branches on values of its input.*backend='balf'"):
        graph_module(-values)


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        count = torch.div(torch.tensor(x.shape[1]), 2, rounding_mode="trunc")
        return self.linear(x.view(x.shape[0], count, 2 * x.shape[2])[..., :4])


def test_branches_that_are_not_asserted_are_refused(monkeypatch):
    monkeypatch.setattr(exporting, "_branches_are_asserted", lambda: False)
    with pytest.raises(CaptureError, match="cannot be exported"):
        capture(Branching(), X.abs())


def test_sizes_that_are_computed_as_tensors_are_captured():
    if not exporting._branches_are_asserted():
        pytest.skip("this version of torch does not assert branches, so they are refused")
    values = torch.randn(3, 6, 4)
    graph_module = capture(Chunked(), values)
    assert graph_record(graph_module).captured == "export"
    torch.testing.assert_close(graph_module(values[:2]), graph_module(values)[:2])


def test_a_graph_that_computes_something_else_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(CaptureError, match="differs from the model's"):
        capture(model, X, method="symbolic_trace")
    graph_module = capture(model, X)
    assert graph_record(graph_module).captured == "export"
    torch.testing.assert_close(graph_module(X), model(X))


def test_state_that_forward_changes_is_put_back():
    model = Counting()
    with pytest.raises(CaptureError, match="state that forward changes"):
        capture(model, X, method="symbolic_trace")
    graph_module = capture(model, X)
    assert float(model.calls) == float(graph_module.get_buffer("calls")) == 0.0
    torch.testing.assert_close(graph_module(X), model(X))


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
        nn.Sequential(nn.Linear(4, 4), StochasticDepth(0.1, "row")),
    ],
    ids=["BatchNorm", "Dropout", "F.dropout", "StochasticDepth"],
)
@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
def test_training_mode_is_refused(model, method):
    with pytest.raises(TrainingModeError, match=r"model\.eval\(\)"):
        capture(model.train(), X, method=method)
    capture(model.eval(), X, method=method)


class Dropping(nn.Module):
    def __init__(self, training):
        super().__init__()
        self.layer, self.drops = nn.Linear(4, 4), training

    def forward(self, x):
        return torch.dropout(self.layer(x), 0.5, self.drops)


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
def test_functions_in_training_mode_are_refused(method):
    capture(Dropping(training=False), X, method=method)
    with pytest.raises(TrainingModeError, match=r"model\.eval\(\)"):
        capture(Dropping(training=True), X, method=method)


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


class ManyInputs(nn.Module):
    """Nested inputs, keyword inputs, constants, and a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, pair, table, *, scale=1.0, bias=None, mode="plain"):
        y = self.linear(pair[0]) * scale + self.linear(table["x"]) + pair[1]
        return {"y": (y, [y + 1]), "mode": mode, "none": None if bias is None else bias + y}


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
def test_both_ways_of_capture_take_the_same_calls(method):
    model = ManyInputs()
    call = [lambda m, x, scale=2.0: m((x, x + 1), {"x": -x}, scale=scale, bias=x)] * 2
    graph_module = capture(model, X, forward=lambda m, x: call[0](m, x), method=method)
    for x in (X, torch.randn(7, 4)):
        want, got = call[0](model, x), call[0](graph_module, x)
        torch.testing.assert_close(got["y"], want["y"])
        torch.testing.assert_close(got["none"], want["none"])
        assert got["mode"] == want["mode"]
    with pytest.raises(AssertionError, match=r"'scale' was 2\.0"):
        call[0](graph_module, X, scale=3.0)
    copies = (copy.deepcopy(graph_module), pickle.loads(pickle.dumps(graph_module)))
    assert all(torch.equal(call[0](other, X)["y"][0], call[0](model, X)["y"][0]) for other in copies)


class Answer(NamedTuple):
    """What some models return in place of a tuple."""

    scores: torch.Tensor
    extra: dict[str, torch.Tensor]


class Answering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return Answer(self.linear(x), {"twice": 2 * x})


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
def test_classes_of_answers_survive_copies(method):
    graph_module = capture(Answering(), X, method=method)
    for module in (graph_module, copy.deepcopy(graph_module), pickle.loads(pickle.dumps(graph_module))):
        answer = module(X)
        assert type(answer) is Answer
        torch.testing.assert_close(answer.extra["twice"], 2 * X)


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x), object()


def test_an_answer_that_export_does_not_know_is_named():
    with pytest.raises(CaptureError, match="Opaque cannot be exported: an output is of type object"):
        capture(Opaque(), X, method="export")


def test_export_of_a_batch_of_one_accepts_other_batch_sizes():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    graph_module = capture(model, torch.randn(1, 5, 8))
    assert graph_record(graph_module).captured == "export"
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(graph_module(x), model(x))


def test_an_unknown_method_is_refused():
    with pytest.raises(OptionError, match="capture must be 'auto'"):
        capture(nn.Linear(4, 4), X, method="jit")


def test_an_exported_graph_refuses_shapes_that_it_was_not_captured_for():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    graph_module = capture(model, torch.randn(2, 5, 8))
    with pytest.raises(AssertionError, match="'src' had size 5 in dimension 1"):
        graph_module(torch.randn(2, 6, 8))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 4, device="meta")),
            r"0 \(Linear\) is on the meta device: load its weights",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(4)), r"0 \(LazyLinear\) is lazy.*run one batch"),
        (lambda: nn.Sequential(torch.ao.nn.quantized.Linear(4, 4)), "is quantized: compress the float model first"),
    ],
    ids=["meta", "lazy", "quantized"],
)
@pytest.mark.filterwarnings("ignore")
def test_models_without_usable_weights_are_refused(model, message):
    with pytest.raises(ModelError, match=message):
        capture(model(), X)


def test_complex_weights_are_no_sites_but_no_obstacle():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64))
    with pytest.raises(NoSiteError, match="0: its weight is not a real floating-point tensor"):
        balf_fx.compile(model, X.to(torch.complex64), flops=0.5, progress=False)


class BranchesOnShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.shape[1] > 3 else x.expand(-1, 4)


def test_a_batch_that_takes_another_branch_than_the_example_is_an_error():
    with pytest.raises(CalibrationError, match=r"batch 1.*'x' had size 4 in dimension 1"):
        balf_fx.compile(BranchesOnShape(), [X, torch.randn(3, 1)], flops=1.0, progress=False)


class Tokens(nn.Module):
    """Something else for some lengths."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.table, self.linear = kind, nn.Embedding(50, 8), nn.Linear(8, 4)

    def forward(self, tokens):
        length = tokens.shape[1]
        found = self.linear(self.table(tokens))
        if self.kind == "multiple" and length % 4 == 0:
            found = 2 * found
        if self.kind == "limit" and length > 10:
            found = 3 * found
        if self.kind == "one length" and length - 1 == 4:
            found = 5 * found
        if self.kind == "clamped" and max(0, 12 - length) + length != 12:
            found = 7 * found
        if self.kind == "loop":
            for position in range(length):
                found = found + found[:, position : position + 1]
        return found


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("multiple", "had size 8 in dimension 1"),
        ("loop", "had size 8 in dimension 1"),
        ("limit", "has 2 to 10 in dimension 1"),
    ],
)
def test_lengths_for_which_a_model_does_something_else_are_refused(kind, message):
    model, tokens = Tokens(kind).eval(), torch.randint(50, (3, 8))
    graph_module = capture(model, tokens, method="export")
    torch.testing.assert_close(graph_module(tokens), model(tokens))
    with pytest.raises(AssertionError, match=message):
        graph_module(torch.randint(50, (3, 13)))
    if kind == "limit":
        shorter = torch.randint(50, (5, 6))
        torch.testing.assert_close(graph_module(shorter), model(shorter))
    else:
        with pytest.raises(AssertionError, match=message):
            graph_module(torch.randint(50, (3, 7)))


@pytest.mark.parametrize("length", [8, 14])
def test_lengths_on_the_same_side_of_a_limit_are_open(length):
    model = Tokens("clamped").eval()
    graph_module = capture(model, torch.randint(50, (3, length)), method="export")
    for other in (2, 12, 13, 40):
        tokens = torch.randint(50, (2, other))
        if (other <= 12) == (length <= 12):
            torch.testing.assert_close(graph_module(tokens), model(tokens))
        else:
            with pytest.raises(AssertionError, match=r"has \d+ to \d+ in dimension 1"):
                graph_module(tokens)


def test_a_single_length_for_which_a_model_does_something_else_is_refused():
    model = Tokens("one length").eval()
    graph_module = capture(model, torch.randint(50, (3, 8)), method="export")
    for length in (6, 13):
        tokens = torch.randint(50, (2, length))
        torch.testing.assert_close(graph_module(tokens), model(tokens))
    with pytest.raises(AssertionError, match="has 6 to any in dimension 1"):
        graph_module(torch.randint(50, (2, 5)))


def test_other_lengths_are_open():
    model = Tokens("plain").eval()
    graph_module = capture(model, torch.randint(50, (1, 8)), method="export")
    for shape in ((1, 2), (4, 31)):
        tokens = torch.randint(50, shape)
        torch.testing.assert_close(graph_module(tokens), model(tokens))


class Asking(nn.Module):
    """Returns nothing where a size is no number of Python's."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        y = self.layer(x)
        return y if isinstance(x.shape[0], int) else None


def test_a_graph_that_returns_no_tensor_where_the_model_does_is_refused():
    with pytest.raises(CaptureError, match="differs"):
        capture(Asking().eval(), torch.randn(4, 8), method="symbolic_trace")
