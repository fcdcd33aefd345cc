"""Spaces: sets of values that hold the same features, each on an axis of its own.

Where values are concatenated, each of them holds only some of the features of the space.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from balf_fx.graph.widths import Reader, Size, View


@dataclass(frozen=True)
class Selection:
    """A node that reads some rows of a wider value, one row for each of its features; for GLU, two.

    Attributes:
        source, axis: the wider value, and the axis of its rows.
        readers: how each part is read; empty for GLU, which halves the axis whatever its size.
    """

    node: fx.Node
    source: fx.Node
    axis: int
    rows: tuple[tuple[int, ...], ...]
    reader: Reader | None = None


@dataclass
class Space:
    """All values that hold the features.

    Attributes:
        axes: the axis of the features in each of them.
        held: the numbers of the features that each of them holds; there are more where values are concatenated.
        features: the number of all features.
        block: so many features that follow each other stay or go together.
    """

    axes: dict[fx.Node, int] = field(default_factory=dict)
    held: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    features: int = 0
    block: int = 1
    producers: list[fx.Node] = field(default_factory=list)
    consumers: list[fx.Node] = field(default_factory=list)
    between: list[fx.Node] = field(default_factory=list)
    shaped: list[fx.Node] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)

    def reach(self, node: fx.Node, axis: int, held: tuple[int, ...]) -> bool:
        """Add a value; returns whether it is new."""
        if node in self.axes:
            if (self.axes[node], self.held[node]) != (axis, held):
                raise UnsupportedError
            return False
        self.axes[node], self.held[node] = axis, held
        return True

    def more(self, count: int) -> tuple[int, ...]:
        """The numbers of further features."""
        self.features += count
        return tuple(range(self.features - count, self.features))

    @property
    def joined(self) -> bool:
        """Whether some values hold only some of the features."""
        return any(len(held) < self.features for held in self.held.values())

    def views(self, layer: str = "") -> list[View]:
        return [View(node.name, self.axes[node], layer) for node in self.shaped]


Step = tuple[fx.Node, int, tuple[int, ...]]
"""A value, the axis of its features, and their numbers."""


class UnsupportedError(Exception):
    """An operation in the space mixes the features, or needs all of them."""
