from dataclasses import dataclass

import pytest
import torch

from balf_fx.checkpoint.digests import digest_of


@dataclass
class Sample:
    pixels: torch.Tensor
    name: str


TENSOR = torch.arange(6.0).reshape(2, 3)
DIFFERENT = [
    TENSOR,
    TENSOR.mT,
    TENSOR.flatten(),
    TENSOR.double(),
    TENSOR.int(),
    TENSOR + torch.eye(2, 3) * 1e-6,
    torch.zeros(0, 3),
    torch.zeros(3, 0),
    [TENSOR],
    [TENSOR, TENSOR],
    {"a": TENSOR},
    {"b": TENSOR},
    Sample(TENSOR, "a"),
    Sample(TENSOR, "b"),
    1,
    1.0,
    True,
    "1",
    None,
    [],
    {},
    [[], 1],
    [[1]],
    object(),
]


def test_different_values_have_different_digests():
    found = [digest_of(value) for value in DIFFERENT]
    assert len(set(found)) == len(DIFFERENT)
    assert found == [digest_of(value) for value in DIFFERENT]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TENSOR, TENSOR.clone().requires_grad_()),
        (TENSOR, torch.nn.Parameter(TENSOR)),
        (TENSOR.mT, TENSOR.mT.contiguous()),
        (TENSOR, TENSOR.to_sparse()),
        ((TENSOR, 1), [TENSOR, 1]),
        (object(), object()),
    ],
    ids=["gradients", "parameter", "strides", "layout", "sequences", "objects"],
)
def test_what_does_not_matter_is_left_out(one, other):
    assert digest_of(one) == digest_of(other)


def test_quantized_weights_are_digested_by_what_they_hold():
    quantization = pytest.importorskip("torchao.quantization")
    found = []
    for scale in (1.0, 1.5):
        layer = torch.nn.Sequential(torch.nn.Linear(32, 32))
        with torch.no_grad():
            layer[0].weight.copy_(scale * torch.arange(1024.0).reshape(32, 32))
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
        found.append(digest_of(layer[0].weight))
    assert found[0] != found[1]
