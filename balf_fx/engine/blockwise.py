"""Calibration and scores block by block, where the statistics of all layers take more than the memory.

All batches run through one block of the graph (`graph.blocks`). Then its sites are scored, and their statistics and the
directions that their ranks keep go to files, before the next block begins. Where gradients are observed, all blocks run
forward first, and then backward from the last to the first; sites and widths are scored in the backward pass. Sums are
in the same order as where all layers run at once, and the result is the same bit for bit; only a layer or a value that
several blocks use adds up its uses in another order. Gradients of weights are not observed in this way.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

from torch import fx, nn

from balf_fx.calibration.batches import Calibration
from balf_fx.calibration.calls import KnownOutputs
from balf_fx.calibration.coverage import unseen
from balf_fx.calibration.merging import check_alike
from balf_fx.calibration.observers import CovarianceObserver, SensitivityObserver, observer_of
from balf_fx.calibration.pages import Pages
from balf_fx.calibration.parking import park_curves, parked
from balf_fx.checkpoint.journal import Journal
from balf_fx.engine.calls import Calls
from balf_fx.engine.finished import Finished
from balf_fx.engine.program import Program
from balf_fx.engine.projecting import bytes_read
from balf_fx.engine.resuming import CALIBRATION
from balf_fx.engine.settings import Settings
from balf_fx.engine.stages import Work
from balf_fx.engine.walking import walk, walk_backward
from balf_fx.graph.annotation import annotation, graph_record, record_graph, sites
from balf_fx.graph.blocks import Block, find_blocks, weight_bytes
from balf_fx.passes import Score, ScoreWidths
from balf_fx.passes.score_widths import scoring_layers
from balf_fx.progress import Progress
from balf_fx.refit.offload import Shelved


def paged(program: Program, settings: Settings, calibration: Calibration, lenient: bool) -> Calibration:
    """Calibration with files for what is scored, if the program goes block by block.

    It does where weights, statistics and spectra exceed the memory of a process, and where the calibration has files
    already.

    Args:
        lenient: whether the program may run without gradients where none flow, which a block cannot know.
    """
    factors = settings.chosen_factors
    possible = factors in ("activations", "svd") or (factors == "sensitivity" and not lenient)
    if not possible or program.is_traced or settings.times:
        return dataclasses.replace(calibration, pages=None)
    if calibration.pages is None and sum(_sizes(program.graph_modules[0]).values()) > _bound(calibration):
        calibration = dataclasses.replace(calibration, pages=Pages())
    if calibration.pages is not None:
        calibration.pages.release()  # what capture has read and freed
    return calibration


def _sizes(graph_module: fx.GraphModule) -> dict[fx.Node, int]:
    """The bytes of each node's weights and, at the first node of each site, of its statistics and its spectra."""
    found = weight_bytes(graph_module)
    for site, (node, *_) in sites(graph_module).items():
        rank, directions = site.full_rank, site.out_features * (1 if site.parts == 1 else 2)
        nbytes = 8 * site.groups * rank * (rank + directions)
        observer = observer_of(graph_module, annotation(node).sensitivity, SensitivityObserver)
        if observer is not None:  # halves of the statistics, and spectra with a map to their directions
            features = site.groups * site.in_features // site.taps if observer.wants_features else 0
            nbytes += 8 * (site.groups * rank * (4 * rank + directions) + 2 * features**2)
            nbytes += 0 if observer.basis is None else observer.basis.nbytes
        found[node] = found.get(node, 0) + nbytes
    return found


def calibrate_in_blocks(
    program: Program,
    settings: Settings,
    batches: Iterable[Any],
    calibration: Calibration,
    work: Work,
    progress: Progress,
    journal: Journal,
) -> None:
    """Run batches through an observed program of one graph and score its sites and widths, block by block.

    Args:
        batches: read once.
        work: how long both take, for the progress bar.
        journal: has the statistics of the blocks that a run finished before it was killed. What is computed of them is
            computed again.

    Raises:
        CalibrationError: as `compress.calibrate`.
    """
    graph_module = program.graph_modules[0]
    check_alike(graph_module, calibration.group)
    dataclasses.replace(settings.align(), group=calibration.group)(graph_module)
    settings.find_pivots()(graph_module)
    run = _forward_and_backward if settings.chosen_factors == "sensitivity" else _forward
    run(program, settings, batches, calibration, work, progress, journal)


def _forward(
    program: Program,
    settings: Settings,
    batches: Iterable[Any],
    calibration: Calibration,
    work: Work,
    progress: Progress,
    journal: Journal,
) -> None:
    """As `calibrate_in_blocks`, without gradients."""
    graph_module, group, pages = program.graph_modules[0], calibration.group, _pages(calibration)
    blocks = find_blocks(graph_module, _sizes(graph_module), _bound(calibration))
    moments = Finished(graph_module, blocks, CovarianceObserver, CALIBRATION)
    calls = Calls(program, calibration, batches)
    times, names = [work.calibrating, work.scoring], ["calibrating", "scoring"]
    shares = iter(progress.spans(times * len(blocks), names * len(blocks)))
    score, scorable = dataclasses.replace(settings.score(), group=group), _scorable(graph_module, blocks)

    def finish(index: int) -> None:
        next(shares).done()
        moments.settle(index, journal, group, pages)
        _score_sites(graph_module, dataclasses.replace(score, progress=next(shares)), scorable[index], pages)

    moments.resume(journal, group, pages)
    if moments.complete:
        _finish_known(batches, range(len(blocks)), finish)
        return
    calls.check(walk(graph_module, moments.unfinished(blocks), calls, calibration.memory, finish, calls.around))


def _forward_and_backward(
    program: Program,
    settings: Settings,
    batches: Iterable[Any],
    calibration: Calibration,
    work: Work,
    progress: Progress,
    journal: Journal,
) -> None:
    """As `calibrate_in_blocks`, with gradients."""
    graph_module, group, pages = program.graph_modules[0], calibration.group, _pages(calibration)
    # Observers of gradients are in the block that computes their value, to see all of its gradient.
    blocks = find_blocks(graph_module, _sizes(graph_module), _bound(calibration), _observing(graph_module))
    moments = Finished(graph_module, blocks, CovarianceObserver, CALIBRATION)
    gradients = Finished(graph_module, blocks, SensitivityObserver, f"{CALIBRATION} with gradients", backward=True)
    calls = Calls(program, calibration, batches, blocks)
    times = [work.calibrating / 3] * len(blocks) + [work.calibrating * 2 / 3, work.scoring] * len(blocks)
    names = ["calibrating"] * len(blocks) + ["calibrating", "scoring"] * len(blocks)
    shares, scored = iter(progress.spans(times, names)), set[str]()
    score, scorable = dataclasses.replace(settings.score(), group=group), _scorable(graph_module, blocks, backward=True)

    def finish_forward(index: int) -> None:
        next(shares).done()
        moments.settle(index, journal, group, pages)

    def finish_backward(index: int) -> None:
        next(shares).done()
        ranks, sizes = next(shares).spans([1.0, 2.0])
        gradients.settle(index, journal, group, pages)
        _score_sites(graph_module, dataclasses.replace(score, progress=ranks), scorable[index], pages)
        scored.update(scorable[index])
        if settings.widths:
            _score_widths(graph_module, ScoreWidths(score.damping, group=group, progress=sizes), scored, pages)

    _park_bases(graph_module, pages)
    for each in (moments, gradients):
        each.resume(journal, group, pages)
    if moments.complete and gradients.complete:
        _finish_known(batches, reversed(range(len(blocks))), finish_backward)
        return
    memory = calibration.memory
    shelves: dict[int, Shelved] = {}
    forward, backward = moments.unfinished(blocks), gradients.unfinished(moments.unobserved(blocks))
    calls.check(walk(graph_module, forward, calls, memory, finish_forward, calls.around, shelves))
    walk_backward(graph_module, backward, shelves, memory, finish_backward, calls.differentiated, calls.loss)


def _park_bases(graph_module: fx.GraphModule, pages: Pages) -> None:
    """Move the bases in which gradients are observed to files."""
    for observer in graph_module.modules():
        if isinstance(observer, SensitivityObserver) and observer.basis is not None:
            observer.basis = pages.park(observer.basis)
    pages.release()


def _pages(calibration: Calibration) -> Pages:
    return Pages() if calibration.pages is None else calibration.pages


def _bound(calibration: Calibration) -> int:
    """The bytes that a block may take, the same in all processes."""
    return min(calibration.group.gathered(calibration.memory))


def _finish_known(batches: Iterable[Any], indices: Iterable[int], finish: Callable[[int], None]) -> None:
    """Finish blocks whose statistics are known, and read the batches, which are not run."""
    deque(batches, maxlen=0)
    for index in indices:
        finish(index)


def score_in_blocks(graph_module: fx.GraphModule, score: Score, calibration: Calibration) -> None:
    """Score the sites of a calibrated graph block by block; those that `calibrate_in_blocks` has scored stay so."""
    blocks = find_blocks(graph_module, _sizes(graph_module), _bound(calibration))
    for names in _scorable(graph_module, blocks):
        _score_sites(graph_module, score, names, _pages(calibration))


def _scorable(graph_module: fx.GraphModule, blocks: Sequence[Block], backward: bool = False) -> list[set[str]]:
    """For each block, the names of the sites all of whose observers are finished with it, in either pass."""
    places = {node: index for index, block in enumerate(blocks) for node in block.nodes}
    called = defaultdict[str, list[int]](list)
    for node in graph_module.graph.find_nodes(op="call_module"):
        if node in places:  # not of constants alone
            called[str(node.target)].append(places[node])
    found: list[set[str]] = [set() for _ in blocks]
    for site, nodes in sites(graph_module).items():
        mark = annotation(nodes[0])
        paths = (mark.sensitivity,) if backward else (mark.observer, mark.strips)
        own = [*(place for path in paths for place in called[path or ""]), places[nodes[0]]]
        found[min(own) if backward else max(own)].add(site.name)
    return found


def _observing(graph_module: fx.GraphModule) -> set[fx.Node]:
    """The nodes that call observers of gradients."""
    calls = graph_module.graph.find_nodes(op="call_module")
    return {node for node in calls if observer_of(graph_module, str(node.target), SensitivityObserver) is not None}


def _score_sites(graph_module: fx.GraphModule, score: Score, names: Set[str], pages: Pages) -> None:
    """Score some sites; the directions that their ranks keep go to files."""
    if score.factors != "svd":
        names = names - unseen(graph_module).keys()
    dataclasses.replace(score, only=frozenset(names))(graph_module)
    park_curves(graph_module, names, pages)


def _score_widths(graph_module: fx.GraphModule, score: ScoreWidths, scored: Set[str], pages: Pages) -> None:
    """Score the widths whose scoring layers are all scored; what was computed goes to files."""
    record = graph_record(graph_module)
    names = {node.name: site.name for site, nodes in sites(graph_module).items() for node in nodes}
    done = zip(record.widths, record.width_curves, strict=False)
    known = {width.key for width, curve in done if curve is not None}
    ready = {
        width.key for width in record.widths if {names.get(node) for node in scoring_layers(width)} <= scored
    } - known
    dataclasses.replace(score, only=ready)(graph_module)
    curves = zip(record.widths, graph_record(graph_module).width_curves, strict=True)
    moved = [parked(curve, pages) if width.key in ready else curve for width, curve in curves]
    record_graph(graph_module, width_curves=tuple(moved))
    pages.release()


def with_known_outputs(program: Program, calibration: Calibration, pages: Pages) -> nn.Module:
    """A module that, called on each of the batches in turn, returns what a program of one graph computes for it.

    The graph runs block by block.
    """
    graph_module = program.graph_modules[0]
    calls = Calls(program, calibration, calibration.batches)
    blocks = find_blocks(graph_module, bytes_read(graph_module), calibration.memory)
    outputs = walk(graph_module, blocks, calls, calibration.memory, lambda _: pages.release(), calls.around)
    return KnownOutputs(graph_module, outputs)
