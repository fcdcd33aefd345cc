import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from balf_fx.checkpoint.values import Encoder, decode


@dataclass(frozen=True)
class Record:
    value: torch.Tensor
    other: Any = None


def round_trip(value, classes=(Record,)):
    encoder = Encoder()
    written = json.dumps(encoder.encode(value))
    return decode(json.loads(written), encoder.tensors, classes)


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -0.1, 1e-310, float("inf"), "a b", [], (1, (2.5, None)), {"a": 1, ("b", 2): [3]}, {1: "a"}],
    ids=repr,
)
def test_plain_values_come_back_as_they_were(value):
    found = round_trip(value)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensors_come_back_bit_for_bit_with_their_strides(dtype):
    base = (100 * torch.randn(4, 6, 5)).to(dtype)
    views = [base, base.mT, base[1], base[:, 1:3], base[:, ::2].permute(2, 0, 1), base[0, 0].expand(3, 5), base[:0]]
    views += [base[0, 0, 0], base.permute(1, 2, 0)]
    found = round_trip(views)
    for own, other in zip(views, found, strict=True):
        assert torch.equal(own, other)
        assert own.dtype == other.dtype
        assert own.stride() == other.stride()


def test_stored_tensors_share_no_memory():
    base = torch.randn(4, 6)
    encoder = Encoder()
    encoder.encode([base, base, base[1:], torch.randn(5)])
    assert len({tensor.untyped_storage().data_ptr() for tensor in encoder.tensors.values()}) == 4
    assert sum(tensor.untyped_storage().nbytes() for tensor in encoder.tensors.values()) == 4 * (24 + 24 + 18 + 5)


def test_records_of_known_classes_alone_are_read():
    record = Record(torch.randn(3), (1, Record(torch.eye(2))))
    found = round_trip({"a": record})["a"]
    assert torch.equal(found.value, record.value)
    assert torch.equal(found.other[1].value, torch.eye(2))
    with pytest.raises(KeyError, match="Record"):
        round_trip(record, classes=())
    assert [each.name for each in dataclasses.fields(found)] == ["value", "other"]


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", torch.float32], ids=repr)
def test_other_objects_are_refused(value):
    with pytest.raises(TypeError, match="cannot be stored in a checkpoint"):
        Encoder().encode([value])
