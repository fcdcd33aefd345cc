"""CIFAR-10 and its ResNet-20.

The folder of data holds cifar10.npz (arrays test_x, test_y, test_jpeg, calib_x, calib_y; images uint8 NHWC, those to
calibrate with from the training set) and resnet20.pth, the weights of akamaster/pytorch_resnet_cifar10 without the
prefix `module.`. In place of the former, the root of torchvision's CIFAR10 will do.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from task import Images, Source, Task
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import datasets

BATCH_SIZE = 128
CALIBRATION_IMAGES = 1024
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the weights were trained with ImageNet's


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (option A of He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.added == 0:
            return x
        before = self.added // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images (He et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    blocks = (BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1), BasicBlock(outputs, outputs, 1))
    return nn.Sequential(*blocks)


def load(source: Source) -> Task:
    """ResNet-20, calibrated on training images: with seed k on the k-th run of so many, with 0 on the first.

    Raises:
        click.ClickException: something is missing; says what to pass.
    """
    model = source.load_weights(ResNet20(), "resnet20.pth")
    root = source.cifar_root
    calibration, test = _from_npz(source.file("cifar10.npz")) if root is None else _from_torchvision(root)
    count = source.images or CALIBRATION_IMAGES
    chosen = slice(source.seed * count, (source.seed + 1) * count)
    if chosen.stop > len(calibration.labels):
        raise click.ClickException(
            f"--images {count} with --seed {source.seed} is more than the {len(calibration.labels)} there are"
        )
    return Task(
        title="ResNet-20, CIFAR-10",
        model=model,
        calibration=_images(calibration.pixels[chosen], calibration.labels[chosen]).inputs(),
        samples=count,
        evaluation=_images(test.pixels[: source.evaluate], test.labels[: source.evaluate]),
        metric="top1",
        measure="flops",
        budgets=BUDGETS,
    )


def _from_npz(path: Path) -> tuple[Images, Images]:
    with np.load(path) as arrays:
        pristine = ~arrays["test_jpeg"]  # a few test images survive only as JPEG decodes, whose pixels differ
        calibration = _from_arrays(arrays["calib_x"], arrays["calib_y"])
        return calibration, _from_arrays(arrays["test_x"][pristine], arrays["test_y"][pristine])


def _from_torchvision(root: Path) -> tuple[Images, Images]:
    try:
        train, test = (datasets.CIFAR10(str(root), train=train, download=False) for train in (True, False))
    except RuntimeError as error:
        raise click.ClickException(f"--cifar-root {root} is no root of torchvision's CIFAR10: {error}") from error
    return _from_arrays(train.data, np.array(train.targets)), _from_arrays(test.data, np.array(test.targets))


def _from_arrays(pixels: np.ndarray, labels: np.ndarray) -> Images:
    return _images(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels).long())


def _images(pixels: Tensor, labels: Tensor) -> Images:
    return Images(pixels.contiguous(), labels, _MEAN, _STD, BATCH_SIZE)
