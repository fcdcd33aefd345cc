"""Shapes of large language models, and what they cost on paper.

Each stage of a compression takes longer than that of a measured model by the ratio of its operations:

    calibrating, trying     P                         a forward pass over P parameters, for as many tokens
    scoring                 sum m^2 (m + O + D)       eigenvectors and products for each layer [O, D], m = min(O, D)
    compressing             sum m^2 (O + D)           pivots and factors
    capturing, rewriting    layers

Statistics and directions of effort "fast" take 8 m (m + O) bytes for each layer. They are in memory, or on the disk
where they exceed `memory`; then weights, `memory` and what the largest layer takes are in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    width: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    words: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """[O, D] of all linear layers."""
        narrow = self.width // self.heads * self.key_value_heads
        attention = [(self.width, self.width)] * 2 + [(narrow, self.width)] * 2
        layer = [*attention, *[(self.hidden, self.width)] * 2, (self.width, self.hidden)]
        return [*layer * self.layers, (self.words, self.width)]

    @property
    def statistics(self) -> int:
        """The bytes of statistics and of directions, with effort "fast"."""
        return sum(8 * min(matrix) * (min(matrix) + matrix[0]) for matrix in self.matrices)

    @property
    def weights(self) -> int:
        """The bytes of the weights of linear layers and of the embedding, in bfloat16."""
        return 2 * (sum(rows * columns for rows, columns in self.matrices) + self.words * self.width)

    def operations(self, stage: str) -> float:
        """What a stage's time grows with."""
        small = [min(matrix) for matrix in self.matrices]
        sums = [sum(matrix) for matrix in self.matrices]
        return {
            "calibrating": float(self.weights),
            "trying allocations": float(self.weights),
            "scoring": float(sum(m**2 * (m + both) for m, both in zip(small, sums, strict=True))),
            "compressing": float(sum(m**2 * both for m, both in zip(small, sums, strict=True))),
        }.get(stage, float(self.layers))


SHAPES: Mapping[str, Shape] = {
    "100M": Shape(640, 1_728, 12, 10, 10, 32_000),
    "1B": Shape(2_048, 5_632, 22, 32, 4, 32_000),
    "7B": Shape(4_096, 11_008, 32, 32, 32, 32_000),
    "70B": Shape(8_192, 28_672, 80, 64, 8, 32_000),
}
"""1B is that of TinyLlama; the others but the first are Llama 2's."""


def on_paper(cost: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What all shapes would cost from what one of them, with all of its layers, has cost on the same machine."""
    measured = SHAPES[cost["shape"]]
    rows = []
    for name, shape in SHAPES.items():
        ratios = {stage: shape.operations(stage) / measured.operations(stage) for stage in cost["stages"]}
        hours = sum(cost["stages"][stage] * ratio for stage, ratio in ratios.items()) / 3600
        gib = {"weights, GiB": shape.weights / 2**30, "statistics, GiB": shape.statistics / 2**30}
        rows.append({"shape": name, "from": cost["shape"], "hours": hours, **gib})
    return rows
