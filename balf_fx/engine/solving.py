"""Apply an allocation to all parts of a program: solve for the factors, refit them, and rewrite the graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from balf_fx.budget.problem import Problem, settle
from balf_fx.calibration.batches import Calibration
from balf_fx.calibration.observers import OBSERVERS
from balf_fx.calibration.weights import Weights
from balf_fx.checkpoint.journal import NO_JOURNAL, Journal
from balf_fx.engine.program import Program, Step, Trace, linked
from balf_fx.engine.rewriting import Written, rewrite
from balf_fx.engine.weighing import call_weights
from balf_fx.graph.allocation import Allocation
from balf_fx.graph.annotation import graph_record, sites
from balf_fx.passes import Refit
from balf_fx.passes.observe import remove_observers
from balf_fx.passes.refit import AnyMode
from balf_fx.progress import SILENT, Progress
from balf_fx.refit.offload import Shelved


def settled(program: Program, problem: Problem, allocation: Allocation) -> Program:
    """A copy of the program whose graphs record their allocations."""
    copied = program.copy()
    settle(copied.counted, problem, allocation)
    return copied


def without_observers(program: Program) -> Program:
    """A copy of the program that computes what the original does."""
    copied = program.copy()
    for graph_module in copied.graph_modules:
        if hasattr(graph_module, OBSERVERS):
            remove_observers(graph_module)
        graph_module.recompile()
    return copied


def carry_out(
    program: Program,
    mode: AnyMode | None,
    calibration: Calibration,
    progress: Progress = SILENT,
    written: Written = "pairs",
    journal: Journal = NO_JOURNAL,
    done: Callable[[nn.Module], None] | None = None,
) -> None:
    """Solve and rewrite each part, in the order in which they run.

    A part is refitted on the outputs of the compressed parts before it where the traces link them to its inputs, and
    on the original's values elsewhere.

    Args:
        mode: the mode of the refit; None for no refit.
        calibration: has batches if there is a refit.
        written: as in `rewrite`; the outputs are the same.
        journal: has the layers that were refitted before a run was killed.
        done: as in `rewrite`.
    """
    if mode is None:
        for graph_module in program.graph_modules:
            rewrite(graph_module, written, done)
        _share_layers(program)
        return
    with _Relay(program, calibration) as relay:
        work = [float(_work(graph_module)) for graph_module in program.graph_modules]
        for index, span in enumerate(progress.spans(work)):
            graph_module = program.graph_modules[index]
            if sites(graph_module):
                inputs, handed, weights = relay.inputs(index), relay.handed(index), relay.weights(index)
                own, group, turns = journal.within(f"part {index}"), calibration.group, relay.turns(index)
                Refit(inputs, mode, calibration.memory, handed, weights, group, span, own, calibration.pages, turns)(
                    graph_module
                )
            rewrite(graph_module, written, done)
            relay.run(index)
            span.done()
    _share_layers(program)


def _share_layers(program: Program) -> None:
    """Let parts that use the same layer share one copy of its replacement."""
    held: dict[str, nn.Module] = {}
    for graph_module in program.graph_modules:
        for layer in graph_record(graph_module).replaced:
            module = held.setdefault(layer.name, graph_module.get_submodule(layer.name))
            graph_module.set_submodule(layer.name, module)


def _work(graph_module: fx.GraphModule) -> int:
    return max(len(sites(graph_module)), 1)


class _Relay:
    """Passes the outputs of compressed parts on to the parts that run after them."""

    def __init__(self, program: Program, calibration: Calibration) -> None:
        self._program = program
        self._calibration = calibration
        self._batches = calibration.batches
        self._shapes = [_without_values(trace) for trace in map(program.trace, self._batches)]
        self._places: dict[tuple[int, int], int] = {}  # index in `_outputs` by (batch, step)
        self._outputs = Shelved(calibration.memory)

    def __enter__(self) -> _Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._outputs.close()

    def inputs(self, part: int) -> Sequence[Mapping[str, Any]]:
        """The original's values of a part's placeholders by name, for each run."""
        return _Inputs(self._program, self._batches, self._runs(part), part)

    def turns(self, part: int) -> Sequence[int]:
        """The turn of each run of a part."""
        turns = self._calibration.in_turn
        return [turns[batch] for batch, _ in self._runs(part)]

    def handed(self, part: int) -> Sequence[Mapping[str, Any]]:
        """The values by name, for each run of a part, that compressed parts compute in place of the original."""
        return [dict(self._handed(part, batch, step)) for batch, step in self._runs(part)]

    def weights(self, part: int) -> Sequence[Mapping[str, Weights]]:
        """The weights of a part's positions by name of a mask, for each run."""
        return _RunWeights(self._program, self._calibration, self._runs(part), part)

    def run(self, part: int) -> None:
        """Run a rewritten part if a later one reads its outputs and they have changed."""
        changed = bool(graph_record(self._program.graph_modules[part]).replaced)
        readers = {
            (batch, link.step)
            for batch, shape in enumerate(self._shapes)
            for step in shape
            for link in step.links
            if step.part > part and shape[link.step].part == part
        }
        for batch, step in sorted(readers):
            if not (changed or any((batch, link.step) in self._places for link in self._shapes[batch][step].links)):
                continue
            trace = self._program.trace(self._batches[batch])
            args = linked(trace[step], [self._known(batch, earlier) for earlier in range(step)])
            self._places[batch, step] = len(self._outputs)
            self._outputs.append(pytree.tree_leaves(self._program.graph_modules[part](*args)))

    def _runs(self, part: int) -> list[tuple[int, int]]:
        return [
            (batch, index)
            for batch, shape in enumerate(self._shapes)
            for index, step in enumerate(shape)
            if step.part == part
        ]

    def _known(self, batch: int, step: int) -> list[Any] | None:
        place = self._places.get((batch, step))
        return None if place is None else self._outputs[place]

    def _handed(self, part: int, batch: int, index: int) -> Iterator[tuple[str, Any]]:
        names = _placeholders(self._program.graph_modules[part])
        for link in self._shapes[batch][index].links:
            outputs = self._known(batch, link.step)
            if outputs is not None:
                yield names[link.leaf], outputs[link.output]


class _Inputs(Sequence[Mapping[str, Any]]):
    """The inputs of a part's runs, read from the batches one at a time."""

    def __init__(self, program: Program, batches: Sequence[Any], runs: Sequence[tuple[int, int]], part: int) -> None:
        self._program, self._batches, self._runs = program, batches, runs
        self._names = _placeholders(program.graph_modules[part])

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, index: Any) -> Any:
        batch, step = self._runs[index]
        trace = self._program.trace(self._batches[batch])
        return dict(zip(self._names, trace[step].args, strict=True))


class _RunWeights(Sequence[Mapping[str, Weights]]):
    """The weights of a part's runs, made from one batch at a time."""

    def __init__(self, program: Program, calibration: Calibration, runs: Sequence[tuple[int, int]], part: int) -> None:
        self._program, self._calibration, self._runs, self._part = program, calibration, runs, part

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, index: Any) -> Any:
        batch, _ = self._runs[index]
        values = self._calibration.batches[batch]
        return call_weights(self._program, values, self._calibration.given(batch, values)).parts[self._part]


def _placeholders(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]


def _without_values(trace: Trace) -> list[Step]:
    """The parts and links of a trace without its tensors."""
    return [Step(step.part, (), step.links) for step in trace]
