"""Tensors in files that are mapped into memory: only what is read of them takes memory, until it is given back."""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Iterable
from typing import BinaryIO

import torch
from torch import Tensor, nn

from balf_fx.calibration.freed import give_back

_OPEN: weakref.WeakSet[Pages] = weakref.WeakSet()


class Pages:
    """The files that are mapped into memory during one compression."""

    def __init__(self) -> None:
        self._maps: weakref.WeakKeyDictionary[mmap.mmap, range] = weakref.WeakKeyDictionary()  # with their addresses
        _OPEN.add(self)

    def map(self, file: BinaryIO, own: bool = False) -> Tensor:
        """The bytes of a file as a tensor, uint8 [n].

        Args:
            own: whether changes of the tensor are written to the file; else the file stays as it is.
        """
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if own else mmap.ACCESS_COPY)
        mapped = torch.frombuffer(found, dtype=torch.uint8)
        self._maps[found] = range(mapped.data_ptr(), mapped.data_ptr() + mapped.nbytes)
        return mapped

    def park(self, tensor: Tensor) -> Tensor:
        """A tensor with the values of another one, mapped from a temporary file, which is gone with the tensor.

        Returns:
            The tensor itself if it is empty, not a plain one, or on a device other than the CPU.

        Raises:
            OSError: the disk is full.
        """
        if type(tensor) is not Tensor or tensor.device.type != "cpu" or not tensor.numel() or self.has(tensor):
            return tensor
        values = tensor.detach().contiguous()
        with tempfile.TemporaryFile(prefix="balf_fx-") as file:
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)  # not the map: a full disk would kill
            file.flush()
            return self.map(file, own=True).view(values.dtype).reshape(values.shape)

    def keep(self, module: nn.Module) -> None:
        """Park the parameters of a module, and give back the memory of all that was read."""
        for parameter in module.parameters():
            parameter.data = self.park(parameter.data)
        self.release()

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is in one of the files."""
        return tensor.layout is torch.strided and any(tensor.data_ptr() in found for found in self._maps.values())

    def release(self) -> None:
        """Give back the memory of what was read, and memory that is free but still held by the process.

        What is needed is read from the files again. Changes of tensors that `map` has not to write are lost.
        """
        if hasattr(mmap, "MADV_DONTNEED"):  # elsewhere, the system takes it when it needs some
            for each in list(self._maps):
                each.madvise(mmap.MADV_DONTNEED)
        give_back(0)


def mapped(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Those of some tensors, by id, that are in the files of a compression that is not finished.

    As the memo of `copy.deepcopy`, so that copies of a model share them.
    """
    return {id(tensor): tensor for tensor in tensors if any(pages.has(tensor) for pages in list(_OPEN))}
