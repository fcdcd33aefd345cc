"""CIFAR-10 and its ResNet-20: the model, its weights and the images.

Data come from a folder that holds cifar10.npz (arrays test_x, test_y, test_jpeg, calib_x, calib_y; images uint8 NHWC)
and resnet20.pth, or from a torchvision CIFAR10 root.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import datasets

BATCH_SIZE = 128
CALIBRATION_IMAGES = 1024
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


@dataclass(frozen=True)
class Images:
    """Images, uint8 NCHW, and their labels."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images with labels, in order."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        for pixels, labels in zip(self.pixels.split(BATCH_SIZE), self.labels.split(BATCH_SIZE), strict=True):
            yield (pixels / 255 - mean) / std, labels


@dataclass(frozen=True)
class Cifar:
    """The trained model, calibration images from the training set, and test images."""

    model: nn.Module
    calibration: Images
    test: Images


def default_data() -> Path:
    """The environment variable BALF_FX_DATA, else the folder shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("BALF_FX_DATA", beside))


def load(data: Path | None = None, cifar_root: Path | None = None, weights: Path | None = None) -> Cifar:
    """Load everything.

    Args:
        data: folder with cifar10.npz and resnet20.pth.
        cifar_root: in place of cifar10.npz, the root of torchvision's CIFAR10.
        weights: in place of resnet20.pth, another state dict.

    Raises:
        click.ClickException: something is missing; says what to pass.
    """
    folder = data or default_data()
    weights = weights or folder / "resnet20.pth"
    _require(weights, "the folder that holds resnet20.pth as --data or BALF_FX_DATA, or the file itself as --weights")
    calibration, test = _from_npz(folder / "cifar10.npz") if cifar_root is None else _from_torchvision(cifar_root)
    model = ResNet20()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return Cifar(model.eval(), calibration, test)


def _from_npz(path: Path) -> tuple[Images, Images]:
    _require(path, "the folder that holds cifar10.npz as --data or BALF_FX_DATA, or torchvision's as --cifar-root")
    with np.load(path) as arrays:
        pristine = ~arrays["test_jpeg"]  # a few test images survive only as JPEG decodes, whose pixels differ
        calibration = _images(arrays["calib_x"][:CALIBRATION_IMAGES], arrays["calib_y"][:CALIBRATION_IMAGES])
        return calibration, _images(arrays["test_x"][pristine], arrays["test_y"][pristine])


def _from_torchvision(root: Path) -> tuple[Images, Images]:
    try:
        train, test = (datasets.CIFAR10(str(root), train=train, download=False) for train in (True, False))
    except RuntimeError as error:
        raise click.ClickException(f"--cifar-root {root} is no root of torchvision's CIFAR10: {error}") from error
    calibration = _images(train.data[:CALIBRATION_IMAGES], np.array(train.targets[:CALIBRATION_IMAGES]))
    return calibration, _images(test.data, np.array(test.targets))


def _images(pixels: np.ndarray, labels: np.ndarray) -> Images:
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long())


def _require(path: Path, instead: str) -> None:
    if not path.is_file():
        raise click.ClickException(f"{path} does not exist: pass {instead}")
