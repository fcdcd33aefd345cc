"""The arithmetic of multi-head attention, of its fused kernels and of encoder layers, on tensors or proxies.

Shapes. "..." is the batch dimension of batched inputs, and is empty otherwise. T is the length of the query, S the
length of the key, E the embedding size, H the number of heads and d = E / H. A graph may be traced without example
inputs, so everything here works for batched and unbatched inputs, for masks of either type and for any T, S and batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

_SELF_ATTENTION = ("in_weight", "in_bias", "out_weight", "out_bias")
KERNELS: dict[Any, tuple[str, ...]] = {
    torch._native_multi_head_attention: (
        *("query", "key", "value", "embed_dim", "num_heads", *_SELF_ATTENTION),
        *("mask", "need_weights", "average_attn_weights", "mask_type"),
    ),
    torch._transformer_encoder_layer_fwd: (
        *("query", "embed_dim", "num_heads", *_SELF_ATTENTION, "gelu", "norm_first", "eps"),
        *("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"),
        *("weight1", "bias1", "weight2", "bias2", "mask", "mask_type"),
    ),
}
"""The argument names, in order, of the fused kernels that PyTorch runs in place of modules without gradients."""


@dataclass(frozen=True)
class Attention:
    """The computation of nn.MultiheadAttention between its projections; tensors may be proxies.

    Attributes:
        batch_first: whether queries, keys and values are [..., T or S, E] rather than [T or S, ..., E].
        bias_k, bias_v: [1, 1, E], appended to the sequences of keys and values; `add_zero_attn` appends a row of zeros.
        key_padding_mask: [..., S], boolean with True where a key is masked, or a float that is added to the scores.
        attn_mask: [T, S] or [product of "..." and H, T, S], boolean or float in the same way.
        is_causal: whether to mask with a lower triangle; only without other masks and weights.
        weights: whether to return the attention weights too, averaged over the heads or not.
    """

    num_heads: int
    batch_first: bool
    bias_k: Any = None
    bias_v: Any = None
    add_zero_attn: bool = False
    key_padding_mask: Any = None
    attn_mask: Any = None
    is_causal: bool = False
    weights: bool = False
    average_attn_weights: bool = True


def attend(q: Any, k: Any, v: Any, how: Attention) -> tuple[Any, Any]:
    """The output of attention, shaped as q, and the weights, [..., T, S] or [..., H, T, S], or None."""
    sequence = -3 if how.batch_first else 0
    q, k, v = (x.unflatten(-1, (how.num_heads, -1)).movedim(sequence, -2) for x in (q, k, v))  # [..., H, T or S, d]
    added = (how.bias_k is not None) + how.add_zero_attn
    masks = []
    if how.key_padding_mask is not None:
        masks.append(_additive(how.key_padding_mask, q.dtype, added)[..., None, None, :])
    if how.attn_mask is not None:
        leading = q.shape[:-2]
        product = q.new_empty(leading).numel()  # leading.numel() would be a constant to torch.export
        masks.append(_additive(how.attn_mask, q.dtype, added).expand(product, -1, -1).unflatten(0, leading))
    if how.bias_k is not None:
        shape = q.shape[:-2] + (1, -1)  # noqa: RUF005 (a proxy cannot be unpacked)
        pairs = ((k, how.bias_k), (v, how.bias_v))
        k, v = (torch.cat([x, y.view(how.num_heads, 1, -1).expand(shape)], -2) for x, y in pairs)
    if how.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    mask = sum(masks[1:], masks[0]) if masks else None
    if how.weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        shares = (scores if mask is None else scores + mask).softmax(-1)
        output = shares @ v
        shares = shares.mean(-3) if how.average_attn_weights else shares
    else:
        output, shares = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=how.is_causal), None
    return output.movedim(-2, sequence).flatten(-2), shares


def _additive(mask: Any, dtype: Any, added: int) -> Any:
    """The mask as a tensor to add to the scores, zero for appended keys; its type is only known at run time."""
    mask = mask.to(dtype).masked_fill(mask.to(torch.bool) & (mask.dtype == torch.bool), -torch.inf)
    return F.pad(mask, (0, added)) if added else mask


def encoder_layer(arguments: Mapping[str, Any]) -> Any:
    """The output of nn.TransformerEncoderLayer in evaluation mode.

    Args:
        arguments: the arguments of `torch._transformer_encoder_layer_fwd`, by their names in `KERNELS`.
    """
    activation = F.gelu if arguments["gelu"] else F.relu

    def norm(value: Any, number: int) -> Any:
        weight, bias = (arguments[f"norm{number}_{name}"] for name in ("weight", "bias"))
        return F.layer_norm(value, (arguments["embed_dim"],), weight, bias, arguments["eps"])

    def feed_forward(value: Any) -> Any:
        hidden = activation(F.linear(value, arguments["weight1"], arguments["bias1"]))
        return F.linear(hidden, arguments["weight2"], arguments["bias2"])

    x = arguments["query"]
    if arguments["norm_first"]:
        x = x + self_attention(norm(x, 1), arguments)[0]
        return x + feed_forward(norm(x, 2))
    x = norm(x + self_attention(x, arguments)[0], 1)
    return norm(x + feed_forward(x), 2)


def self_attention(
    x: Any, arguments: Mapping[str, Any], weights: bool = False, average: bool = True
) -> tuple[Any, Any]:
    """The output of `torch._native_multi_head_attention` for one input without masks.

    Args:
        x: [..., T, E].
        arguments: weights and biases of the projections and the number of heads, by their names in `KERNELS`.
        weights, average: as in `Attention`.
    """
    q, k, v = query_key_value(F.linear(x, arguments["in_weight"], arguments["in_bias"]), -1)
    how = Attention(arguments["num_heads"], batch_first=True, weights=weights, average_attn_weights=average)
    output, shares = attend(q, k, v, how)
    return F.linear(output, arguments["out_weight"], arguments["out_bias"]), shares


def query_key_value(packed: Any, dim: int) -> tuple[Any, Any, Any]:
    """The three equal pieces of a packed projection, weight or bias along a dimension."""
    chunks = packed.chunk(3, dim)
    return chunks[0], chunks[1], chunks[2]  # a proxy cannot be unpacked
