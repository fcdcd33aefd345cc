"""Tensors that wait in files until they are needed again."""

from __future__ import annotations

import itertools
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class _Parked:
    """A tensor whose storage is in a file."""

    path: Path
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Shelf:
    """Takes the tensors of nested values to files and back: what shares a storage still does so afterwards.

    Args:
        folder: where the files are.
        pinned: the addresses of storages that stay where they are.
    """

    def __init__(self, folder: Path, pinned: Set[int]) -> None:
        self._folder = folder
        self._pinned = pinned
        self._paths: set[Path] = set()
        self._mapped: dict[int, tuple[Path, Tensor]] = {}  # by address, which no other storage takes meanwhile

    @property
    def used(self) -> bool:
        """Whether anything is in files."""
        return bool(self._paths)

    def nbytes(self, values: Any) -> int:
        """How much memory `park` would free."""
        leaves = [leaf for leaf in pytree.tree_leaves(values) if self._takes(leaf)]
        return sum({leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in leaves}.values())

    def park(self, values: Any) -> Any:
        """The values with tensors left to files; what was mapped from one is there already."""
        written: dict[int, Path] = {}

        def parked(tensor: Tensor) -> Tensor | _Parked:
            if not self._takes(tensor):
                return tensor
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in written:
                written[address] = self._mapped[address][0] if address in self._mapped else self._write(storage)
            offset = int(tensor.storage_offset())
            return _Parked(written[address], tensor.dtype, tensor.device, tensor.shape, tensor.stride(), offset)

        result = pytree.tree_map_only(Tensor, parked, values)
        self._mapped.clear()
        self._keep(set(written.values()))
        return result

    def load(self, values: Any) -> Any:
        """The values with tensors that are mapped from their files: only what is read comes into memory."""
        bases: dict[Path, Tensor] = {}

        def loaded(parked: _Parked) -> Tensor:
            if parked.path not in bases:
                bases[parked.path] = _map_file(parked.path, parked.path.stat().st_size).to(parked.device)
            empty = torch.empty(0, dtype=parked.dtype, device=parked.device)
            return empty.set_(bases[parked.path].untyped_storage(), parked.offset, parked.shape, parked.stride)

        result = pytree.tree_map_only(_Parked, loaded, values)
        self._keep(set(bases))
        on_cpu = {path: base for path, base in bases.items() if base.device.type == "cpu"}
        self._mapped = {base.data_ptr(): (path, base) for path, base in on_cpu.items()}
        return result

    def _takes(self, leaf: Any) -> bool:
        if type(leaf) is not Tensor or leaf.layout is not torch.strided or leaf.is_quantized:
            return False
        storage = leaf.untyped_storage()
        return not (leaf.is_conj() or leaf.is_neg() or storage.nbytes() == 0 or storage.data_ptr() in self._pinned)

    def _write(self, storage: torch.UntypedStorage) -> Path:
        path = self._folder / str(next(_NUMBERS))
        own = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        _map_file(path, storage.nbytes()).copy_(own)
        return path

    def _keep(self, paths: set[Path]) -> None:
        for path in self._paths - paths:
            path.unlink()
        self._paths = paths


def _map_file(path: Path, size: int) -> Tensor:
    """[size] bytes that are those of a file."""
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
