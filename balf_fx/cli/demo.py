"""A demo of a few seconds: train a small convolutional net on handwritten digits, compress it, and measure both.

Needs scikit-learn for the images: `pip install "balf-fx[cli]"`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from balf_fx.api import compile
from balf_fx.errors import BalfError
from balf_fx.graph.flops import count_flops
from balf_fx.graph.parameters import count_parameters

_TRAIN, _CALIBRATION = 1200, 256


_BATCH = 64
_WIDTHS = ((1, 128, 1), (128, 128, 1), (128, 128, 2), (128, 128, 1))  # in, out, stride


_LATENCY_BATCH, _LATENCY_ROUNDS = 64, 25


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] in [0, 1] and labels; calibration images are training images."""

    train: Tensor
    train_labels: Tensor
    calibration: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Figures:
    """Accuracy and cost of a model: top-1 in percent, FLOPs of one image, milliseconds for a batch."""

    top1: float
    flops: int
    params: int
    latency_ms: float


@dataclass(frozen=True)
class Demo:
    """The net before and after compression to the fraction `budget` of its FLOPs, on `test_images` images."""

    budget: float
    test_images: int
    latency_batch: int
    dense: Figures
    compressed: Figures

    @property
    def flops_kept(self) -> float:
        """The share of FLOPs that compression keeps."""
        return self.compressed.flops / self.dense.flops

    def to_json(self) -> str:
        """The results as JSON."""
        return json.dumps({**asdict(self), "flops_kept": self.flops_kept}, indent=2)

    def __str__(self) -> str:
        before, after = self.dense, self.compressed
        rows = [
            (f"top-1 on {self.test_images} digits", f"{before.top1:.2f} %", f"{after.top1:.2f} %", ""),
            ("FLOPs per image", f"{before.flops:,}", f"{after.flops:,}", f"x {self.flops_kept:.3f}"),
            ("parameters", f"{before.params:,}", f"{after.params:,}", f"x {after.params / before.params:.3f}"),
            (
                f"latency, batch of {self.latency_batch}",
                f"{before.latency_ms:.1f} ms",
                f"{after.latency_ms:.1f} ms",
                f"x {after.latency_ms / before.latency_ms:.3f}",
            ),
        ]
        headers = ("", "dense", "compressed", "")
        return tabulate(rows, headers, disable_numparse=True, colalign=("left", "right", "right", "right"))


def run_demo(flops: float = 0.55, *, seed: int = 0, epochs: int = 5, progress: bool = False) -> Demo:
    """Train, compress, measure.

    Args:
        flops: the fraction of FLOPs to keep.
        seed: the seed of the split, the initial weights and the order of training; the caller's random state is
            restored.
        epochs: the number of training epochs.
        progress: show progress bars on stderr.

    Raises:
        BalfError: scikit-learn is missing, or the budget cannot be reached.
    """
    digits = load_digits(seed)
    dense = train_net(digits, seed, epochs, progress)
    compressed = compile(dense, torch.split(digits.calibration, _BATCH), flops=flops, progress=progress)
    latencies = latencies_ms([dense, compressed], digits.train[:_LATENCY_BATCH])
    before, after = (
        Figures(
            100 * accuracy(model, digits.test, digits.test_labels),
            count_flops(model, digits.test[:1]),
            count_parameters(model),
            latency,
        )
        for model, latency in zip((dense, compressed), latencies, strict=True)
    )
    return Demo(flops, len(digits.test), _LATENCY_BATCH, before, after)


def load_digits(seed: int = 0) -> Digits:
    """Load scikit-learn's 1,797 handwritten digits, shuffled and split.

    Raises:
        BalfError: scikit-learn is missing.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise BalfError('the demo needs scikit-learn: pip install "balf-fx[cli]"') from error
    loaded = datasets.load_digits()
    order = torch.randperm(len(loaded.target), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    images = torch.from_numpy(loaded.images).to(torch.float32).unsqueeze(1)[order] / 16
    labels = torch.from_numpy(loaded.target)[order]
    return Digits(images[:_TRAIN], labels[:_TRAIN], images[:_CALIBRATION], images[_TRAIN:], labels[_TRAIN:])


def digits_net() -> nn.Sequential:
    """An untrained net of convolutions with BatchNorm, some of them strided, and a linear head."""
    blocks = (
        nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        for inputs, outputs, stride in _WIDTHS
    )
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_WIDTHS[-1][1], 10))


def train_net(digits: Digits, seed: int = 0, epochs: int = 5, progress: bool = False) -> nn.Sequential:
    """Train the net from scratch and return it in evaluation mode."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the caller's other devices, too
        net = digits_net()
        steps = epochs * -(-len(digits.train) // _BATCH)
        optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        for _ in tqdm(range(epochs), desc="training", unit="epoch", disable=not progress, leave=False):
            for batch in torch.split(torch.randperm(len(digits.train)), _BATCH):
                optimizer.zero_grad()
                loss = F.cross_entropy(net(digits.train[batch]), digits.train_labels[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return net.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of correct predictions."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def latencies_ms(models: Sequence[nn.Module], batch: Tensor) -> list[float]:
    """Median milliseconds of each model on the batch; the models alternate, so that noise affects them equally."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(_LATENCY_ROUNDS):
            for model, seen in zip(models, times, strict=True):
                start = time.perf_counter()
                model(batch)
                seen.append(1000 * (time.perf_counter() - start))
    return [statistics.median(seen) for seen in times]
