"""The stages of a run and what they returned, so that a run which was killed can be resumed.

A `Journal` is handed down through a run, as `Progress` is. `journal.cached(stage, compute)` returns what a stage
returned before, if it was finished, or computes it. The base class stores nothing, so callers need no condition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from balf_fx.checkpoint.digests import digest_of
from balf_fx.checkpoint.folder import Folder
from balf_fx.checkpoint.values import Encoder, decode
from balf_fx.distributed.group import ALONE, Group
from balf_fx.errors import CheckpointError

_T = TypeVar("_T")

EVERY = 60.0
"""Seconds of work after which an unfinished stage is written."""

_SHARE = 0.05  # the largest share of the time that writing unfinished stages takes


class Journal:
    """The stages of a run. This one stores nothing."""

    @property
    def folder(self) -> Folder | None:
        """Where stages are written; None if they are not."""
        return None

    @property
    def alone(self) -> Journal:
        """The journal of stages that this process goes through without the others."""
        return self

    def within(self, name: str) -> Journal:
        """The journal of a part of the run, whose stages have names of their own."""
        del name
        return self

    def cached(self, stage: str, compute: Callable[[], _T]) -> _T:
        """What a stage returned before; if it was not finished, it is computed and written."""
        del stage
        return compute()

    def last(self, stage: str) -> Any:
        """What was written last for a stage; None if nothing was."""
        del stage

    def write(self, stage: str, make: Callable[[], Any], due: bool = True) -> None:
        """Write what a stage has so far.

        Args:
            make: returns it.
            due: False to write only once the last writing is long ago (`EVERY`).
        """

    def checked(self, batches: Iterable[_T], name: str = "calibration batch") -> Iterable[_T]:
        """The batches as they are read.

        Args:
            name: what one is called in messages.

        Raises:
            CheckpointError: one differs from that of the run which was killed, or there are more or fewer.
        """
        del name
        return batches


NO_JOURNAL = Journal()
"""Stores nothing."""


@dataclass(frozen=True)
class _Read:
    """The batches that a run has read.

    Attributes:
        digests: of each batch.
        complete: whether these are all.
    """

    digests: tuple[str, ...] = ()
    complete: bool = False


class FolderJournal(Journal):
    """Keeps what stages return in a folder.

    What several processes compute together is kept in the folder of process 0, which all of them follow. Statistics and
    digests of batches are kept for each process, in a folder of its own.

    Args:
        folder: the folder of this process.
        classes: the dataclasses that stages return.
        group: the processes, which call `cached` with the same stages in the same order.
    """

    def __init__(self, folder: Folder, classes: Collection[type], group: Group = ALONE, prefix: str = "") -> None:
        self._folder = folder
        self._classes = (*classes, _Read)
        self._group = group
        self._prefix = prefix
        self._reading: dict[str, list[str]] = {}
        self._written = time.monotonic()
        self._took = 0.0

    @property
    def folder(self) -> Folder:
        return self._folder

    @property
    def alone(self) -> Journal:
        return FolderJournal(self._folder, self._classes, prefix=self._prefix)

    def within(self, name: str) -> Journal:
        return FolderJournal(self._folder, self._classes, self._group, f"{self._prefix}{name}, ")

    def cached(self, stage: str, compute: Callable[[], _T]) -> _T:
        known = self._group.once(lambda: self._known(stage))
        if known:
            found: _T = known[0]
            return found
        value = compute()
        if self._group.rank == 0:
            self._keep(stage, value)
        return value

    def last(self, stage: str) -> Any:
        return next(iter(self._known(stage)), None)

    def write(self, stage: str, make: Callable[[], Any], due: bool = True) -> None:
        start = time.monotonic()
        if due or start - self._written >= max(EVERY, self._took / _SHARE):
            self._keep(stage, make())
            self._written = time.monotonic()
            self._took = self._written - start

    def checked(self, batches: Iterable[_T], name: str = "calibration batch") -> Iterator[_T]:
        before = self.last(f"{name}es") or _Read()
        known, count = before.digests, len(before.digests)
        read = self._reading[name] = []
        for index, batch in enumerate(batches):
            digest = digest_of(batch)
            if index < count and digest != known[index]:
                raise self._folder.other(f"{name} {index} differs")
            if index >= count and before.complete:
                raise self._folder.other(f"there were {count} {name}es, and now there are more")
            read.append(digest)
            yield batch
        if len(read) < count:
            raise self._folder.other(f"there were {count} {name}es, and now there are {len(read)}")
        if not before.complete:
            self._keep_read(name, complete=True)

    def _keep(self, stage: str, value: Any) -> None:
        """Write a stage, and before it the digests of the batches that it has seen."""
        for name in list(self._reading):
            self._keep_read(name, complete=False)
        self._put(stage, value)

    def _keep_read(self, name: str, complete: bool) -> None:
        before, read = self.last(f"{name}es") or _Read(), tuple(self._reading[name])
        if complete or (len(read) > len(before.digests) and not before.complete):
            self._put(f"{name}es", _Read(read, complete))

    def _put(self, stage: str, value: Any) -> None:
        encoder = Encoder()
        self._folder.put(self._prefix + stage, encoder.encode([value]), encoder.tensors)

    def _known(self, stage: str) -> tuple[Any, ...]:
        """What was written for a stage, as the only item; empty if nothing was."""
        found = self._folder.get(self._prefix + stage)
        if found is None:
            return ()
        try:
            return tuple(decode(*found, self._classes))
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"stage {stage!r} in {self._folder} is damaged: delete the folder") from error


def difference(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first difference of two descriptions of runs, in words; None if they are alike.

    Args:
        before, now: {"version": {name: version}, "number of": {"processes": number}, "option": {name: value},
            "model": {name: digest}}.
    """
    for subject, own in now.items():
        other = before.get(subject, {})
        for name in dict.fromkeys((*other, *own)):
            if other.get(name) != own.get(name):
                if subject == "model":
                    return f"the model's {name} differs"
                return f"{subject} {name} was {other.get(name, 'missing')}, and is {own.get(name, 'missing')} now"
    return None
