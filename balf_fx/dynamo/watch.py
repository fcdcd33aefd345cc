"""Tells whether tensors have changed."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

from torch import Tensor

_version = attrgetter("_version")


class Watch:
    """Tells whether tensors have changed, by address and version counter.

    Writes through `tensor.data` and in-place writes to inference tensors are not detected, since neither changes the
    version counter.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._names = tuple(tensors)
        self._tensors = tuple(tensors.values())
        self._counting = tuple(tensor for tensor in self._tensors if not tensor.is_inference())
        self._seen = self._now()

    def _now(self) -> tuple[list[int], list[int]]:
        return list(map(Tensor.data_ptr, self._tensors)), list(map(_version, self._counting))

    def unchanged(self) -> bool:
        """Whether no tensor was written to or moved; cheap, since it runs in every call."""
        return self._now() == self._seen

    def changed(self) -> list[str]:
        """Names of the tensors that have changed."""
        addresses, versions = self._now()
        moved = {id(t) for t, now, then in zip(self._tensors, addresses, self._seen[0], strict=True) if now != then}
        written = {id(t) for t, now, then in zip(self._counting, versions, self._seen[1], strict=True) if now != then}
        named = zip(self._names, self._tensors, strict=True)
        return [name for name, tensor in named if id(tensor) in moved | written]
