"""Tensors in files that are mapped into memory: only what is read of them takes memory, until it is given back."""

from __future__ import annotations

import mmap
import tempfile
import weakref

import torch
from torch import Tensor, nn


class Pages:
    """Tensors that are mapped from temporary files, and the memory that these take.

    A file has no name and is gone with the last of its tensors.
    """

    def __init__(self) -> None:
        self._maps: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()  # with their addresses

    def park(self, tensor: Tensor) -> Tensor:
        """A tensor with the values of another one, mapped from a new file.

        Returns:
            The tensor itself if it is empty, not a plain one, or on a device other than the CPU.

        Raises:
            OSError: the disk is full.
        """
        if type(tensor) is not Tensor or tensor.device.type != "cpu" or not tensor.numel():
            return tensor
        values = tensor.detach().contiguous()
        with tempfile.TemporaryFile(prefix="balf_fx-") as file:
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)  # not the map: a full disk would kill
            file.flush()
            found = mmap.mmap(file.fileno(), values.nbytes)
        parked = torch.frombuffer(found, dtype=values.dtype).reshape(values.shape)
        self._maps[found] = parked.data_ptr()
        return parked

    def keep(self, module: nn.Module) -> None:
        """Park the parameters of a module, and give back the memory of all that was read."""
        for parameter in module.parameters():
            parameter.data = self.park(parameter.data)
        self.release()

    def has(self, tensor: Tensor) -> bool:
        """Whether `park` has returned the tensor."""
        return tensor.data_ptr() in self._maps.values()

    def release(self) -> None:
        """Give back the memory of what was read; it is read again from the files where it is needed."""
        if hasattr(mmap, "MADV_DONTNEED"):  # elsewhere, the system takes it when it needs some
            for each in list(self._maps):
                each.madvise(mmap.MADV_DONTNEED)
