"""Tells whether tensors have changed."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

from torch import Tensor

_version = attrgetter("_version")


class Watch:
    """Tells whether tensors still are what they were, by address and version counter.

    Not seen are writes through `tensor.data` and, in place, to inference tensors: neither counts as a new version.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._names = tuple(tensors)
        self._tensors = tuple(tensors.values())
        self._counting = tuple(tensor for tensor in self._tensors if not tensor.is_inference())
        self._seen = self._now()

    def _now(self) -> tuple[list[int], list[int]]:
        return list(map(Tensor.data_ptr, self._tensors)), list(map(_version, self._counting))

    def unchanged(self) -> bool:
        """Whether nothing has written to a tensor or moved it; cheap, since every call asks it."""
        return self._now() == self._seen

    def changed(self) -> list[str]:
        """Names of the tensors that are not what they were."""
        addresses, versions = self._now()
        moved = {id(t) for t, now, then in zip(self._tensors, addresses, self._seen[0], strict=True) if now != then}
        written = {id(t) for t, now, then in zip(self._counting, versions, self._seen[1], strict=True) if now != then}
        named = zip(self._names, self._tensors, strict=True)
        return [name for name, tensor in named if id(tensor) in moved | written]
