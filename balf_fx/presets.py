"""Published methods as keyword arguments of `balf_fx.compile`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

BALF: Mapping[str, object] = MappingProxyType(
    {"fold_batchnorm": False, "factors": "activations", "centred": False, "split": False, "allocation": "budget"}
)
"""BALF as published (arXiv 2509.25136): activation-aware factors from uncentred second moments, BatchNorm left alone,
energies normalised per layer, fused projections as one, every linear and convolution layer a candidate, one
Lagrangian budget over all.

    balf_fx.compile(model, batches, flops=0.55, **balf_fx.BALF)
"""


AIR: Mapping[str, object] = MappingProxyType(
    {"fold_batchnorm": False, "factors": "air", "centred": False, "split": False, "allocation": "uniform"}
)
"""AIR as published (arXiv 2606.19993): factors whose error counts by the influence of each weight, |dL/dW * W|, from
uncentred second moments, the same share of every layer. The loss is the task's own there, which takes labels:

    balf_fx.compile(model, batches, flops=0.55, loss=loss, **balf_fx.AIR)
"""
