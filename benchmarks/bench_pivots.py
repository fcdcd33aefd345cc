"""How long layers with pivots take: beside plain pairs of factors of the same FLOPs, eager and compiled by inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import timm
import torch
from timing import Measure
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50

import balf_fx

Compiler = Literal["eager", "inductor"]
Models = tuple[str, dict[str, nn.Module]]
ROUNDS = {1: 30, 16: 10}
FLOPS = (0.8, 0.6)
SHAPES: dict[str, Callable[[], nn.Module]] = {
    "ViT-Tiny": lambda: timm.create_model("vit_tiny_patch16_224"),
    "MobileNetV2": mobilenet_v2,
    "ResNet-50": resnet50,
}
"""Times depend on shapes, not on weights, so these are random."""


@pytest.fixture(scope="module", params=[(name, flops) for name in SHAPES for flops in FLOPS], ids=str)
def models(request: pytest.FixtureRequest) -> Models:
    """A model with the same share of every layer's FLOPs kept, with and without pivots."""
    torch.compiler.reset()
    name, flops = request.param
    torch.manual_seed(0)
    dense = SHAPES[name]().eval()
    batches = [_images(8)]
    small = {
        pivot: balf_fx.compile(
            dense, batches, flops=flops, effort="fast", allocation="uniform", pivot=pivot, progress=False
        )
        for pivot in (True, False)
    }
    return f"{name} at {flops:g}", {"dense": dense, "pivots": small[True], "pairs": small[False]}


def _images(count: int) -> Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("count", list(ROUNDS))
def test_pivots(models: Models, count: int, compiler: Compiler, measure: Measure) -> None:
    """The model with pivots in turn with plain pairs, and with the dense one."""
    name, found = models
    compiled = {own: torch.compile(model) if compiler == "inductor" else model for own, model in found.items()}
    images = _images(count)
    tasks = {own: lambda model=model: model(images) for own, model in compiled.items()}
    own = tasks.pop("pivots")
    measure(f"pivots, {name}, {count} images, {compiler}", own, ROUNDS[count], tasks, warmup=2)
