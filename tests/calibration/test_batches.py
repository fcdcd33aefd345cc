from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import nn

from balf_fx.calibration.batches import (
    describe,
    forward_for,
    is_empty,
    iterate,
    run_batch,
    sample_count,
    some_samples,
)
from balf_fx.errors import CalibrationError, NonFiniteError

X = torch.ones(2, 3)
LABELS = torch.tensor([1, 0])
INTEGERS = torch.zeros(2, 3, dtype=torch.int64)
FLOATS = torch.ones(2)
Pair = namedtuple("Pair", ["image", "target"])


class Recorder(nn.Module):
    """Notes the arguments it was called with."""

    def note(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


class One(Recorder):
    def forward(self, x):
        return self.note(x)


class Optional(Recorder):
    def forward(self, x, extra=None):
        return self.note(x) if extra is None else self.note(x, extra)


class Required(Recorder):
    def forward(self, x, index):
        return self.note(x, index)


class RequiredAndOptional(Recorder):
    def forward(self, x, index, extra=None):
        return self.note(x, index) if extra is None else self.note(x, index, extra)


class KeywordOnly(Recorder):
    def forward(self, x, *, extra=None):
        return self.note(x) if extra is None else self.note(x, extra=extra)


class AnyNumber(Recorder):
    def forward(self, *inputs):
        return self.note(*inputs)


class Labelled(Recorder):
    def forward(self, x=None, labels=None):
        return self.note(x=x, labels=labels)


class AnyKeyword(Recorder):
    def forward(self, **inputs):
        return self.note(**inputs)


def received(model, batch):
    run_batch(model, batch, forward_for(model), index=0)
    return model.args, model.kwargs


def same(left, right):
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("batch", [X, {"x": X}, OrderedDict(x=X), UserDict(x=X)], ids=lambda b: type(b).__name__)
def test_a_tensor_or_a_mapping_is_one_batch(batch):
    assert same(list(iterate(batch)), [batch])


@pytest.mark.parametrize(
    "items", [[X, FLOATS], [(X, LABELS)], [[X, LABELS], {"x": X}], []], ids=["tensors", "tuple", "mixed", "none"]
)
@pytest.mark.parametrize("kind", [list, tuple, iter], ids=["list", "tuple", "iterator"])
def test_everything_else_is_a_sequence_of_batches(items, kind):
    assert same(list(iterate(kind(items))), items)


def test_a_generator_is_read_once_and_no_further_than_asked():
    read = []

    def batches():
        for index in range(3):
            read.append(index)
            yield index

    iterator = iterate(batches())
    assert read == []
    assert next(iterator) == 0
    assert read == [0]
    assert list(iterator) == [1, 2]


@pytest.mark.parametrize("thing", [None, 5, One()], ids=["None", "int", "module"])
def test_what_is_no_iterable_is_refused_by_its_type(thing):
    with pytest.raises(CalibrationError, match=f"not {type(thing).__name__}$"):
        iterate(thing)


@pytest.mark.parametrize("model", [One(), Optional(), KeywordOnly(), AnyNumber()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("batch", [X, (X,), [X]], ids=["tensor", "tuple", "list"])
def test_a_tensor_is_the_only_argument(model, batch):
    args, kwargs = received(model, batch)
    assert same(args, [X])
    assert kwargs == {}


@pytest.mark.parametrize(
    ("model", "batch", "kept"),
    [
        pytest.param(One(), (X, LABELS), 1, id="no room: labels"),
        pytest.param(One(), [X, FLOATS, "name"], 1, id="no room: anything"),
        pytest.param(One(), Pair(X, LABELS), 1, id="no room: named tuple"),
        pytest.param(One(), (LABELS,), 1, id="the only argument is no label"),
        pytest.param(KeywordOnly(), (X, FLOATS), 1, id="a keyword-only parameter is no room"),
        pytest.param(Optional(), (X, LABELS), 1, id="optional: labels"),
        pytest.param(Optional(), (X, LABELS.to(torch.uint8)), 1, id="optional: narrow labels"),
        pytest.param(Optional(), (X, FLOATS), 2, id="optional: float vector"),
        pytest.param(Optional(), (X, INTEGERS), 2, id="optional: integer matrix"),
        pytest.param(Optional(), (X, FLOATS.to(torch.complex64)), 2, id="optional: complex vector"),
        pytest.param(Optional(), (X, FLOATS.bool()), 2, id="optional: boolean vector"),
        pytest.param(Optional(), (X, LABELS[0]), 2, id="optional: integer scalar"),
        pytest.param(Optional(), (X, 7), 2, id="optional: number"),
        pytest.param(Optional(), (X, INTEGERS, LABELS), 2, id="optional: integer matrix, then no room"),
        pytest.param(Optional(), (LABELS, LABELS), 1, id="optional: all integer vectors"),
        pytest.param(Required(), (X, LABELS), 2, id="required: integer vector"),
        pytest.param(Required(), (LABELS, LABELS, LABELS), 2, id="required: integer vectors, then labels"),
        pytest.param(RequiredAndOptional(), (X, LABELS, LABELS), 2, id="required and optional: labels"),
        pytest.param(RequiredAndOptional(), (X, LABELS, FLOATS), 3, id="required and optional: float vector"),
        pytest.param(AnyNumber(), (X, X, LABELS, LABELS), 2, id="any number: trailing labels"),
        pytest.param(AnyNumber(), (X, LABELS, X), 3, id="any number: an integer vector that is not last"),
        pytest.param(AnyNumber(), (LABELS, LABELS), 1, id="any number: all integer vectors"),
    ],
)
def test_labels_leave_a_tuple_from_its_end(model, batch, kept):
    args, kwargs = received(model, batch)
    assert same(args, batch[:kept])
    assert kwargs == {}


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
@pytest.mark.parametrize(
    ("model", "batch", "kept"),
    [
        (Labelled(), {"x": X, "labels": LABELS}, {"x", "labels"}),
        (Labelled(), {"x": X, "label": LABELS, "labels": LABELS}, {"x", "labels"}),
        (Labelled(), {"x": X, "label": FLOATS}, {"x", "labels"}),
        (AnyKeyword(), {"x": X, "label": LABELS, "labels": LABELS}, {"x", "label", "labels"}),
        (KeywordOnly(), {"x": X, "extra": LABELS}, {"extra"}),
        (KeywordOnly(), {"x": X, "extra": LABELS, "labels": LABELS}, {"extra"}),
    ],
)
def test_label_keys_leave_a_mapping_where_forward_has_no_such_parameter(model, batch, kept, kind):
    _, kwargs = received(model, kind(batch))
    assert set(kwargs) == kept
    assert all(kwargs[key] is batch.get(key) for key in kept)


def test_the_batch_itself_is_not_changed():
    mapping, sequence = {"x": X, "label": LABELS}, [X, LABELS]
    received(Labelled(), mapping)
    received(One(), sequence)
    assert list(mapping) == ["x", "label"]
    assert same(sequence, [X, LABELS])


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_tensors_in_a_mapping_move_to_the_models_device(kind):
    model = Labelled()
    model.register_parameter("weight", nn.Parameter(torch.ones(1, device="meta")))
    _, kwargs = received(model, kind(x=X))
    assert kwargs["x"].device.type == "meta"


@pytest.mark.parametrize("batch", [X, (X, LABELS), [X], Pair(X, LABELS)], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("devices", [["meta"], ["meta", "meta"], ["cpu", "meta"]], ids=" and ".join)
def test_tensors_move_to_the_models_device_where_it_has_one(batch, devices):
    model = One()
    for index, device in enumerate(devices):
        model.register_parameter(f"weight{index}", nn.Parameter(torch.ones(1, device=device)))
    args, _ = received(model, batch)
    assert args[0].device.type == ("meta" if set(devices) == {"meta"} else X.device.type)


def test_a_batch_is_run_without_gradients_and_its_result_returned():
    model = nn.Linear(3, 2)
    output = run_batch(model, X, forward_for(model), index=0)
    assert not output.requires_grad
    torch.testing.assert_close(output, model(X).detach())


def test_forward_is_called_with_the_module_given_to_run_batch():
    first, second = nn.Linear(3, 2), nn.Linear(3, 4)
    assert run_batch(second, X, forward_for(first), index=0).shape == (2, 4)
    assert run_batch(second, X, lambda module, batch: (module, batch), index=0) == (second, X)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, KeyError, AssertionError, ZeroDivisionError])
def test_the_models_own_error_is_wrapped_with_the_batch_and_its_index(error):
    def forward(module, batch):
        raise error("boom")

    with pytest.raises(CalibrationError, match=r"calibration batch 3, .*\(2, 3\).*boom.*forward=") as caught:
        run_batch(One(), (X, LABELS), forward, index=3)
    assert type(caught.value.__cause__) is error


def test_a_batch_of_the_wrong_shape_is_named():
    model = nn.Linear(4, 2)
    with pytest.raises(CalibrationError, match=r"batch 12, which is a float32 tensor of shape \(2, 3\)"):
        run_batch(model, X, forward_for(model), index=12)


@pytest.mark.parametrize("error", [NonFiniteError("site"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_errors_that_are_not_the_models_pass_unchanged(error):
    def forward(module, batch):
        raise error

    with pytest.raises(type(error)) as caught:
        run_batch(One(), X, forward, index=0)
    assert caught.value is error


def test_describe_names_what_is_nested():
    batch = ({"x": X, "n": 3}, [INTEGERS, None])
    described = (
        "a tuple of (a mapping of x: a float32 tensor of shape (2, 3), n: an int, "
        "a list of (an int64 tensor of shape (2, 3), a NoneType))"
    )
    assert describe(batch) == described
    assert describe({}) == "an empty mapping"
    assert describe(OrderedDict) == "a type"
    assert describe(OrderedDict(x=3).keys()) == "an odict_keys"
    assert describe(torch.zeros(2, dtype=torch.uint8)) == "a uint8 tensor of shape (2,)"


@pytest.mark.parametrize(
    ("batch", "count", "empty"),
    [
        (X, 2, False),
        ((X, LABELS), 2, False),
        ((X, torch.zeros(5, 3)), 0, False),
        ({"ids": torch.ones(4, 7), "positions": torch.ones(1, 7), "scale": torch.tensor(2.0)}, 4, False),
        ({"ids": torch.ones(1, 7), "positions": torch.arange(7)}, 0, False),
        ((torch.ones(1, 7), torch.ones(1, 7)), 1, False),
        (torch.zeros(0, 3), 0, True),
        ({"ids": torch.zeros(0, 7), "positions": torch.ones(1, 7)}, 0, True),
        ((torch.ones(1, 3, 4, 4), torch.zeros(0, 4)), 0, False),
        ([1, 2], 0, False),
    ],
)
def test_samples_are_counted(batch, count, empty):
    assert is_empty(batch) is empty
    assert empty or sample_count(batch) == count


def test_what_holds_for_all_samples_is_not_cut():
    batch = {"ids": torch.arange(8).reshape(4, 2), "positions": torch.arange(2)[None], "scale": torch.tensor(2.0)}
    piece = some_samples(batch, 1, 3)
    assert piece["ids"].tolist() == [[2, 3], [4, 5]]
    assert torch.equal(piece["positions"], batch["positions"])
    assert piece["scale"] is batch["scale"]


def test_batches_without_samples_are_left_out_and_those_of_inference_mode_are_copied():
    with torch.inference_mode():
        made = torch.ones(2, 3)
    found = list(iterate([torch.zeros(0, 3), {"x": made, "y": X}, X]))
    assert [type(batch) for batch in found] == [dict, torch.Tensor]
    assert not found[0]["x"].is_inference()
    assert found[0]["y"] is found[1] is X
    with pytest.raises(CalibrationError, match="not str"):
        iterate("calibration/")


def test_descriptions_are_short():
    assert describe([1] * 300) == "a list of 300 times an int"
    assert describe([[1, 2]] * 300) == "a list of 300 times a list of 2 times an int"
    assert len(describe(tuple([X, 1] * 300))) < 400
    assert len(describe({f"key{i}": X for i in range(300)})) < 400
