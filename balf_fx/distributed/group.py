"""The processes that compress one model together, and their collective operations.

`Group` is one process alone, for which every exchange is trivial, so callers need no condition. `Processes` are those
of torch.distributed. All of them call the same methods in the same order. Each exchange first finds out whether one of
them has failed, so that its error is raised in all of them, and none waits for a process that has ended.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from balf_fx.distributed.packing import packed, unpacked
from balf_fx.distributed.shares import assigned
from balf_fx.errors import BalfError, ProcessError
from balf_fx.progress import SILENT, Progress

if dist.is_available():
    # Its functions take the group of the time of their import as a default, and keep it: a group that they hold lives
    # on after destroy_process_group, with its threads, which may abort the process as it ends. Exporting imports it.
    import torch.distributed.nn.functional

_T = TypeVar("_T")
_Item = TypeVar("_Item")


class Group:
    """One process alone.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
    """

    rank = 0
    size = 1

    def gathered(self, value: _T) -> list[_T]:
        """The value of each process, in the order of their ranks."""
        return [value]

    def once(self, function: Callable[[], _T]) -> _T:
        """What a function returns in process 0, which alone calls it."""
        return function()

    def merged(self, value: _T, merge: Callable[[_T, _T], _T]) -> _T:
        """The values of all processes merged in the order of their ranks, the same in each, bit for bit.

        Args:
            merge: merges two values, which may be merged ones, of processes that follow each other.
        """
        del merge
        return value

    def shared_out(
        self,
        items: Sequence[_Item],
        costs: Sequence[float],
        function: Callable[[_Item], _T],
        progress: Progress = SILENT,
    ) -> list[_T]:
        """A function's results for some items, each computed by one process.

        Args:
            items: the same in all processes.
            costs: how long each takes, in any unit.
        """
        return [function(item) for item in progress.track(items, costs)]

    def together(self, function: Callable[[], _T]) -> _T:
        """What a function returns in each process; if it raises a BalfError in one of them, all raise one."""
        return function()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """All that processes do together; an error of one ends the context in all of them.

        Raises:
            BalfError: of the kind that another process has raised.
            ProcessError: another process has failed with another error, has ended, or is at another step.
        """
        yield


ALONE = Group()
"""This process."""


def group_of(device: torch.device, enabled: bool = True) -> Group:
    """The processes of torch.distributed's default group, or this one alone if there are no others.

    Args:
        device: where tensors that were on an accelerator of another process are put, if it is one.
        enabled: False for this process alone.
    """
    several = enabled and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return Processes(device) if several else ALONE


class Processes(Group):
    """The processes of torch.distributed's default group.

    Args:
        device: as in `group_of`.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device
        cpu = "cpu" in dist.get_backend_config() or dist.get_backend() != "nccl"
        self._channel = torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())
        self._ended = False

    def gathered(self, value: _T) -> list[_T]:
        self._synchronise("gather")
        with self._communicating():
            own = packed(value).to(self._channel)
            lengths = self._each(torch.tensor([len(own)], device="cpu"))
            padded = own.new_zeros(max(lengths))
            padded[: len(own)] = own
            rows = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(rows, padded)
        found = [unpacked(row[:length].cpu(), self._device) for row, length in zip(rows, lengths, strict=True)]
        found[self.rank] = value
        return found

    def once(self, function: Callable[[], _T]) -> _T:
        own = function() if self.rank == 0 else None
        self._synchronise("once")
        value: _T = self._from(0, own)
        return value

    def merged(self, value: _T, merge: Callable[[_T, _T], _T]) -> _T:
        self._synchronise("merge")
        step = 1
        while step < self.size and self.rank % step == 0:  # a tree, in which neighbours are merged first
            if self.rank % (2 * step):
                self._send(value, self.rank - step)
            elif self.rank + step < self.size:
                value = merge(value, self._receive(self.rank + step))
            step *= 2
        merged: _T = self._from(0, value)
        return merged

    def shared_out(
        self,
        items: Sequence[_Item],
        costs: Sequence[float],
        function: Callable[[_Item], _T],
        progress: Progress = SILENT,
    ) -> list[_T]:
        owners = assigned(costs, self.size)
        own = [index for index, owner in enumerate(owners) if owner == self.rank]
        found = {index: function(items[index]) for index in progress.track(own, [costs[index] for index in own])}
        self._synchronise("share out")
        return [self._from(owner, found.get(index)) for index, owner in enumerate(owners)]

    def together(self, function: Callable[[], _T]) -> _T:
        result, failure = None, None
        try:
            result = function()
        except BalfError as error:
            failure = error
        found = self.gathered(None if failure is None else _encoded(failure))
        if failure is not None:
            raise failure
        for rank, sent in enumerate(found):
            if sent is not None:
                raise _decoded(rank, *sent)
        return result  # type: ignore[return-value]

    @contextmanager
    def guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._ended:
                self._synchronise("end", error)
            raise
        self._synchronise("end")

    def _synchronise(self, step: str, failure: Exception | None = None) -> None:
        """Check that all processes have reached the same step, and tell the others if this one has failed.

        Raises:
            BalfError: another one has failed.
            ProcessError: they are at different steps.
        """
        with self._communicating():
            places = self._each(torch.tensor([-1 if failure is not None else zlib.crc32(step.encode())], device="cpu"))
        failed = [rank for rank, place in enumerate(places) if place < 0]
        sent = self._from(failed[0], None if failure is None else _encoded(failure)) if failed else None
        if failure is not None:
            return
        if sent is not None:
            self._ended = True
            raise _decoded(failed[0], *sent)
        if len(set(places)) > 1:
            self._ended = True
            raise ProcessError(
                "the processes are at different steps: call the same functions with the same model and options in each"
            )

    @contextmanager
    def _communicating(self) -> Iterator[None]:
        """Convert errors of torch.distributed to ProcessError."""
        try:
            yield
        except RuntimeError as error:  # the base of torch.distributed's errors
            self._ended = True
            raise ProcessError(
                f"another process has ended, or has not answered within the time limit of the group: {error}. See its "
                "own output; torch.distributed.init_process_group(timeout=) sets the limit"
            ) from error

    def _each(self, number: Tensor) -> list[int]:
        """The number [1] of each process."""
        own = number.to(self._channel)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own)
        return [int(row) for row in rows]

    def _from(self, source: int, value: Any) -> Any:
        """The value of a process, which keeps its own."""
        own = packed(value).to(self._channel) if self.rank == source else None
        with self._communicating():
            length = torch.tensor([0 if own is None else len(own)], device=self._channel)
            dist.broadcast(length, source)
            data = torch.empty(int(length), dtype=torch.uint8, device=self._channel) if own is None else own
            dist.broadcast(data, source)
        return value if own is not None else unpacked(data.cpu(), self._device)

    def _send(self, value: Any, target: int) -> None:
        data = packed(value).to(self._channel)
        with self._communicating():
            dist.send(torch.tensor([len(data)], device=self._channel), target)
            dist.send(data, target)

    def _receive(self, source: int) -> Any:
        with self._communicating():
            length = torch.tensor([0], device=self._channel)
            dist.recv(length, source)
            data = torch.empty(int(length), dtype=torch.uint8, device=self._channel)
            dist.recv(data, source)
        return unpacked(data.cpu(), self._device)


def _encoded(error: Exception) -> tuple[type[BalfError] | None, str]:
    """An error as it is sent to other processes: its class, if they can raise it, and its message."""
    if isinstance(error, BalfError) and not isinstance(type(error).__init__, FunctionType):  # a message is all it takes
        return type(error), str(error)
    return None, f"{type(error).__name__}: {error}"


def _decoded(rank: int, kind: type[BalfError] | None, message: str) -> BalfError:
    """The error to raise for one of another process, from `_encoded`."""
    if kind is None:
        return ProcessError(f"process {rank} has failed with {message}")
    return kind(f"process {rank}: {message}")
