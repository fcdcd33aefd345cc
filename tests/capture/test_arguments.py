import json

import pytest
import torch

from balf_fx.capture.arguments import describe, rebuild


def test_calls_are_described_by_shapes_and_plain_values():
    call = ({"ids": torch.zeros(2, 3, dtype=torch.int64), "flag": True}, [torch.zeros(4), None, "mean"], 2.5)
    again = rebuild(json.loads(json.dumps(describe(call))), torch.device("cpu"))
    ids, rest = again[0]["ids"], again[1]
    assert (type(again), type(rest), again[2]) == (tuple, list, 2.5)
    assert (ids.shape, ids.dtype, again[0]["flag"]) == ((2, 3), torch.int64, True)
    assert torch.equal(ids, torch.ones(2, 3, dtype=torch.int64))
    assert (rest[0].shape, rest[1:]) == ((4,), [None, "mean"])
    assert describe(again) == describe(call)


@pytest.mark.parametrize("value", [object(), (torch.zeros(1), object()), {1: torch.zeros(1)}, {"a": [object()]}])
def test_other_things_have_no_description(value):
    assert describe(value) is None
