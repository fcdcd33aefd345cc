import array
import functools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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


ARRAY = np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "values",
    [
        (ARRAY, ARRAY + 1, ARRAY.T, ARRAY.astype("f4"), ARRAY.reshape(3, 2)),
        (np.array(["a", None], object), np.array(["b", None], object)),
        (np.array("2020-01-01", "M8[D]"), np.array("2020-01-02", "M8[D]")),
        (np.float32(1), np.float32(2)),
        (array.array("f", [1, 2]), array.array("f", [1, 3]), array.array("i", [1, 2])),
        (bytearray(b"a"), bytearray(b"b")),
        ({"a"}, {"b"}, {"a", "b"}),
    ],
    ids=["numbers", "objects", "dates", "scalars", "array", "bytes", "sets"],
)
def test_arrays_and_other_buffers_count_with_their_contents(values):
    found = [digest_of({"x": value}) for value in values]
    assert len(set(found)) == len(values)
    assert found == [digest_of({"x": value.copy() if hasattr(value, "copy") else value[:]}) for value in values]


def test_images_count_with_their_pixels():
    images = pytest.importorskip("PIL.Image")
    black, white = images.new("L", (4, 4)), images.new("L", (4, 4), 255)
    assert digest_of(black) == digest_of(black.copy()) != digest_of(white)


def scaled(factor):
    def loss(output, batch):
        return factor * output.sum()

    return loss


def recursive(stop):
    def loss(output, batch):
        return output if batch == stop else loss(output, batch + 1)

    return loss


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, output, batch):
        return self.factor * output.sum()


class Squared(torch.nn.Module):
    def forward(self, output, batch):
        return output.square().sum()


class Cubed(torch.nn.Module):
    def forward(self, output, batch):
        return output.pow(3).sum()


def enclosing(function):
    return lambda output, batch: function(output)


def test_functions_count_with_what_they_do():
    weighted = torch.nn.CrossEntropyLoss(torch.tensor([1.0, 2.0]))
    functions = [
        scaled(1),
        scaled(9),
        lambda output, batch: output.sum() * 2,
        lambda output, batch: output.sum() * 3,
        lambda output, batch: output.mean() * 3,
        lambda output, batch, scale=2: output.sum() * scale,
        lambda output, batch, scale=3: output.sum() * scale,
        lambda output, batch: [each + 1 for each in output],
        lambda output, batch: [each + 2 for each in output],
        recursive(1),
        recursive(2),
        functools.partial(scaled(1), batch=1),
        functools.partial(scaled(1), batch=2),
        torch.nn.CrossEntropyLoss(),
        torch.nn.CrossEntropyLoss(label_smoothing=0.1),
        weighted,
        torch.nn.CrossEntropyLoss(torch.tensor([1.0, 3.0])),
        weighted.extra_repr,
        Scaled(1),
        Scaled(9),
        Squared(),
        Cubed(),
        *map(enclosing, (torch.sum, torch.mean, Squared, Cubed, Scaled(1), torch.relu)),
        torch.nn.Sequential(weighted, torch.nn.ReLU()),
        torch.nn.Sequential(weighted, torch.nn.GELU()),
    ]
    found = [digest_of(function) for function in functions]
    assert len(set(found)) == len(functions)
    assert found[:2] == [digest_of(scaled(1)), digest_of(scaled(9))]
    assert found[9] == digest_of(recursive(1))
    assert digest_of(torch.nn.Linear(2, 2, device="meta")) == digest_of(torch.nn.Linear(2, 2, device="meta"))


def test_digests_of_functions_are_the_same_in_each_process():
    """Strings have other hashes there, and so sets another order; and objects are elsewhere."""
    script = """
from balf_fx.checkpoint.digests import digest_of
def make(held):
    return lambda output, batch: held if batch in {"a", "b", "c", "d"} else None
print(digest_of(make([object(), {"x", "y", "z"}])))
"""
    root = str(Path(__file__).parents[2])
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


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
