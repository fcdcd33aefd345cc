"""Models that only became narrower are written as stock transformers builds them, where a configuration can say so."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from small_models import TINY_TEXT
from torch import nn

import balf_fx
from balf_fx.huggingface.stock import missing_biases

transformers = pytest.importorskip("transformers")

OPTIONS = {**TINY_TEXT, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": None}


def build(name):
    kind = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(0)
    return kind(kind.config_class(**OPTIONS)).eval()


@pytest.fixture
def tokens():
    return torch.randint(1, OPTIONS["vocab_size"], (16, 8))


@pytest.mark.parametrize(("name", "is_stock"), [("Llama", True), ("GPTNeoX", True), ("Qwen2", False)])
def test_narrower_layers(name, is_stock, tokens, tmp_path):
    model = build(name)
    before = model.config.to_dict()
    options = {"params": 0.8, "effort": "balanced", "dense": ["*"], "include": ["*mlp*"], "progress": False}
    small = balf_fx.compile(model, [{"input_ids": tokens}], result="module", **options)
    assert model.config.to_dict() == before
    (width,) = balf_fx.plan(small).widths
    assert width.is_narrower
    assert small.config.intermediate_size == (width.size if is_stock else width.features)
    small.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert ("quantization_config" not in written) == is_stock
    again = type(small).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, small(tokens).logits)
    assert all(balf_fx.__name__ not in type(module).__module__ for module in again.modules())
    extra = {name for name, _ in again.named_parameters()} - {name for name, _ in small.named_parameters()}
    assert all(name.endswith(("gate_proj.bias", "up_proj.bias")) for name in extra)
    assert bool(extra) == (name == "Llama")
    assert not any(again.state_dict()[name].any() for name in extra)
    if not is_stock:
        return
    small.get_submodule(width.layers[0]).weight.data.zero_()  # what becomes of the model later is written, too
    small.save_pretrained(tmp_path / "later")
    assert not type(small).from_pretrained(tmp_path / "later").get_submodule(width.layers[0]).weight.any()
    small.set_submodule(width.layers[0], nn.Identity())
    small.save_pretrained(tmp_path / "other")
    assert "quantization_config" in json.loads((tmp_path / "other" / "config.json").read_text())


def test_what_a_configuration_builds():
    model = build("Llama")
    assert missing_biases(model, model.config) == {}
    found = missing_biases(model, changed(model, mlp_bias=True))
    assert set(found) == {f"model.layers.0.mlp.{name}_proj.bias" for name in ("gate", "up", "down")}
    assert not any(each.any() for each in found.values())
    assert missing_biases(model, changed(model, intermediate_size=63)) is None
    assert missing_biases(model, changed(model, num_hidden_layers=2)) is None
    model.lm_head = nn.Sequential(model.lm_head)
    assert missing_biases(model, model.config) is None


def changed(model, **fields):
    config = copy.deepcopy(model.config)
    config.update(fields)
    return config
