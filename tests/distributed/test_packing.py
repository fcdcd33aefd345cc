"""Values arrive as they were sent."""

from dataclasses import dataclass

import pytest
import torch

from balf_fx.calibration.moments import Moments
from balf_fx.distributed.packing import packed, unpacked

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Holder:
    name: str
    tensors: tuple[torch.Tensor | None, ...]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_tensors_keep_their_type_shape_and_values(dtype):
    for tensor in (torch.arange(7).to(dtype), torch.ones(2, 3, 1).to(dtype).mT, torch.tensor(1).to(dtype)):
        found = unpacked(packed(tensor), CPU)
        assert found.dtype == dtype
        assert torch.equal(found, tensor)
    assert unpacked(packed(torch.zeros(0, 3, dtype=dtype)), CPU).shape == (0, 3)


def test_tensors_keep_their_order_in_memory_without_gaps():
    whole = torch.randn(2, 3, 4, 5)
    last = whole.to(memory_format=torch.channels_last)
    for tensor, stride in [(last, last.stride()), (whole[0, 0].mT, (1, 5)), (whole[..., :2], (24, 8, 2, 1))]:
        found = unpacked(packed(tensor), CPU)
        assert torch.equal(found, tensor)
        assert found.stride() == stride
    assert unpacked(packed(torch.ones(3, 1).expand(3, 4)), CPU).sum() == 12


def test_nested_values_and_records_keep_their_form():
    value = {"a": [Holder("x", (torch.ones(3), None)), 1.5], "b": Moments(3.0, torch.ones(1, 2), torch.eye(2)[None])}
    found = unpacked(packed(value), CPU)
    assert found["a"][0].name == "x"
    assert found["a"][0].tensors[1] is None
    torch.testing.assert_close(found["a"][0].tensors[0], torch.ones(3))
    assert found["b"].scatter.equal(value["b"].scatter)


def test_a_view_takes_no_more_than_what_it_shows():
    whole = torch.zeros(1 << 20)
    assert len(packed(whole[:10])) < 1000


def test_what_arrives_is_apart_from_the_bytes():
    data = packed((torch.zeros(4), torch.zeros(4)))
    first, second = unpacked(data, CPU)
    first += 1
    assert second.equal(torch.zeros(4))
    assert unpacked(data, CPU)[0].equal(torch.zeros(4))


def test_the_default_device_does_not_matter():
    values = [torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(3, 2).mT]
    with torch.device("meta"):
        found = unpacked(packed(values), torch.device("cpu"))
    assert all(
        torch.equal(one, other) and one.stride() == other.stride() for one, other in zip(found, values, strict=True)
    )
