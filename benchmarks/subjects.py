"""The small models of the timings, each with its calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cifar
import imagenet
import torch
from task import Source
from torch import Tensor, nn
from torchvision.models import resnet18

FLOPS = 0.55


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and batches of images [N, 3, H, W]; `batch`, a part of the first, is for latency."""

    model: nn.Module
    calibration: Sequence[Tensor]
    batch: Tensor


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


SUBJECTS: Mapping[str, Callable[[], Subject]] = {
    "ResNet-20": _resnet20,
    "ResNet-18": _resnet18,
    "ViT-Tiny": _vit_tiny,
}
"""Makes each; raises click.ClickException where its data are missing."""
