"""Keeps tensors in files until they are needed again."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from balf_fx.errors import FileError

_NUMBERS = itertools.count()
_ALIGNMENT = 64  # bytes; a multiple of the size of every dtype's elements


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
    """Moves the tensors of nested values to files and back; tensors that share a storage still share it afterwards.

    Args:
        folder: the folder of the files.
        pinned: the addresses of storages that stay in memory.
    """

    def __init__(self, folder: Path, pinned: Set[int]) -> None:
        self._folder = folder
        self._pinned = pinned
        self._paths: set[Path] = set()
        self._mapped: dict[int, tuple[Path, Tensor]] = {}  # by address, which is unique while the storage is alive

    @property
    def used(self) -> bool:
        """Whether anything is in files."""
        return bool(self._paths)

    def nbytes(self, values: Any) -> int:
        """The bytes of memory that `park` would free."""
        return storage_bytes(leaf for leaf in pytree.tree_leaves(values) if self._takes(leaf))

    def park(self, values: Any) -> Any:
        """The values with their tensors moved to files; tensors that were mapped from a file are already in it."""
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
        """The values with tensors mapped from their files, so that only the parts that are read use memory."""
        result, bases = _load(values, shared=True)
        self._keep(set(bases))
        on_cpu = {path: base for path, base in bases.items() if base.device.type == "cpu"}
        self._mapped = {base.data_ptr(): (path, base) for path, base in on_cpu.items()}
        return result

    def _takes(self, leaf: Any) -> bool:
        return _is_plain(leaf) and leaf.untyped_storage().data_ptr() not in self._pinned

    def _write(self, storage: torch.UntypedStorage) -> Path:
        return _write(self._folder, storage, slice(0, storage.nbytes()))

    def _keep(self, paths: set[Path]) -> None:
        for path in self._paths - paths:
            path.unlink()
        self._paths = paths


class Shelved(Sequence[Any]):
    """A sequence of nested values that keeps those beyond a limit in bytes in temporary files.

    A value that fits into memory is kept as it was appended. The tensors of other values are copied to files at once,
    and each access maps these files again: changes in place do not reach them. Tensors of one value that share a
    storage still share it. The files are removed by `close`, at the end of a `with` block, or with the sequence itself.

    Args:
        memory: bytes of tensors that may stay in memory.

    Attributes:
        nbytes: the bytes of tensors in memory.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self.nbytes = 0
        self._values: list[Any] = []
        self._folder: Path | None = None

    def __enter__(self) -> Shelved:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        found, _ = _load(self._values[index], shared=False)
        return found

    def append(self, value: Any) -> None:
        """Add a value at the end."""
        spans = _spans(value)
        nbytes = sum(span.stop - span.start for span in spans.values())
        if self.nbytes + nbytes > self._memory:
            value = self._copy(value, spans)
        else:
            self.nbytes += nbytes
        self._values.append(value)

    def close(self) -> None:
        """Release all values and remove the files."""
        self._values.clear()
        self.nbytes = 0
        if self._folder is not None:
            self._remove()
            self._folder = None

    def resident(self) -> list[Tensor]:
        """The tensors that are in memory."""
        return [leaf for leaf in pytree.tree_leaves(self._values) if isinstance(leaf, Tensor)]

    def _files(self) -> Path:
        """The folder of the files, made when the first value does not fit."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="balf_fx-"))
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def _copy(self, value: Any, spans: Mapping[int, slice]) -> Any:
        """The value with its tensors in files; only the bytes in the span of each storage are written."""
        written: dict[int, Path] = {}

        def parked(tensor: Tensor) -> Tensor | _Parked:
            if not _is_plain(tensor):
                return tensor
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in written:
                written[address] = _write(self._files(), storage, spans[address])
            offset = int(tensor.storage_offset()) - spans[address].start // tensor.element_size()
            return _Parked(written[address], tensor.dtype, tensor.device, tensor.shape, tensor.stride(), offset)

        return pytree.tree_map_only(Tensor, parked, value)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages of tensors; a storage of several counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def resident(values: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """The tensors that a list, tuple or `Shelved` keeps in memory, so that freeing other references has no effect.

    Sequences of other types may create their items at each access, and count as empty.
    """
    if isinstance(values, Shelved):
        return values.resident()
    # Of mappings, pytree only traverses dict.
    held = [dict(value) for value in values] if isinstance(values, list | tuple) else []
    return [leaf for leaf in pytree.tree_leaves(held) if isinstance(leaf, Tensor)]


def _is_plain(leaf: Any) -> bool:
    """Whether a leaf is an ordinary tensor, fully described by the bytes of its storage."""
    if type(leaf) is not Tensor or leaf.layout is not torch.strided or leaf.is_quantized:
        return False
    return not (leaf.is_conj() or leaf.is_neg() or leaf.numel() == 0)


def _spans(value: Any) -> dict[int, slice]:
    """The bytes of each storage that the tensors of a value cover, by the address of the storage."""
    found: dict[int, slice] = {}
    for tensor in pytree.tree_leaves(value):
        if not _is_plain(tensor):
            continue
        address, size = tensor.untyped_storage().data_ptr(), tensor.element_size()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        start = int(tensor.storage_offset()) * size // _ALIGNMENT * _ALIGNMENT
        extent = sum((length - 1) * stride for length, stride in steps) + 1
        stop = (int(tensor.storage_offset()) + extent) * size
        known = found.get(address, slice(start, stop))
        found[address] = slice(min(known.start, start), max(known.stop, stop))
    return found


def _load(values: Any, shared: bool) -> tuple[Any, dict[Path, Tensor]]:
    """Nested values with tensors mapped from their files, and the bytes of each file by its path.

    Args:
        shared: whether changes in place are written to the file.
    """
    bases: dict[Path, Tensor] = {}

    def loaded(parked: _Parked) -> Tensor:
        if parked.path not in bases:
            size = parked.path.stat().st_size
            bases[parked.path] = _map_file(parked.path, size, shared).to(parked.device)
        empty = torch.empty(0, dtype=parked.dtype, device=parked.device)
        return empty.set_(bases[parked.path].untyped_storage(), parked.offset, parked.shape, parked.stride)

    return pytree.tree_map_only(_Parked, loaded, values), bases


def _write(folder: Path, storage: torch.UntypedStorage, span: slice) -> Path:
    """Write some bytes of a storage to a new file, and return its path.

    Raises:
        FileError: the disk is full, for instance.
    """
    path = folder / str(next(_NUMBERS))
    own = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[span]
    try:
        path.write_bytes(own.cpu().numpy().data)  # not to a map of it: a full disk would kill the process
    except OSError as error:
        raise FileError(
            f"temporary files cannot be written to {folder.parent}: {error.strerror}. Make room there, set TMPDIR, or "
            "allow more memory="
        ) from error
    return path


def _map_file(path: Path, size: int, shared: bool) -> Tensor:
    """Map a file as a tensor of [size] bytes."""
    return torch.from_file(str(path), shared=shared, size=size, dtype=torch.uint8)
