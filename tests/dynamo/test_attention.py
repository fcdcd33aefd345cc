"""Fused attention, and models of other libraries."""

from __future__ import annotations

import pytest
import torch
from dynamo.helpers import STEPS, compiled, make_offline, options, ranks
from torch import nn

import balf_fx
from balf_fx.backend import balf


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_with_and_without_their_fast_path(tokens, fast_path, norm_first):
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    offline = make_offline(model, tokens[:STEPS], flops=0.6)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        small = compiled(model, flops=0.6)
        with torch.no_grad():
            for batch in tokens[:STEPS]:
                torch.testing.assert_close(small(batch), model(batch))
            torch.testing.assert_close(small(tokens[3]), offline(tokens[3]), rtol=1e-4, atol=1e-4)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert list(ranks(balf_fx.report(small)).values()) == list(ranks(balf_fx.report(offline)).values())


@pytest.mark.parametrize("average", [True, False])
def test_attention_weights_of_the_fast_path(tokens, average):
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    small = torch.compile(
        lambda x: model(x, x, x, average_attn_weights=average), backend=balf, options=options(flops=0.9)
    )
    with torch.no_grad():
        for batch in tokens[:STEPS]:
            torch.testing.assert_close(small(batch), model(batch, batch, batch, average_attn_weights=average))
        small(tokens[3])
    assert len(balf_fx.report(small).sites) == 2


def test_cross_attention_stays_as_it_is(tokens):
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    small = torch.compile(lambda x, y: model(x, y, y)[0], backend=balf, options=options(strict=False))
    with torch.no_grad():
        for batch in tokens:
            torch.testing.assert_close(small(batch, tokens[0]), model(batch, tokens[0], tokens[0])[0])


def test_a_hugging_face_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(100, (2, 12))
    small = compiled(model)
    with torch.no_grad():
        for _ in range(STEPS):
            assert torch.equal(small(ids).last_hidden_state, model(ids).last_hidden_state)
        output = small(ids).last_hidden_state
        assert not torch.equal(output, model(ids).last_hidden_state)
    report = balf_fx.report(small)
    assert report.flops_kept <= 0.5
    assert "encoder.layer.0.attention.self.query" in ranks(report)


def test_a_timm_model():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=10
    ).eval()
    batch = torch.randn(2, 3, 32, 32)
    small = compiled(model)
    with torch.no_grad():
        for _ in range(STEPS):
            assert torch.equal(small(batch), model(batch))
        small(batch)
    assert balf_fx.report(small).flops_kept <= 0.5
