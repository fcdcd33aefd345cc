"""Calibration and scores block by block, where the statistics of all layers take more than the memory.

All batches run through one block of the graph (`graph.blocks`). Then its sites are scored, and their statistics and the
directions that their ranks keep go to files, before the next block begins. Where gradients are observed, the blocks run
without them first, and then back from the last to the first; sites and widths are scored on the way back. Sums are in
the same order as where all layers run at once, and the result is the same bit for bit; only a layer or a value that
several blocks use adds up its uses in another order. This needs one process, and no gradients of weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from balf_fx.calibration.batches import Calibration, is_empty, ordinary, run_batch, telling
from balf_fx.calibration.calls import Answering, placeholder_values
from balf_fx.calibration.coverage import unseen
from balf_fx.calibration.describing import describe
from balf_fx.calibration.gradients import Wanted, differentiable, loss_of, outputs, recording
from balf_fx.calibration.moments import Moments
from balf_fx.calibration.observers import CovarianceObserver, SensitivityObserver, observer_of
from balf_fx.calibration.pages import Pages
from balf_fx.calibration.pieces import Piece, pieces_for_blocks
from balf_fx.calibration.sample import Gradients, Sample
from balf_fx.calibration.weights import CallWeights, check_fit, weighing
from balf_fx.engine.program import Program
from balf_fx.engine.settings import Settings
from balf_fx.engine.stages import Work
from balf_fx.engine.walking import walk, walk_back, walk_out
from balf_fx.engine.weighing import call_weights
from balf_fx.graph.annotation import annotate, annotation, graph_record, record_graph, sites
from balf_fx.graph.blocks import Block, find_blocks, weight_bytes
from balf_fx.graph.curves import RankCurve, Spectrum
from balf_fx.graph.widths import WidthCurve
from balf_fx.passes import Score, ScoreWidths
from balf_fx.passes.score_widths import judges
from balf_fx.progress import SILENT, Progress
from balf_fx.refit.offload import Shelved


def paged(program: Program, settings: Settings, calibration: Calibration, lenient: bool = False) -> Calibration:
    """Calibration with files for what is scored, if the program goes block by block.

    It does where weights, statistics and spectra exceed the memory, and where the calibration has files already.

    Args:
        lenient: whether the program may run without gradients where none flow, which a block cannot know.
    """
    factors = settings.chosen_factors
    possible = factors in ("activations", "svd") or (factors == "sensitivity" and not lenient)
    if not possible or program.is_traced or settings.times or calibration.group.size > 1:
        return dataclasses.replace(calibration, pages=None)
    if calibration.pages is None and sum(_sizes(program.graph_modules[0]).values()) > calibration.memory:
        calibration = dataclasses.replace(calibration, pages=Pages())
    if calibration.pages is not None:
        calibration.pages.release()  # what capture has read and freed
    return calibration


def _sizes(graph_module: fx.GraphModule) -> dict[fx.Node, int]:
    """The bytes of each node's weights and, at the first node of each site, of its statistics and its spectra."""
    found = weight_bytes(graph_module)
    for site, (node, *_) in sites(graph_module).items():
        rank, spectra = site.full_rank, 1 if site.parts == 1 else 2
        numbers = site.groups * rank * (rank + spectra * site.out_features)
        observer = observer_of(graph_module, annotation(node).sensitivity, SensitivityObserver)
        if observer is not None:
            features = site.groups * site.in_features // site.taps if observer.wants_features else 0
            numbers += 2 * (2 * site.groups * rank**2 + features**2)
        found[node] = found.get(node, 0) + 8 * numbers
    return found


def calibrate_in_blocks(
    program: Program,
    settings: Settings,
    batches: Iterable[Any],
    calibration: Calibration,
    work: Work,
    progress: Progress = SILENT,
) -> None:
    """Run batches through an observed program of one graph and score its sites and widths, block by block.

    Args:
        batches: read once.
        work: how long both take, for the progress bar.

    Raises:
        CalibrationError: as `compress.calibrate`.
    """
    graph_module, memory = program.graph_modules[0], calibration.memory
    settings.align()(graph_module)
    settings.find_pivots()(graph_module)
    if settings.chosen_factors == "sensitivity":
        _there_and_back(program, settings, batches, calibration, work, progress)
        return
    blocks, calls = find_blocks(graph_module, _sizes(graph_module), memory), _Calls(program, calibration, batches)
    times, names = [work.calibrating, work.scoring], ["calibrating", "scoring"]
    shares = iter(progress.spans(times * len(blocks), names * len(blocks)))

    def finish(block: Block) -> None:
        next(shares).done()
        _score(graph_module, dataclasses.replace(settings.score(), progress=next(shares)), block, calibration.pages)

    walk(graph_module, blocks, calls, memory, finish, calls.around).close()
    calls.check()


def _there_and_back(
    program: Program,
    settings: Settings,
    batches: Iterable[Any],
    calibration: Calibration,
    work: Work,
    progress: Progress,
) -> None:
    """As `calibrate_in_blocks`, with gradients."""
    graph_module, pages, memory = program.graph_modules[0], calibration.pages, calibration.memory
    gradients = _observers(graph_module, SensitivityObserver)  # in the block of their value, to see all of its gradient
    blocks = find_blocks(graph_module, _sizes(graph_module), memory, gradients)
    calls = _Calls(program, calibration, batches, blocks)
    times = [work.calibrating / 3] * len(blocks) + [work.calibrating * 2 / 3, work.scoring] * len(blocks)
    names = ["calibrating"] * len(blocks) + ["calibrating", "scoring"] * len(blocks)
    shares, score = iter(progress.spans(times, names)), settings.score()
    seen, complete = _last_calls(graph_module, "observer"), _first_calls(graph_module)
    scored = set[str]()

    def there(block: Block) -> None:
        next(shares).done()
        _park(graph_module, _within(block, seen), pages)

    def back(block: Block) -> None:
        next(shares).done()
        ranks, sizes = next(shares).spans([1.0, 2.0])
        own = _within(block, complete)
        _score_sites(graph_module, dataclasses.replace(score, progress=ranks), own, pages)
        scored.update(own)
        if settings.widths:
            _score_widths(graph_module, ScoreWidths(score.damping, progress=sizes), scored, pages)

    shelves = walk_out(graph_module, blocks, calls, memory, there, calls.around, keep=True)
    calls.check()
    counted = _observers(graph_module, CovarianceObserver)  # on the way there
    left = [dataclasses.replace(each, nodes=tuple(n for n in each.nodes if n not in counted)) for each in blocks]
    walk_back(graph_module, left, shelves, memory, back, calls.differentiated, calls.loss)


def score_in_blocks(graph_module: fx.GraphModule, score: Score, calibration: Calibration) -> None:
    """Score the sites of a calibrated graph block by block; those that `calibrate_in_blocks` has scored stay so."""
    for block in find_blocks(graph_module, _sizes(graph_module), calibration.memory):
        _score(graph_module, score, block, calibration.pages)


class _Calls:
    """The calls of a program on some batches, and what is to be known of each while it runs.

    Args:
        blocks: where gradients are observed, the blocks of the graph; batches are then run in pieces that fit.
    """

    def __init__(
        self,
        program: Program,
        calibration: Calibration,
        batches: Iterable[Any],
        blocks: Sequence[Block] | None = None,
    ) -> None:
        self._program, self._calibration, self._batches, self._blocks = program, calibration, batches, blocks
        self._known: list[tuple[int, str, Tensor | None, CallWeights]] = []
        self._run = Shelved(calibration.memory)  # the batches, for the way back
        self._generator = torch.Generator("cpu").manual_seed(calibration.seed)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        graph_module = self._program.graph_modules[0]
        for index, (batch, given) in self._pieces():
            words = describe(batch)
            with telling(words, index):
                values = placeholder_values(graph_module, batch, self._calibration.forward)
                self._known.append((index, words, given, call_weights(self._program, batch, given)))
            if self._blocks is not None:
                self._run.append([batch])
            yield values

    def _pieces(self) -> Iterator[tuple[int, Piece]]:
        """What is run at once, with the index of its batch."""
        graph_module, calibration = self._program.graph_modules[0], self._calibration
        for index, made in enumerate(self._batches):
            batch = ordinary(made)
            if is_empty(batch):
                continue
            pieces = iter([(batch, calibration.given(index, batch))])
            if self._blocks is not None:
                pieces = pieces_for_blocks(graph_module, next(pieces), calibration, index, self._blocks)
            yield from ((index, piece) for piece in pieces)

    @contextmanager
    def around(self, call: int) -> Iterator[None]:
        """The context in which a call runs."""
        index, words, _, weights = self._known[call]
        with telling(words, index), weighing(self._program.graph_modules, weights):
            yield

    @contextmanager
    def differentiated(self, block: Block, call: int) -> Iterator[Callable[[], Iterable[Wanted]]]:
        """The context in which a block runs for a call, on the way back."""
        graph_module = self._program.graph_modules[0]
        targets = dict.fromkeys(str(node.target) for node in block.nodes if node.op == "call_module")
        observers = [observer_of(graph_module, target, SensitivityObserver) for target in targets]
        with (
            self.around(call),
            recording([each for each in observers if each is not None], self._run[call][0]) as records,
            differentiable(graph_module),
        ):
            yield lambda: outputs(records)

    def loss(self, call: int, output: Any) -> Tensor:
        """The scalar whose gradients are observed in a call."""
        (index, _, _, weights), (batch,) = self._known[call], self._run[call]
        forward, graph_module = self._calibration.forward, self._program.graph_modules[0]
        answer = run_batch(Answering(graph_module, [output]), batch, forward, index, gradients=True)
        return loss_of(answer, batch, self._calibration, index, self._generator, weights.outputs)

    def check(self) -> None:
        """Raise if the user's weights are no weights of the positions in a call."""
        for index, _, given, weights in self._known:
            check_fit(given, weights, index)


def _last_calls(graph_module: fx.GraphModule, observer: str) -> dict[str, fx.Node]:
    """The last node that calls an observer of each site, by the name of the site; its own last, where there is none.

    Args:
        observer: the attribute of the annotation that names it.
    """
    called = {str(node.target): node for node in graph_module.graph.find_nodes(op="call_module")}
    return {
        site.name: called.get(getattr(annotation(nodes[0]), observer) or "", nodes[-1])
        for site, nodes in sites(graph_module).items()
    }


def _first_calls(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    """The first node of each site, which is the last of them on the way back."""
    return {site.name: nodes[0] for site, nodes in sites(graph_module).items()}


def _within(block: Block, calls: Mapping[str, fx.Node]) -> set[str]:
    """The names of the sites whose node is in a block."""
    own = set(block.nodes)
    return {name for name, node in calls.items() if node in own}


def _observers(graph_module: fx.GraphModule, kind: type[nn.Module]) -> set[fx.Node]:
    """The nodes that call observers of a kind."""
    calls = graph_module.graph.find_nodes(op="call_module")
    return {node for node in calls if observer_of(graph_module, str(node.target), kind) is not None}


def _score(graph_module: fx.GraphModule, score: Score, block: Block, pages: Pages | None) -> None:
    """Score the sites that are complete with a block; their statistics and directions go to files."""
    _score_sites(graph_module, score, _within(block, _last_calls(graph_module, "observer")), pages)


def _score_sites(graph_module: fx.GraphModule, score: Score, names: Set[str], pages: Pages | None) -> None:
    if score.factors != "svd":
        names = names - unseen(graph_module).keys()
    dataclasses.replace(score, only=frozenset(names))(graph_module)
    _park(graph_module, names, pages)


def _score_widths(graph_module: fx.GraphModule, score: ScoreWidths, scored: Set[str], pages: Pages | None) -> None:
    """Score the widths that layers judge which are all scored; what was computed goes to files."""
    record = graph_record(graph_module)
    names = {node.name: site.name for site, nodes in sites(graph_module).items() for node in nodes}
    done = zip(record.widths, record.width_curves, strict=False)
    known = {width.key for width, curve in done if curve is not None}
    ready = {width.key for width in record.widths if {names.get(node) for node in judges(width)} <= scored} - known
    dataclasses.replace(score, only=ready)(graph_module)
    if pages is not None:
        curves = zip(record.widths, graph_record(graph_module).width_curves, strict=True)
        parked = [_parked(curve, pages) if width.key in ready else curve for width, curve in curves]
        record_graph(graph_module, width_curves=tuple(parked))
        pages.release()


def _park(graph_module: fx.GraphModule, names: Set[str], pages: Pages | None) -> None:
    """Move the statistics of sites to files, and the directions that their ranks keep."""
    if pages is None:
        return
    marks = [annotation(nodes[0]) for site, nodes in sites(graph_module).items() if site.name in names]
    moved: dict[int, tuple[Any, Any]] = {}  # by the id of what was there: that and what takes its place
    for path in dict.fromkeys(path for mark in marks for path in (mark.strips, mark.observer)):
        observer = observer_of(graph_module, path, CovarianceObserver)
        if observer is not None:
            before, observer.moments = observer.moments, _parked(observer.moments, pages)
            moved[id(before)] = (before, observer.moments)
    for mark in marks:
        sensitivity = observer_of(graph_module, mark.sensitivity, SensitivityObserver)
        if sensitivity is not None:
            halves, sensitivity.halves = sensitivity.halves, [_parked(half, pages) for half in sensitivity.halves]
            moved |= {id(old): (old, new) for old, new in zip(halves, sensitivity.halves, strict=True)}
    for site, nodes in sites(graph_module).items():
        mark = annotation(nodes[0])
        if site.name in names and mark.curve is not None and mark.scored_with is not None:
            scored_with = tuple(moved.get(id(each), (each, each))[1] for each in mark.scored_with)
            curve = _parked(mark.curve, pages)
            for node in nodes:
                annotate(node, curve=curve, scored_with=scored_with)
    pages.release()


_LARGE: Mapping[type, tuple[str, ...]] = {
    Moments: ("scatter",),
    Gradients: ("scatter", "parts"),
    Sample: ("gradients", "moments", "features"),
    Spectrum: ("left", "right"),
    RankCurve: ("spectrum", "parts", "strips"),
    WidthCurve: ("covariances", "left", "right"),
}
"""The attributes that are large, or hold what is."""

_T = TypeVar("_T")


def _parked(value: _T, pages: Pages) -> _T:
    """Statistics or a curve with its large tensors in files; the same object if they are there already."""
    if isinstance(value, Tensor):
        return pages.park(value)  # type: ignore[return-value]
    if isinstance(value, tuple):
        return tuple(_parked(each, pages) for each in value)  # type: ignore[return-value]
    own = {name: getattr(value, name) for name in _LARGE.get(type(value), ())}
    moved = {name: _parked(each, pages) for name, each in own.items()}
    changed = {name: each for name, each in moved.items() if each is not own[name]}
    return dataclasses.replace(value, **changed) if changed else value  # type: ignore[type-var]


def answering(program: Program, calibration: Calibration, pages: Pages) -> nn.Module:
    """A module that, called on each of the batches in turn, returns what a program of one graph computes for it.

    It has been computed block by block, and is kept within the memory.
    """
    graph_module = program.graph_modules[0]
    calls = _Calls(program, calibration, calibration.batches)
    blocks = find_blocks(graph_module, weight_bytes(graph_module), calibration.memory)
    outputs = walk(graph_module, blocks, calls, calibration.memory, lambda _: pages.release(), calls.around)
    return Answering(graph_module, outputs)
