"""Sequences of any length: for calibration, in whole sequences, and token by token."""

from __future__ import annotations

import pytest
import torch
from small_models import TINY_TEXT

import balf_fx

transformers = pytest.importorskip("transformers")

LENGTH = 1000
OPTIONS = {**TINY_TEXT, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": None}
OPTIONS |= {"max_position_embeddings": 1024}


def tokens(count, length):
    return torch.randint(1, OPTIONS["vocab_size"], (count, length))


@pytest.fixture(scope="module")
def small():
    """Calibrated on batches of several lengths, some with padding, and on one that is too long for the memory."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**OPTIONS)).eval()
    batches = [{"input_ids": tokens(count, length)} for count, length in ((8, 6), (4, 33), (1, LENGTH))]
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batches[0]["attention_mask"][:3, :2] = 0
    batches[1]["attention_mask"][1:, 20:] = 0
    options = {"params": 0.85, "effort": "balanced", "memory": "1M", "progress": False}
    return balf_fx.compile(model, batches, result="module", **options)


@torch.no_grad()
def test_every_length_up_to_a_thousand(small):
    assert balf_fx.plan(small).params_kept <= 0.85
    given = tokens(2, LENGTH)
    whole = small(given).logits
    for length in (1, 2, 3, 5, 8, 33, 100, 999):
        torch.testing.assert_close(small(given[:, :length]).logits, whole[:, :length], rtol=1e-3, atol=1e-3)
    cache, steps = None, []
    for part in given.split([*[1] * 40, 3, 57, 400, 500], 1):  # once there are some, as many as one likes
        output = small(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [1, 2, 500, LENGTH])
def test_generation_after_any_length(length, small):
    given = tokens(1, length)
    greedy = {"attention_mask": torch.ones_like(given), "max_new_tokens": 2, "do_sample": False}
    assert torch.equal(small.generate(given, **greedy), small.generate(given, use_cache=False, **greedy))
