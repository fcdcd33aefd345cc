"""How long a compressed language model takes to read a prompt, and to continue it token by token with its cache.

python -m pytest benchmarks/bench_generation.py --benchmark-json=benchmarks/results/generation.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import Subject
from timing import Measure, Task
from torch import nn

import balf_fx

SHARE = 0.5
EFFORTS = ("fast", "balanced")
PROMPT, WRITTEN = 128, 32
ROUNDS = 8


@pytest.fixture(scope="module", params=EFFORTS)
def pair(request: pytest.FixtureRequest, subject: Callable[[str], Subject]) -> tuple[str, nn.Module, Any]:
    """A Llama of 100 million random weights, and a copy of it with half of the FLOPs, of the same class."""
    found = subject("Llama-100M")
    options = {"effort": request.param, "result": "module", "progress": False}
    return request.param, found.model, balf_fx.compile(found.model, found.calibration[:2], flops=SHARE, **options)


def _reading(model: Any, count: int) -> Task:
    prompt = torch.randint(model.config.vocab_size, (count, PROMPT), generator=torch.Generator().manual_seed(0))
    return lambda: model(prompt, use_cache=True)


def _writing(model: Any, count: int) -> Task:
    prompt = torch.randint(model.config.vocab_size, (count, 2), generator=torch.Generator().manual_seed(0))
    length = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False, "use_cache": True}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **length)


TASKS: dict[str, Callable[[Any, int], Task]] = {"prompt": _reading, "decoding": _writing}


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("task", list(TASKS))
def test_generation(pair: tuple[str, nn.Module, Any], task: str, count: int, measure: Measure, benchmark: Any) -> None:
    """The compressed model in turn with the dense one."""
    effort, model, small = pair
    own, dense = (TASKS[task](each, count) for each in (small, model))
    measure(f"generation, {effort}, {task}, {count} sequences", own, ROUNDS, {"dense": dense}, warmup=1)
    report = balf_fx.report(small)
    benchmark.extra_info["flops_kept"] = report.flops_kept
    benchmark.extra_info["cache"] = _cache_bytes(small) / _cache_bytes(model)


def _cache_bytes(model: Any) -> int:
    """What keys and values of a prompt take."""
    layers = _reading(model, 1)().past_key_values.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
