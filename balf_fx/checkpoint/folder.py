"""A folder with one file for each finished stage of a run, and a manifest that says which run it is.

Files appear whole or not at all: they are written under another name, synchronised with the disk, and renamed. A run
that is killed, or that finds the disk full, leaves the files that it had finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from balf_fx.checkpoint.digests import digest_of
from balf_fx.errors import CheckpointError

_MANIFEST, _STAGES, _SUFFIX, _FORMAT = "manifest.json", "stages", ".safetensors", 12
_UNFINISHED = f".{_MANIFEST}.tmp"
_OF_PROCESS = re.compile(r"process-\d+")
"""The folders of other processes, in that of the first."""


class Folder:
    """The files of one run.

    Args:
        path: the folder; made if it is not there.
        run: what the run depends on, as JSON.

    Attributes:
        path: as above.
        before: what the run depended on that began the folder; the same as `run` if it is new.

    Raises:
        CheckpointError: the folder cannot be written, holds other files, or its manifest is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        self.path = Path(path)
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / _MANIFEST).exists():
                self._check_empty()
                self._write_manifest(run)
        self.before = self._manifest()
        with self.writing():
            (self.path / _STAGES).mkdir(exist_ok=True)
            for left in self.path.glob(".balf_fx-*"):  # of a run that was killed while it wrote its result
                shutil.rmtree(left, ignore_errors=True)
            for left in (self.path / _STAGES).iterdir():  # of one that was killed while it wrote a stage
                if left.name.startswith(".tmp") or left.suffix == ".tmp":  # of safetensors, or of ours
                    left.unlink(missing_ok=True)
        self._run = digest_of(self.before)

    def __str__(self) -> str:
        return str(self.path)

    def other(self, difference: str) -> CheckpointError:
        """The error for another run than the one that began the folder."""
        return CheckpointError(
            f"the checkpoint in {self} is of another run: {difference}. Call with what it was begun with, or pass "
            "another folder"
        )

    def put(self, stage: str, written: Any, tensors: Mapping[str, Tensor]) -> None:
        """Write what a stage returned, in place of what it returned before.

        Args:
            written, tensors: as `values.Encoder` makes them.

        Raises:
            CheckpointError: the disk is full, for instance; what was written before is still there.
        """
        metadata = {"stage": stage, "run": self._run, "value": json.dumps(written), "digest": ""}
        metadata["digest"] = _digest(metadata["value"], tensors)
        with self.writing():
            path = self._path(stage)
            whole = path.with_suffix(".tmp")
            save_file(dict(tensors), whole, metadata)
            self._replace(whole, path)

    def get(self, stage: str) -> tuple[Any, dict[str, Tensor]] | None:
        """What a stage returned, as it was given to `put`; None if there is nothing.

        Raises:
            CheckpointError: the file was changed.
        """
        path = self._path(stage)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise self._damaged(path) from error
        value = metadata.get("value", "")
        known = {"stage": stage, "run": self._run, "value": value, "digest": _digest(value, tensors)}
        if metadata != known:
            raise self._damaged(path)
        return json.loads(value), tensors

    def clear(self) -> None:
        """Delete the large files, those of stages with tensors, once the result is written."""
        with self.writing():
            for path in (self.path / _STAGES).glob(f"*{_SUFFIX}"):
                if _has_tensors(path):
                    path.unlink()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Convert errors of the file system to CheckpointError."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint cannot be written to {self}: {error}. What was written before is still there: make "
                "room and call again to go on from it"
            ) from error

    def _path(self, stage: str) -> Path:
        readable = re.sub(r"[^\w.-]+", "-", stage)[:80]
        digest = hashlib.blake2b(stage.encode(), digest_size=4).hexdigest()
        return self.path / _STAGES / f"{readable}-{digest}{_SUFFIX}"

    def _check_empty(self) -> None:
        """Check that a folder without a manifest holds nothing: files of others must not be taken for ours."""
        names = (each.name for each in self.path.iterdir())
        others = sorted(name for name in names if name != _UNFINISHED and not _OF_PROCESS.fullmatch(name))
        if others:
            raise CheckpointError(f"{self} is no checkpoint, but holds {others[0]!r}: pass a new or an empty folder")

    def _write_manifest(self, run: Mapping[str, Any]) -> None:
        whole = self.path / _UNFINISHED
        whole.write_text(json.dumps({"format": _FORMAT, "run": run}, indent=1))
        self._replace(whole, self.path / _MANIFEST)

    def _manifest(self) -> dict[str, Any]:
        path = self.path / _MANIFEST
        try:
            found = json.loads(path.read_text())
            run: dict[str, Any] = found["run"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged, or of another program: pass another folder") from error
        if found.get("format") != _FORMAT:
            raise CheckpointError(f"the checkpoint in {self} was written by another version: pass another folder")
        return run

    def _replace(self, whole: Path, path: Path) -> None:
        """Give a file its name once it is on the disk."""
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        whole.replace(path)
        with contextlib.suppress(OSError):  # the name itself; not every system can synchronise a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _damaged(self, path: Path) -> CheckpointError:
        return CheckpointError(f"{path} is damaged, or was not written by the run of this checkpoint: delete {self}")


def _digest(value: str, tensors: Mapping[str, Tensor]) -> str:
    return digest_of([value, dict(sorted(tensors.items()))])


def _has_tensors(path: Path) -> bool:
    with safe_open(path, "pt") as file:
        return bool(file.keys())
