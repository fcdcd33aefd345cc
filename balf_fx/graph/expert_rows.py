"""Finds the rows of each expert in the values around a product with one matrix for each expert.

Dimensions are named by letters, as in einsum: "e" the experts, "d" the inputs, "o" the outputs, "r", "s", "t" the
dimensions of `ids` or of the sorted rows, "." a dimension of size 1 that is broadcast, and capitals all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from balf_fx.graph.site import Side


@dataclass(frozen=True)
class ExpertRows:
    """Where the rows of each expert are in the input and the output of a product.

    Attributes:
        experts: E.
        by: how rows are assigned: "ids", by an expert for each row; "ends", by the end of each expert's rows; None if
            the expert is a dimension of the output.
        assigned: the letters of the dimensions that the assignment has.
        read, written: the letters of the input's and the output's dimensions.
    """

    experts: int
    by: Literal["ids", "ends"] | None
    assigned: str
    read: str
    written: str

    def split(self, value: Tensor, side: Side, assignment: Tensor | None) -> list[Tensor]:
        """The rows of each expert in an input or output, [n, D] or [n, O]; those of both sides correspond.

        Args:
            assignment: the ids or the ends; None if there are none.
        """
        letters, features = (self.read, "d") if side == "input" else (self.written, "o")
        if assignment is None:
            sizes = torch.Size([self.experts])
        else:
            sizes = assignment.shape if self.by == "ids" else value.shape[letters.index("r") :][:1]
        rows = self._in_order(value, letters, features, sizes)
        if assignment is None:
            return list(rows)
        ids = self.ids(assignment, len(rows))
        counts = torch.bincount(ids, minlength=self.experts)[: self.experts].tolist()
        ordered = rows[torch.argsort(ids, stable=True)[: sum(counts)]]
        return [own.flatten(0, 1) for own in torch.split(ordered, counts)]

    def ids(self, assignment: Tensor, rows: int) -> Tensor:
        """The expert of each row, [rows]; E for rows beyond the last end, which are not computed."""
        return expert_ids(assignment, rows, self.experts, self.by == "ids")

    @property
    def splits(self) -> bool:
        """Whether some rows can be computed separately: there is one dimension of rows on both sides."""
        return self.assigned == "r" and "r" in self.read

    def _in_order(self, value: Tensor, letters: str, features: str, sizes: Sequence[int]) -> Tensor:
        """A value as [rows of the assignment, other rows, features], where dimensions that it lacks are repeated."""
        kept = [letter for letter in letters if letter != "."]
        value = value[tuple(0 if letter == "." else slice(None) for letter in letters)]
        own = [letter for letter in self.assigned if letter in kept]
        others = sorted(set(kept) - set(own) - {features})
        value = value.permute([kept.index(letter) for letter in (*own, *others, features)])
        for index, letter in enumerate(self.assigned):
            if letter not in kept:
                value = value.unsqueeze(index)
        value = value.expand(*sizes, *value.shape[len(sizes) :])
        return value.reshape(math.prod(sizes), math.prod(value.shape[len(sizes) : -1]), value.shape[-1])


def expert_ids(assignment: Tensor, rows: int, experts: int, by_ids: bool) -> Tensor:
    """The expert of each row, from ids or ends."""
    if by_ids:
        return assignment.flatten().long() % experts
    return torch.searchsorted(assignment.long(), torch.arange(rows, device=assignment.device), right=True)
