"""How much of what a budget promises is real: (dense time / compressed time) x share of the FLOPs that is kept.

python -m pytest benchmarks/bench_realised.py -k "MobileNetV2 and 16"
python -m pytest benchmarks/bench_realised.py -k int8 --images 16
python -m pytest benchmarks/bench_realised.py --device cuda --dtype bfloat16 --images 1 --images 32 --images 256
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytest
import timm
import torch
import torchvision.models as vision
from quantization import pt2e
from timing import Measure
from torch import Tensor, fx, nn
from torch._inductor import config as inductor

import balf_fx

Compiler = Literal["eager", "inductor"]
Case = tuple[str, nn.Module]
Compress = Callable[[int, str, Compiler | None], fx.GraphModule]
ROUNDS = {1: 20, 16: 8}
MORE_ROUNDS = 30  # on an accelerator, where they are short
SHARE = 0.5
MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "MobileNetV2": vision.mobilenet_v2,
    "SqueezeNet": vision.squeezenet1_1,
    "ResNet-18": functools.partial(timm.create_model, "resnet18"),  # PT2E fails where one ReLU is called twice
    "ResNet-50": functools.partial(timm.create_model, "resnet50"),
    "ResNeXt-50": vision.resnext50_32x4d,
    "ViT-Tiny": functools.partial(timm.create_model, "vit_tiny_patch16_224"),
    "ViT-B/16": vision.vit_b_16,
    "Swin-T": vision.swin_t,
}
"""Times depend on shapes, not on weights, so these are random."""
QUANTIZED = ("MobileNetV2", "SqueezeNet", "ResNet-18", "ResNet-50", "ViT-Tiny")
BUDGETS: Mapping[str, Mapping[str, Any]] = {
    "flops": {"flops": SHARE},
    "flops, auto": {"flops": SHARE, "multiple_of": "auto"},
    "latency": {"latency": SHARE, "strict": False},
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The numbers of images that were asked for."""
    if "count" in metafunc.fixturenames:
        metafunc.parametrize("count", metafunc.config.getoption("--images") or list(ROUNDS))


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest) -> Case:
    """A model in evaluation mode, features last on an accelerator, where its convolutions are made for that."""
    torch.compiler.reset()
    torch.manual_seed(0)
    own = getattr(torch, request.config.getoption("--dtype"))
    model = MODELS[request.param]().eval().to(request.config.getoption("--device"), own)
    return request.param, model.to(memory_format=_layout(model))


def _layout(model: nn.Module) -> torch.memory_format:
    on_cpu = next(model.parameters()).device.type == "cpu"
    return torch.contiguous_format if on_cpu else torch.channels_last


def images(count: int, model: nn.Module) -> Tensor:
    """Random images where the model is, in its type and layout."""
    like = next(model.parameters())
    found = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(count))
    return found.to(like).contiguous(memory_format=_layout(model))


@pytest.fixture(scope="module")
def compressed(case: Case) -> Compress:
    """Compresses the model; once for both compilers, unless the budget is one of time."""

    @functools.lru_cache(maxsize=1)
    def compress(count: int, budget: str, runner: Compiler | None) -> fx.GraphModule:
        batch, options = images(count, case[1]), dict(BUDGETS[budget], **({"runner": runner} if runner else {}))
        return balf_fx.compile(case[1], [batch[:8], batch[-8:]], effort="balanced", progress=False, **options)

    return compress


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("budget", list(BUDGETS))
def test_realised(
    case: Case, compressed: Compress, budget: str, count: int, compiler: Compiler, measure: Measure, benchmark: Any
) -> None:
    """The compressed model in turn with the dense one."""
    name, model = case
    batch = images(count, model)
    small = compressed(count, budget, compiler if "latency" in BUDGETS[budget] else None)
    own, dense = (torch.compile(each) if compiler == "inductor" else each for each in (small, model))
    group = f"realised, {name}, {budget}, {count} images, {compiler}"
    rounds = ROUNDS.get(count, MORE_ROUNDS)
    measure(group, lambda: own(batch), rounds, {"dense": lambda: dense(batch)}, warmup=2)
    report = balf_fx.report(small)
    benchmark.extra_info["flops_kept"] = report.flops_kept
    if report.timing is not None:
        benchmark.extra_info["predicted"] = report.timing.predicted
        benchmark.extra_info["in_sites"] = report.timing.in_sites
    if "ratios" in benchmark.extra_info:
        ratio = benchmark.extra_info["ratios"]["dense"]["median"]
        benchmark.extra_info["realised"] = report.flops_kept / ratio


@pytest.mark.parametrize("pivot", [False, True], ids=["pairs", "pivots"])
@pytest.mark.parametrize("case", QUANTIZED, indirect=True)
def test_int8(case: Case, pivot: bool, count: int, measure: Measure, benchmark: Any) -> None:
    """The compressed model with 8 bits in turn with either alone, and with neither; weights are frozen in all."""
    name, model = case
    linear = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    if name == "ViT-Tiny" and not linear:
        pytest.skip("oneDNN has only reference code for int8 products of matrices on this processor")
    batch = images(count, model)
    options: dict[str, Any] = {"flops": SHARE, "multiple_of": "auto", "effort": "balanced", "pivot": pivot}
    small = balf_fx.compile(model, [batch[:8], batch[-8:]], progress=False, **options)
    eight_bits = functools.partial(pt2e, calibration=[batch], linear=linear)
    models = {"dense": model, "dense, int8": eight_bits(model), "compressed": small}
    own, *rivals = (torch.compile(each) for each in (eight_bits(small), *models.values()))
    tasks = {key: functools.partial(rival, batch) for key, rival in zip(models, rivals, strict=True)}
    group = f"int8, {name}, {'pivots' if pivot else 'pairs'}, {count} images"
    with inductor.patch(freezing=True):  # as an option of `torch.compile`, dynamo does not see it
        measure(group, lambda: own(batch), ROUNDS[count], tasks, warmup=2)
    benchmark.extra_info["flops_kept"] = balf_fx.report(small).flops_kept
