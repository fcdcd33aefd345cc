"""ImageNet and two models of timm's: ViT-Tiny/16 and MobileNetV2.

The folder of data holds imagenet_val1300.npz, 1,300 validation images to judge by, imagenet_train1000.npz, one training
image of each class to calibrate with, and the weights vit_tiny.pth (`vit_tiny_patch16_224.augreg_in21k_ft_in1k`) and
mobilenetv2.pth (TensorFlow's, for `mobilenetv2_100` with padding "same"; its BatchNorms were folded before). An archive
has the arrays `jpeg` (all files one after the other), `offset` (where each begins, and the end) and `label`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from task import Images, Source, Task, random_sample
from torch import Tensor, nn

BATCH_SIZE = 32
CALIBRATION_IMAGES = 512
SIZE = 224
_HALF = (0.5, 0.5, 0.5)


VIT_TINY_BUDGETS = (0.914, 0.828, 0.743, 0.6, 0.5)
MOBILENETV2_BUDGETS = (0.883, 0.799, 0.7, 0.6, 0.5)
"""The shares that BALF's reference implementation turned out to keep, and smaller ones."""


def load_vit_tiny(source: Source) -> Task:
    """ViT-Tiny/16; see `_task`."""
    model = source.load_weights(_create("vit_tiny_patch16_224"), "vit_tiny.pth")
    return _task(source, "ViT-Tiny/16, ImageNet", model, VIT_TINY_BUDGETS)


def load_mobilenetv2(source: Source) -> Task:
    """MobileNetV2; see `_task`."""
    model = source.load_weights(_create("mobilenetv2_100", pad_type="same"), "mobilenetv2.pth")
    return _task(source, "MobileNetV2, ImageNet", model, MOBILENETV2_BUDGETS)


def _create(name: str, **options: Any) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise click.ClickException(f"{name} comes from timm: pip install timm") from error
    model: nn.Module = timm.create_model(name, **options)
    return model


def _task(source: Source, title: str, model: nn.Module, budgets: Sequence[float]) -> Task:
    """Calibrated on the first training images of a random permutation, which depends on the seed.

    Raises:
        click.ClickException: something is missing; says what to pass.
    """
    training = source.file("imagenet_train1000.npz")
    count = source.images or CALIBRATION_IMAGES
    with np.load(training) as arrays:
        chosen = random_sample(count, len(arrays["label"]), source.seed).tolist()
    return Task(
        title=title,
        model=model,
        calibration=read_images(training, chosen).inputs(),
        samples=count,
        evaluation=read_images(source.file("imagenet_val1300.npz"), slice(source.evaluate)),
        metric="top1",
        measure="flops",
        budgets=budgets,
    )


def read_images(path: Path, chosen: Sequence[int] | slice) -> Images:
    """Some images of an archive, cut to their centre."""
    with np.load(path) as arrays:
        raw, offsets, labels = arrays["jpeg"].tobytes(), arrays["offset"], arrays["label"]
    indices = np.arange(len(labels))[chosen]
    pixels = torch.stack([_decode(raw[offsets[i] : offsets[i + 1]]) for i in indices])
    return Images(pixels, torch.from_numpy(labels[indices]).long(), _HALF, _HALF, BATCH_SIZE)


def _decode(jpeg: bytes) -> Tensor:
    """uint8 [3, SIZE, SIZE]."""
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    top, left = ((extent - SIZE) // 2 for extent in pixels.shape[:2])
    return torch.from_numpy(pixels[top : top + SIZE, left : left + SIZE].transpose(2, 0, 1).copy())
