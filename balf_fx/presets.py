"""Published methods as keyword arguments of `balf_fx.compile`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

BALF: Mapping[str, object] = MappingProxyType(
    {
        "fold_batchnorm": False,
        "factors": "activations",
        "centred": False,
        "split": False,
        "pivot": False,
        "separable": False,
        "temperature": False,
        "allocation": "budget",
    }
)
"""BALF as published (arXiv 2509.25136): activation-aware factors from uncentred second moments, BatchNorm not folded,
energies normalised per layer, fused projections not split, every linear and convolution layer a candidate, and one
Lagrangian budget for all of them.

    balf_fx.compile(model, batches, flops=0.55, **balf_fx.BALF)
"""


AIR: Mapping[str, object] = MappingProxyType(
    {
        "fold_batchnorm": False,
        "factors": "air",
        "centred": False,
        "split": False,
        "pivot": False,
        "separable": False,
        "temperature": False,
        "allocation": "uniform",
    }
)
"""AIR as published (arXiv 2606.19993): factors whose error is weighted by the influence of each weight, |dL/dW * W|,
from uncentred second moments, with the same share of every layer kept. Several components are solved for at a time
(`passes.Refine`). The paper uses the task's loss, which needs labels:

    balf_fx.compile(model, batches, flops=0.55, loss=loss, **balf_fx.AIR)
"""
