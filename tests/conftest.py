"""Small models and the folder of real data that several test files use."""

from __future__ import annotations

import importlib
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data_folder() -> Path:
    folder = Path(os.environ.get("BALF_FX_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "resnet20.pth").exists():
        pytest.skip("the trained ResNet-20 is not there: set BALF_FX_DATA to the folder that holds it")
    return folder


@pytest.fixture
def benchmark(monkeypatch):
    """Import a benchmark as Python does when it is run as a script."""
    for module in ("click", "numpy", "timm", "torchvision"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def load_task(benchmark, data_folder):
    """Load one of the trained models that benchmarks compress, where its files are there."""
    click, models = benchmark("click"), benchmark("models")

    def load(name, **source):
        try:
            return models.load(name, data=data_folder, **source)
        except click.ClickException as error:
            if "does not exist" in error.message:
                pytest.skip(error.message)
            raise

    return load


def randomise_batchnorm(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters as training leaves them, unlike the identity that they start as."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


TINY_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
"""Options of most configurations in transformers."""


class ConvNet(nn.Module):
    """Convolutions with BatchNorm, a residual connection, a depthwise layer and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.block = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2),
        )
        self.shortcut = nn.Conv2d(width, 2 * width, 1, stride=2)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.block(x) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def conv_net() -> nn.Module:
    return randomise_batchnorm(ConvNet()).eval()


@pytest.fixture
def images() -> list[torch.Tensor]:
    return list(torch.randn(4, 8, 3, 12, 12))


@pytest.fixture
def bottleneck():
    """The depthwise layer is no site, but as wide as the layers around it."""
    layers = {
        "expand": nn.Conv2d(3, 64, 1),
        "relu": nn.ReLU(),
        "depthwise": nn.Conv2d(64, 64, 3, padding=1, groups=64),
        "project": nn.Conv2d(64, 32, 1),
    }
    return nn.Sequential(OrderedDict(layers)).eval()
