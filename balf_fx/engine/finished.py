"""The statistics of finished blocks: merged over processes, written, moved to files, and read by a resumed run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx

from balf_fx.calibration.merging import merge_statistics
from balf_fx.calibration.observers import CovarianceObserver, SensitivityObserver, observer_of
from balf_fx.calibration.pages import Pages
from balf_fx.calibration.parking import parked
from balf_fx.checkpoint.journal import Journal
from balf_fx.distributed.group import Group
from balf_fx.graph.blocks import Block


class Finished:
    """The statistics of the observers of a kind. An observer is finished with the last block that calls it.

    Args:
        blocks: in the order of the graph.
        kind: the class of the observers.
        stage: the name of the walk in the journal, which has the blocks that were finished before a run was killed.
        backward: whether the walk is from the last block to the first.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        blocks: Sequence[Block],
        kind: type[CovarianceObserver | SensitivityObserver],
        stage: str,
        backward: bool = False,
    ) -> None:
        self._stage = stage
        self._observers: dict[str, CovarianceObserver | SensitivityObserver] = {}
        self._calls: dict[fx.Node, str] = {}
        self._homes: dict[str, int] = {}  # the block with which each is finished
        for index, block in reversed(list(enumerate(blocks))) if backward else enumerate(blocks):
            for node in block.nodes:
                path = str(node.target)
                observer = observer_of(graph_module, path, kind) if node.op == "call_module" else None
                if observer is not None:
                    self._observers[path], self._calls[node], self._homes[path] = observer, path, index
        self._known = set[str]()

    @property
    def complete(self) -> bool:
        """Whether all observers were finished before."""
        return len(self._known) == len(self._homes)

    def resume(self, journal: Journal, group: Group, pages: Pages) -> None:
        """Read the statistics of the blocks that were finished before, in all processes."""
        for index in sorted(set(self._homes.values())):
            found = journal.last(self._name(index))
            if all(group.gathered(found is not None)):
                for path, statistics in found.items():
                    self._observers[path].statistics = parked(statistics, pages)
                    self._known.add(path)
                pages.release()

    def settle(self, index: int, journal: Journal, group: Group, pages: Pages) -> None:
        """Merge and write the statistics of the observers that are finished with a block, unless they were before."""
        own = [path for path, home in self._homes.items() if home == index and path not in self._known]
        for path in own:
            merge_statistics(self._observers[path], group)
        if own:
            journal.write(self._name(index), lambda: {path: self._observers[path].statistics for path in own})
        for path in own:
            self._observers[path].statistics = parked(self._observers[path].statistics, pages)
        pages.release()

    def unfinished(self, blocks: Sequence[Block]) -> list[Block]:
        """The blocks without the calls of observers that were finished before."""
        return self._without(blocks, {node for node, path in self._calls.items() if path in self._known})

    def unobserved(self, blocks: Sequence[Block]) -> list[Block]:
        """The blocks without the calls of all these observers."""
        return self._without(blocks, set(self._calls))

    def _without(self, blocks: Sequence[Block], dropped: set[fx.Node]) -> list[Block]:
        return [
            dataclasses.replace(block, nodes=tuple(node for node in block.nodes if node not in dropped))
            for block in blocks
        ]

    def _name(self, index: int) -> str:
        return f"{self._stage}, block {index}"
