import pytest
import torch
from torch import nn

from balf_fx.graph.attention import KERNELS, Attention, attend, encoder_layer, self_attention


def recorded(kernel, monkeypatch, module, x):
    """What a module gives its kernel, by name, and what that returns."""
    calls = []
    original = getattr(torch, kernel)

    def spy(*args):
        calls.append((dict(zip(KERNELS[original], args, strict=False)), original(*args)))
        return calls[-1][1]

    with monkeypatch.context() as context, torch.no_grad():
        context.setattr(torch, kernel, spy)
        module(x)
    (call,) = calls
    return call


@pytest.mark.parametrize("average", [True, False])
def test_attention_is_what_the_module_computes(average):
    module = nn.MultiheadAttention(12, 3, bias=False, batch_first=True).double().eval()
    query, memory = (torch.randn(2, length, 12, dtype=torch.float64) for length in (4, 5))
    mask, hidden = torch.rand(4, 5) < 0.3, torch.rand(2, 5) < 0.3
    mask[:, 0], hidden[:, 0] = False, False
    wanted = module(query, memory, memory, hidden, True, mask, average)
    q, k, v = (x @ w.mT for x, w in zip((query, memory, memory), module.in_proj_weight.chunk(3), strict=True))
    options = {"key_padding_mask": hidden, "attn_mask": mask, "weights": True, "average_attn_weights": average}
    output, weights = attend(q, k, v, Attention(3, True, **options))
    torch.testing.assert_close(module.out_proj(output), wanted[0])
    torch.testing.assert_close(weights, wanted[1])


def test_self_attention_is_what_the_kernel_computes(monkeypatch):
    module = nn.MultiheadAttention(12, 2, batch_first=True).eval().requires_grad_(False)
    nn.init.normal_(module.in_proj_bias)
    x = torch.randn(2, 5, 12)
    arguments, wanted = recorded("_native_multi_head_attention", monkeypatch, lambda y: module(y, y, y), x)
    found = self_attention(x, arguments, weights=True, average=arguments["average_attn_weights"])
    torch.testing.assert_close(found, tuple(wanted))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_layer_is_what_the_kernel_computes(norm_first, activation, monkeypatch):
    options = {"activation": activation, "norm_first": norm_first, "batch_first": True}
    layer = nn.TransformerEncoderLayer(12, 2, 16, **options).eval().requires_grad_(False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    arguments, wanted = recorded("_transformer_encoder_layer_fwd", monkeypatch, layer, torch.randn(2, 5, 12))
    torch.testing.assert_close(encoder_layer(arguments), wanted, rtol=1e-4, atol=1e-5)
