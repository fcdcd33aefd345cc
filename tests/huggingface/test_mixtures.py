"""Mixtures of experts become models again: what is around the experts is compressed, the experts stay as they are."""

from __future__ import annotations

import pytest
import torch
from small_models import TINY_TEXT

import balf_fx
from balf_fx.errors import FileError
from balf_fx.graph.site import Reason

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe")

SIZES = {**TINY_TEXT, "num_key_value_heads": 2, "num_experts_per_tok": 2, "initializer_range": 0.2}
SIZES |= {"pad_token_id": 0, "eos_token_id": None}
SMALL = {"moe_intermediate_size": 24, "num_experts": 4}
MODELS = {
    "Olmoe": {"num_experts": 4},
    "Phimoe": {"num_local_experts": 4},
    "Qwen2Moe": {**SMALL, "shared_expert_intermediate_size": 40},
    "Qwen3Moe": {**SMALL, "head_dim": 8},
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_mixture_is_compressed_around_its_experts(name, monkeypatch, tmp_path):
    graphs, check = [], balf_fx.api.check_same
    monkeypatch.setattr(balf_fx.api, "check_same", lambda *args: (graphs.append(args[1]), check(*args)))
    kind = getattr(transformers, f"{name}ForCausalLM")
    model = kind(kind.config_class(**{**SIZES, **MODELS[name]})).eval()
    tokens = torch.randint(1, TINY_TEXT["vocab_size"], (16, 8))
    options = {"flops": 0.85, "effort": "fast", "progress": False}
    small = balf_fx.compile(model, [{"input_ids": tokens}], result="module", **options)
    assert type(small) is kind
    assert balf_fx.report(small).flops_kept <= 0.85
    fixed = {refusal.name.rpartition(".")[2] for refusal, _ in balf_fx.plan(small).refusals}
    assert {"gate_up_proj", "down_proj"} <= fixed
    assert any(refusal.reason is Reason.FIXED for refusal, _ in balf_fx.plan(small).refusals)
    other, state = tokens[:3].flip(0, 1), small.state_dict()
    want = small(other).logits
    torch.testing.assert_close(want, graphs[0](input_ids=other, use_cache=False).logits, rtol=1e-5, atol=1e-6)
    experts = {key: value for key, value in model.state_dict().items() if ".experts." in key}
    assert experts
    assert all(torch.equal(state[key], value) for key, value in experts.items())

    greedy = {"attention_mask": torch.ones_like(other), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(small.generate(other, **greedy), small.generate(other, use_cache=False, **greedy))
    small.save_pretrained(tmp_path)  # in the form of earlier versions, in which each expert has tensors of its own
    assert torch.equal(kind.from_pretrained(tmp_path)(other).logits, want)
    change_an_expert(tmp_path / "model.safetensors")
    with pytest.raises(FileError, match=r"checksum of .*experts"):
        kind.from_pretrained(tmp_path)


def change_an_expert(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = next(name for name in tensors if ".experts." in name)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, {"format": "pt"})
