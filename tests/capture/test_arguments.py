import json
import pickle
from collections import OrderedDict, defaultdict

import pytest
import torch
from torch import fx, nn

import balf_fx
from balf_fx.capture.arguments import describe, rebuild, record_call
from balf_fx.capture.normal_form import capture
from balf_fx.errors import CaptureError


def test_calls_are_described_by_shapes_and_plain_values():
    call = ({"ids": torch.zeros(2, 3, dtype=torch.int64), "flag": True}, [torch.zeros(4), None, "mean"], 2.5)
    again = rebuild(json.loads(json.dumps(describe(call))), call[0]["ids"].device)
    ids, rest = again[0]["ids"], again[1]
    assert (type(again), type(rest), again[2]) == (tuple, list, 2.5)
    assert (ids.shape, ids.dtype, again[0]["flag"]) == ((2, 3), torch.int64, True)
    assert torch.equal(ids, torch.ones(2, 3, dtype=torch.int64))
    assert (rest[0].shape, rest[1:]) == ((4,), [None, "mean"])
    assert describe(again) == describe(call)


@pytest.mark.parametrize("value", [object(), (torch.zeros(1), object()), {1: torch.zeros(1)}, {"a": [object()]}])
def test_other_things_have_no_description(value):
    assert describe(value) is None


class Starred(nn.Module):
    """Takes what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, scale=1.0, *args, flag=False, **kwargs):
        y = self.a(x) * scale
        for each in args:
            y = y + each
        if kwargs.get("twice"):
            y = 2 * y
        if "mask" in kwargs:
            y = y * kwargs["mask"]
        return {"y": self.b(y), "all": (x, y) if flag else None}


CALLS = {
    "nothing": lambda m, x: m(x),
    "by position": lambda m, x: m(x, 2.0, x, x + 1),
    "by keyword": lambda m, x: m(x, flag=True, twice=True, mask=x > 0),
    "both": lambda m, x: m(x, 0.5, x + 1, mask=x > 0, twice=False),
    "a default between": lambda m, x: m(x, mask=x),
}


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", CALLS)
def test_the_result_takes_starred_arguments_as_the_example_passes_them(name, method):
    model, x, call = Starred().eval(), torch.randn(4, 8), CALLS[name]
    small = balf_fx.compile(
        model, [x, x + 1], params=1.0, effort="fast", capture=method, forward=call, progress=False, exclude=["b"]
    )
    x = torch.randn(6, 8)
    expected, found = call(model, x), call(small, x)
    torch.testing.assert_close(found["y"], expected["y"])
    assert (found["all"] is None) is (expected["all"] is None)
    again = pickle.loads(pickle.dumps(small))
    torch.testing.assert_close(call(again, x)["y"], expected["y"])
    arguments = record_call(model, x, call).description()
    assert len(arguments["positional"]["tuple"]) + len(arguments["keywords"]["dict"]) == {
        "nothing": 1, "by position": 4, "by keyword": 4, "both": 5, "a default between": 2
    }[name]  # fmt: skip


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
def test_starred_constants_are_guarded(method):
    graph_module = capture(Starred().eval(), torch.randn(4, 8), CALLS["by keyword"], method)
    with pytest.raises(AssertionError, match="'twice' was True"):
        graph_module(torch.randn(4, 8), flag=True, twice=False, mask=torch.ones(4, 8) > 0)


def test_names_that_no_input_can_have():
    with pytest.raises(CaptureError, match="'not-a-name'"):
        capture(Starred().eval(), torch.randn(4, 8), lambda m, x: m(x, **{"not-a-name": x}))


def test_a_tensor_that_is_passed_twice_is_two_inputs():
    class Two(Starred):
        def forward(self, x, y):
            return self.a(x) - self.b(y)

    model, x = Two().eval(), torch.randn(4, 8)
    graph_module = capture(model, (x, x), method="export")
    torch.testing.assert_close(graph_module(x, x + 1), model(x, x + 1))


SCALE = torch.full((8,), 2.0)


class Defaults(Starred):
    def forward(self, x, scale=SCALE):
        return OrderedDict(y=self.a(x) * scale, z=self.b(x))


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
def test_defaults_that_are_tensors_and_outputs_of_other_classes(method):
    model, x = Defaults().eval(), torch.randn(4, 8)
    graph_module = capture(model, x, method=method)
    for each in (graph_module, pickle.loads(pickle.dumps(graph_module))):
        found = each(x)
        assert type(found) is OrderedDict
        torch.testing.assert_close(found, model(x))
    with pytest.raises((AssertionError, TypeError)):
        graph_module(x, SCALE + 1)


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
@pytest.mark.parametrize("kind", [OrderedDict, lambda pairs: defaultdict(list, pairs)], ids=["ordered", "default"])
@pytest.mark.parametrize("keys", [("0", "pool"), (0, 1), ("in", "y"), (("a", 1), None)], ids=str)
def test_keys_of_an_output_need_not_be_names(keys, kind, method):  # as those of the backbones of detectors
    class Pyramid(Starred):
        def forward(self, x):
            return kind(zip(keys, (self.a(x), [self.b(x)]), strict=True))

    model, x = Pyramid().eval(), torch.randn(4, 8)
    graph_module = capture(model, x, method=method)
    wanted = model(x)
    for each in (graph_module, pickle.loads(pickle.dumps(graph_module)), torch.compile(graph_module, backend="eager")):
        found = each(x)
        assert type(found) is type(wanted)
        torch.testing.assert_close(found, wanted)


def test_graphs_whose_output_is_a_dictionary_are_traced_again():  # as those of torchvision's create_feature_extractor
    class Features(Starred):
        def forward(self, x):
            return {"a.0": self.a(x), "b": [self.b(x)]}

    model, x = fx.symbolic_trace(Features().eval()), torch.randn(4, 8)
    found = capture(model, x, method="symbolic_trace")(x)
    assert type(found) is dict
    torch.testing.assert_close(found, model(x))


def test_outputs_of_transformers_keep_their_class():
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Model(Starred):
        def forward(self, x):
            return outputs.BaseModelOutput(last_hidden_state=self.a(x))

    model, x = Model().eval(), torch.randn(4, 8)
    found = capture(model, x, method="symbolic_trace")(x)
    assert type(found) is outputs.BaseModelOutput
    torch.testing.assert_close(found.last_hidden_state, model(x).last_hidden_state)
