"""Calibration and scores block by block, where the statistics of all layers take more than the memory.

All batches run through one block of the graph (`graph.blocks`). Then its sites are scored, and their statistics and the
directions that their ranks keep go to files, before the next block begins. Sums are in the same order as where all
layers run at once, and the result is the same bit for bit; only a layer that several blocks use adds up its uses in
another order. This needs all layers of a site alone, not the gradients of a loss at all of them, and one process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from balf_fx.calibration.batches import Calibration, is_empty, ordinary, telling
from balf_fx.calibration.calls import Answering, placeholder_values
from balf_fx.calibration.coverage import unseen
from balf_fx.calibration.describing import describe
from balf_fx.calibration.observers import CovarianceObserver, observer_of
from balf_fx.calibration.pages import Pages
from balf_fx.calibration.weights import CallWeights, check_fit, weighing
from balf_fx.engine.program import Program
from balf_fx.engine.settings import Settings
from balf_fx.engine.stages import Work
from balf_fx.engine.walking import walk
from balf_fx.engine.weighing import call_weights
from balf_fx.graph.annotation import annotate, annotation, sites
from balf_fx.graph.blocks import Block, find_blocks, weight_bytes
from balf_fx.graph.curves import RankCurve, Spectrum
from balf_fx.passes import Score
from balf_fx.progress import SILENT, Progress


def paged(program: Program, settings: Settings, calibration: Calibration) -> Calibration:
    """Calibration with files for what is scored, if the program goes block by block.

    It does where weights, statistics and spectra exceed the memory, and where the calibration has files already.
    """
    possible = settings.chosen_factors in ("activations", "svd") and not (program.is_traced or settings.times)
    if not possible or calibration.group.size > 1:
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
        found[node] = found.get(node, 0) + 8 * site.groups * rank * (rank + spectra * site.out_features)
    return found


def calibrate_in_blocks(
    program: Program,
    settings: Settings,
    batches: Iterable[Any],
    calibration: Calibration,
    work: Work,
    progress: Progress = SILENT,
) -> None:
    """Run batches through an observed program of one graph and score its sites, block by block.

    Args:
        batches: read once.
        work: how long both take, for the progress bar.

    Raises:
        CalibrationError: as `compress.calibrate`.
    """
    graph_module = program.graph_modules[0]
    settings.align()(graph_module)
    settings.find_pivots()(graph_module)
    score = settings.score()
    calls = _Calls(program, calibration, batches)
    blocks = find_blocks(graph_module, _sizes(graph_module), calibration.memory)
    times, names = [work.calibrating, work.scoring], ["calibrating", "scoring"]
    shares = iter(progress.spans(times * len(blocks), names * len(blocks)))

    def finish(block: Block) -> None:
        next(shares).done()
        _score(graph_module, dataclasses.replace(score, progress=next(shares)), block, calibration.pages)

    walk(graph_module, blocks, calls, calibration.memory, finish, calls.around).close()
    calls.check()


def score_in_blocks(graph_module: fx.GraphModule, score: Score, calibration: Calibration) -> None:
    """Score the sites of a calibrated graph block by block; those that `calibrate_in_blocks` has scored stay so."""
    for block in find_blocks(graph_module, _sizes(graph_module), calibration.memory):
        _score(graph_module, score, block, calibration.pages)


class _Calls:
    """The calls of a program on some batches, and what is to be known of each while it runs."""

    def __init__(self, program: Program, calibration: Calibration, batches: Iterable[Any]) -> None:
        self._program, self._calibration, self._batches = program, calibration, batches
        self._known: list[tuple[int, str, Tensor | None, CallWeights]] = []

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        graph_module, calibration = self._program.graph_modules[0], self._calibration
        for index, made in enumerate(self._batches):
            batch = ordinary(made)
            if is_empty(batch):
                continue
            given = calibration.given(index, batch)
            with telling(describe(batch), index):
                values = placeholder_values(graph_module, batch, calibration.forward)
                self._known.append((index, describe(batch), given, call_weights(self._program, batch, given)))
            yield values

    @contextmanager
    def around(self, call: int) -> Iterator[None]:
        """The context in which a call runs."""
        index, words, _, weights = self._known[call]
        with telling(words, index), weighing(self._program.graph_modules, weights):
            yield

    def check(self) -> None:
        """Raise if the user's weights are no weights of the positions in a call."""
        for index, _, given, weights in self._known:
            check_fit(given, weights, index)


def _last_calls(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    """The last node that calls the observer of each site, by the name of the site; its own, where there is none."""
    called = {str(node.target): node for node in graph_module.graph.find_nodes(op="call_module")}
    return {
        site.name: called.get(annotation(nodes[0]).observer or "", nodes[-1])
        for site, nodes in sites(graph_module).items()
    }


def _score(graph_module: fx.GraphModule, score: Score, block: Block, pages: Pages | None) -> None:
    """Score the sites that are complete with a block; their statistics and directions go to files."""
    own = set(block.nodes)
    names = {name for name, node in _last_calls(graph_module).items() if node in own}
    if score.factors != "svd":
        names -= unseen(graph_module).keys()
    dataclasses.replace(score, only=frozenset(names))(graph_module)
    if pages is None:
        return
    for site, nodes in sites(graph_module).items():
        mark = annotation(nodes[0])
        if site.name not in names or mark.curve is None or mark.scored_with is None:
            continue
        options, moments = mark.scored_with
        for path in (mark.strips, mark.observer):
            observer = observer_of(graph_module, path, CovarianceObserver)
            if observer is None or observer.moments is None:
                continue
            parked = pages.park(observer.moments.scatter)
            if parked is not observer.moments.scatter:  # not yet, by another site
                observer.moments = dataclasses.replace(observer.moments, scatter=parked)
            moments = observer.moments if path == mark.observer else moments
        for node in nodes:
            annotate(node, curve=_parked(mark.curve, pages), scored_with=(options, moments))
    pages.release()


def _parked(curve: RankCurve, pages: Pages) -> RankCurve:
    """The curve with its directions in files."""

    def parked(spectrum: Spectrum | None) -> Spectrum | None:
        if spectrum is None:
            return None
        right = None if spectrum.right is None else pages.park(spectrum.right)
        return dataclasses.replace(spectrum, left=pages.park(spectrum.left), right=right)

    spectrum = parked(curve.spectrum) or curve.spectrum
    return dataclasses.replace(curve, spectrum=spectrum, parts=parked(curve.parts), strips=parked(curve.strips))


def answering(program: Program, calibration: Calibration, pages: Pages) -> nn.Module:
    """A module that, called on each of the batches in turn, returns what a program of one graph computes for it.

    It has been computed block by block, and is kept within the memory.
    """
    graph_module = program.graph_modules[0]
    calls = _Calls(program, calibration, calibration.batches)
    blocks = find_blocks(graph_module, weight_bytes(graph_module), calibration.memory)
    outputs = walk(graph_module, blocks, calls, calibration.memory, lambda _: pages.release(), calls.around)
    return Answering(graph_module, outputs)
