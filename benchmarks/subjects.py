"""The models of the timings, each with its calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cifar
import imagenet
import torch
from task import Source
from torch import nn
from torchvision.models import resnet18, resnet50, vit_b_16

FLOPS = 0.55


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and batches of images [N, 3, H, W] or of a mapping with tokens [N, L].

    `batch`, a part of the first, is for latency.
    """

    model: nn.Module
    calibration: Sequence[Any]
    batch: Any

    def run(self) -> None:
        """A plain forward pass over the calibration batches."""
        with torch.no_grad():
            for batch in self.calibration:
                self.model(**batch) if isinstance(batch, Mapping) else self.model(batch)


def _resnet20() -> Subject:
    """The trained ResNet-20, 512 images of 32 x 32."""
    task = cifar.load(Source(images=512, evaluate=1))
    return Subject(task.model, task.calibration, task.calibration[0][:64])


def _resnet18() -> Subject:
    """ResNet-18 with random weights, 64 random images of 64 x 64."""
    torch.manual_seed(0)
    calibration = torch.randn(64, 3, 64, 64).split(16)
    return Subject(resnet18().eval(), calibration, calibration[0][:8])


def _vit_tiny() -> Subject:
    """The trained ViT-Tiny/16, 32 images of 224 x 224."""
    task = imagenet.load_vit_tiny(Source(images=32, evaluate=1))
    return Subject(task.model, task.calibration, task.calibration[0][:4])


def _large(make: Callable[[], nn.Module], images: int = 16) -> Subject:
    """An image classifier with random weights, and random images of 224 x 224."""
    torch.manual_seed(0)
    calibration = torch.randn(images, 3, 224, 224).split(8)
    return Subject(make().eval(), calibration, calibration[0][:4])


_SMALL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
_LARGE = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12, "num_attention_heads": 10}


def _llama(dtype: torch.dtype, words: int = 32_000, shape: Mapping[str, int] = _LARGE) -> Subject:
    """Random weights in the shape of Llama, 100 million by default, and 16 sequences of 256 random tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM  # an extra of its own

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=words, max_position_embeddings=256, use_cache=False, **shape))
    calibration = [{"input_ids": tokens} for tokens in torch.randint(words, (16, 256)).split(4)]
    return Subject(model.to(dtype).eval(), calibration, calibration[0])


SUBJECTS: Mapping[str, Callable[[], Subject]] = {
    "ResNet-20": _resnet20,
    "ResNet-18": _resnet18,
    "ViT-Tiny": _vit_tiny,
    "ResNet-50": partial(_large, resnet50),
    "ViT-B": partial(_large, vit_b_16),
    "ResNet-18, 256 images": partial(_large, resnet18, 256),
    "ResNet-50, 256 images": partial(_large, resnet50, 256),
    "ViT-B, 256 images": partial(_large, vit_b_16, 256),
    "Llama-25M": partial(_llama, torch.float32, 16_000, _SMALL),
    "Llama-100M": partial(_llama, torch.float32),
    "Llama-100M-bfloat16": partial(_llama, torch.bfloat16),
}
"""Makes each; raises click.ClickException where its data are missing."""
