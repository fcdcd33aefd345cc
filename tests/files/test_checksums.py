import hashlib

import pytest
import torch

from balf_fx.files.checksums import checksum

VALUES = torch.arange(6.0).view(2, 3)


def test_it_is_the_sha256_of_what_a_tensor_is():
    own = hashlib.sha256(b"text" + b"a torch.float32 (2, 3)" + VALUES.cpu().numpy().tobytes())
    assert checksum({"a": VALUES}, "text") == own.hexdigest()


@pytest.mark.parametrize(
    "other",
    [{"b": VALUES}, {"a": VALUES.double()}, {"a": VALUES.view(3, 2)}, {"a": VALUES + 1e-6}, {"a": VALUES, "b": VALUES}],
)
def test_every_difference_shows(other):
    assert checksum(other) != checksum({"a": VALUES})
    assert checksum({"a": VALUES}, "text") != checksum({"a": VALUES})


def test_order_and_memory_do_not_matter():
    transposed = VALUES.t().contiguous().t().requires_grad_()
    assert checksum({"b": VALUES, "a": transposed}) == checksum({"a": VALUES, "b": VALUES})
    assert checksum({"a": VALUES[:0].bfloat16()}) == checksum({"a": torch.empty(0, 3, dtype=torch.bfloat16)})
