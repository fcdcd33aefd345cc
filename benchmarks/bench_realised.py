"""How much of what a budget promises is real: (dense time / compressed time) x share of the FLOPs that is kept.

python -m pytest benchmarks/bench_realised.py -k "MobileNetV2 and 16"
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytest
import timm
import torch
import torchvision.models as vision
from timing import Measure
from torch import Tensor, nn

import balf_fx

Compiler = Literal["eager", "inductor"]
Case = tuple[str, nn.Module]
ROUNDS = {1: 20, 16: 8}
SHARE = 0.5
MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "MobileNetV2": vision.mobilenet_v2,
    "SqueezeNet": vision.squeezenet1_1,
    "ResNet-18": vision.resnet18,
    "ResNet-50": vision.resnet50,
    "ResNeXt-50": vision.resnext50_32x4d,
    "ViT-Tiny": functools.partial(timm.create_model, "vit_tiny_patch16_224"),
    "ViT-B/16": vision.vit_b_16,
    "Swin-T": vision.swin_t,
}
"""Times depend on shapes, not on weights, so these are random."""
BUDGETS: Mapping[str, Mapping[str, Any]] = {
    "flops": {"flops": SHARE},
    "flops, auto": {"flops": SHARE, "multiple_of": "auto"},
    "latency": {"latency": SHARE, "strict": False},
}


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest) -> Case:
    """A model in evaluation mode."""
    torch.compiler.reset()
    torch.manual_seed(0)
    return request.param, MODELS[request.param]().eval()


def images(count: int) -> Tensor:
    """Random images."""
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("count", list(ROUNDS))
@pytest.mark.parametrize("budget", list(BUDGETS))
def test_realised(case: Case, budget: str, count: int, compiler: Compiler, measure: Measure, benchmark: Any) -> None:
    """The compressed model in turn with the dense one."""
    name, model = case
    batch = images(count)
    options = {"runner": compiler, **BUDGETS[budget]} if "latency" in BUDGETS[budget] else BUDGETS[budget]
    small = balf_fx.compile(model, [batch[:8], batch[-8:]], effort="balanced", progress=False, **options)
    found = {
        own: torch.compile(each) if compiler == "inductor" else each for own, each in (("", small), ("dense", model))
    }
    group = f"realised, {name}, {budget}, {count} images, {compiler}"
    measure(group, lambda: found["small"](batch), ROUNDS[count], {"dense": lambda: found["dense"](batch)}, warmup=2)
    report = balf_fx.report(small)
    benchmark.extra_info["flops_kept"] = report.flops_kept
    benchmark.extra_info["predicted"] = None if report.timing is None else report.timing.predicted
    if "ratios" in benchmark.extra_info:
        ratio = benchmark.extra_info["ratios"]["dense"]["median"]
        benchmark.extra_info["realised"] = report.flops_kept / ratio
