"""Resuming a compression: the run that a checkpoint belongs to, and a calibration that was interrupted.

A run depends on the captured graphs with their tensors and statistics, on the options, on the batches, and on the
versions of torch and balf_fx. If all of these are the same, on the same machine with as many threads, a resumed run
returns the model that the killed run would have returned, bit for bit. Statistics, trials, the allocation and solved
layers are kept; capture, scores and the walk over both models are computed again.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from balf_fx.calibration.batches import Forward, iterate
from balf_fx.calibration.moments import Moments
from balf_fx.calibration.observers import (
    OBSERVERS,
    CovarianceObserver,
    InfluenceObserver,
    SensitivityObserver,
)
from balf_fx.calibration.sample import Gradients, Positions, Sample, WeightGradients
from balf_fx.checkpoint.digests import digest_of
from balf_fx.checkpoint.folder import Folder
from balf_fx.checkpoint.journal import NO_JOURNAL, FolderJournal, Journal, difference
from balf_fx.distributed.group import ALONE, Group
from balf_fx.engine.program import Program
from balf_fx.engine.rewriting import held_tensors
from balf_fx.engine.settings import Settings
from balf_fx.graph.allocation import Allocation, Choice
from balf_fx.graph.curves import Candidate, Cost, EnergyCurve, Kept, Solution
from balf_fx.graph.plan import Plan
from balf_fx.graph.site import ConvGeometry, Site
from balf_fx.graph.timing import Timing
from balf_fx.version import __version__

CALIBRATION = "calibration"
"""The stage of the statistics."""

_OTHERS = ("checkpoint", "progress", "validation")  # options on which the result does not depend, and data
_STATISTICS: Mapping[type[nn.Module], tuple[str, ...]] = {
    CovarianceObserver: ("moments",),
    SensitivityObserver: ("halves", "batches", "squares"),
    InfluenceObserver: ("gradients",),
}
"""The attributes of each kind of observer that calibration changes."""


@dataclass(frozen=True)
class Gathered:
    """Calibration after some of the batches.

    Attributes:
        batches: how many have been run.
        counted: the indices of those that were used.
        gradients: whether gradients are computed.
        generator: the state of the generator of probes.
        statistics: {path of an observer: its statistics}.
    """

    batches: int
    counted: tuple[int, ...]
    gradients: bool
    generator: Tensor
    statistics: Mapping[str, tuple[Any, ...]]


_RECORDS = (
    *(Gathered, Moments, Sample, Gradients, Positions, WeightGradients),
    *(Allocation, Choice, Site, ConvGeometry, Candidate, Cost, EnergyCurve, Timing),
    *(Solution, Kept),
)


def open_journal(program: Program, settings: Settings, forward: Forward, group: Group = ALONE) -> Journal:
    """The journal of a run on an observed program, in the folder of the option `checkpoint`.

    Args:
        forward: how the model is called.
        group: the processes that run it together. All but process 0 have a folder in that folder, for their statistics.

    Raises:
        CheckpointError: the folder belongs to another run; the message names the difference.
    """
    if settings.checkpoint is None:
        return NO_JOURNAL
    run: dict[str, dict[str, Any]] = {
        "version": {"balf_fx": __version__, "torch": str(torch.__version__)},
        "number of": {"processes": group.size},
        "option": {**settings_in_words(settings), "forward": in_words(forward)},
        "model": dict(_model(program)),
    }
    path = Path(settings.checkpoint)
    folder = Folder(path / f"process-{group.rank}" if group.rank else path, run)
    found = difference(folder.before, run)
    if found is not None:
        raise folder.other(found)
    return FolderJournal(folder, _RECORDS, group)


def check_batches(journal: Journal, batches: Iterable[Any]) -> None:
    """Read batches to the end, to compare them with those of the run that was killed; nothing without a checkpoint.

    Raises:
        CheckpointError: as `Journal.checked`.
    """
    if journal.folder is not None:
        collections.deque(journal.checked(batches), maxlen=0)


def with_validation(settings: Settings, journal: Journal) -> Settings:
    """The settings with a list of validation batches, which are compared as those of calibration are."""
    if settings.validation is None:
        return settings
    batches = list(journal.checked(iterate(settings.validation), "validation batch"))
    return dataclasses.replace(settings, validation=batches)


def settings_in_words(settings: Settings) -> dict[str, str]:
    """The options on which the result depends."""
    names = [each.name for each in dataclasses.fields(Settings) if each.name not in _OTHERS]
    return {name: in_words(getattr(settings, name)) for name in names}


def in_words(value: Any) -> str:
    """An option such that equal ones have equal words; of a function, a digest of what it does, and its name."""
    if isinstance(value, Plan):
        return f"a plan ({digest_of(value.to_json())})"
    if isinstance(value, Mapping):
        return repr({str(key): value[key] for key in sorted(value, key=str)})
    if isinstance(value, Collection) and not isinstance(value, str | bytes):
        return repr(list(value))
    if callable(value):
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"version {digest_of(value)[:8]} of {kind.__module__}.{kind.__qualname__}"
    return repr(value)


def _model(program: Program) -> Iterator[tuple[str, str]]:
    """Digests of the graphs, of their tensors, and of the statistics that they have already."""
    for index, part in enumerate(program.parts):
        graph_module = part.graph_module
        start = f"part {index}, " if len(program.parts) > 1 else ""
        yield f"{start}graph", digest_of([graph_module.code, part.calls, list(map(repr, _called(graph_module)))])
        for name, tensor in held_tensors(graph_module):
            yield f"{start}{name}", digest_of(tensor)
    yield "statistics", digest_of(_statistics(program.module))


def _called(graph_module: fx.GraphModule) -> Iterator[nn.Module]:
    """The modules that a graph calls, whose settings its code does not show; without observers."""
    for node in graph_module.graph.find_nodes(op="call_module"):
        if not str(node.target).startswith(OBSERVERS):
            yield graph_module.get_submodule(str(node.target))


def _observers(module: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Each observer with its path and the names of its statistics."""
    for path, observer in module.named_modules():
        for kind, names in _STATISTICS.items():
            if isinstance(observer, kind):
                yield path, observer, names


def _statistics(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """The statistics of all observers, by path."""
    return {path: tuple(_copied(getattr(each, name)) for name in names) for path, each, names in _observers(module)}


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value  # an observer changes its list of halves


class Resumption:
    """The state of a calibration, which is written from time to time, and read when a run is resumed.

    Args:
        module: the observed module; its observers get the statistics that were written.
        generator: the generator of probes; it gets the state that was written.
        gradients: whether gradients are computed, if nothing was written.

    Attributes:
        counted: the indices of the batches that were used.
        gradients: whether gradients are computed.
    """

    def __init__(self, journal: Journal, module: nn.Module, generator: torch.Generator, gradients: bool) -> None:
        self._journal, self._module, self._generator = journal, module, generator
        self.counted: list[int] = []
        self.gradients = gradients
        self._batches = self._next = 0
        found: Gathered | None = journal.last(CALIBRATION)
        if found is not None:
            self._resume(found)

    def _resume(self, found: Gathered) -> None:
        self.counted, self.gradients = list(found.counted), found.gradients
        self._batches = self._next = found.batches
        self._generator.set_state(found.generator)
        for path, observer, names in _observers(self._module):
            for name, value in zip(names, found.statistics[path], strict=True):
                setattr(observer, name, value)

    def has(self, index: int) -> bool:
        """Whether the statistics have the batch of an index; called for each batch in turn, before it is run."""
        if index < self._batches:
            return True
        if index > self._next:
            self._next = index
            self._journal.write(CALIBRATION, self._gathered, due=False)
        return False

    def done(self, batches: int) -> None:
        """Write the statistics of all batches, unless they are written."""
        if batches > self._batches:
            self._next = batches
            self._journal.write(CALIBRATION, self._gathered)

    def _gathered(self) -> Gathered:
        state = self._generator.get_state()
        return Gathered(self._next, tuple(self.counted), self.gradients, state, _statistics(self._module))
