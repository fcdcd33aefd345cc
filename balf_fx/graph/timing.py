"""What was measured of the time of a compressed model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Runner = Literal["eager", "inductor"]
"""How a model is run: node by node, or compiled by `torch.compile`."""


@dataclass(frozen=True)
class Timing:
    """The times of the original and of the compressed model, which ran in turn on the first calibration batch.

    Attributes:
        runner, device, threads: how and where they ran; the number of threads on a CPU.
        asked: the share of the original's time that was asked for.
        by_operations: the share of the original's time by the times of single operations (`passes.Time`).
        predicted: the same, corrected by how far those of the models measured before were off.
        measured: the median ratio of their times.
        in_sites: the share of the original's time that its sites take, by the times of their operations; a budget
            reaches the rest only where narrower features shorten it.
        biases_apart: whether low-rank maps add their biases apart where they can (`passes.SplitBias`), since the model
            is not slower for it.
        dense, compressed: the median seconds of each; the original with its BatchNorms folded, if they were.
    """

    runner: Runner
    device: str
    threads: int
    asked: float
    by_operations: float
    predicted: float
    measured: float
    in_sites: float
    biases_apart: bool
    dense: float
    compressed: float
