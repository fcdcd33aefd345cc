"""Ranks and features that half of the samples choose, so that allocations are tried on samples that did not.

With few samples, the directions of low ranks and the features that are kept fit these samples, and an allocation
measured on them looks better than it is. Where they do, layers and widths have also been scored by the first half of
the samples (`RankCurve.half`, `WidthCurve.half`), and what this half chooses is tried on the second one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from torch import fx

from balf_fx.calibration.batches import Calibration, samples_of, some_samples
from balf_fx.graph.annotation import annotate, annotation, graph_record, record_graph, sites


def fits_samples(graph_modules: Iterable[fx.GraphModule]) -> bool:
    """Whether there are scores by the first half of the samples."""
    for graph_module in graph_modules:
        curves = [annotation(nodes[0]).curve for nodes in sites(graph_module).values()]
        if any(
            curve is not None and curve.half is not None
            for curve in (*curves, *graph_record(graph_module).width_curves)
        ):
            return True
    return False


def use_first_half(graph_modules: Iterable[fx.GraphModule]) -> None:
    """Let the first half of the samples choose ranks and features where it has scored them.

    Costs, and with them allocations, stay as they are.
    """
    for graph_module in graph_modules:
        for nodes in sites(graph_module).values():
            curve = annotation(nodes[0]).curve
            if curve is not None and curve.half is not None:
                own = dataclasses.replace(curve, spectrum=curve.half.spectrum, parts=curve.half.parts)
                for node in nodes:
                    annotate(node, curve=own)
        curves = graph_record(graph_module).width_curves
        record_graph(graph_module, width_curves=tuple(own if own is None else own.half or own for own in curves))


def half_of(calibration: Calibration, half: int) -> Calibration:
    """Every second sample, as observers divide them; of batches of one sample, every second batch."""

    def own(index: int, count: int) -> range:
        return range(half, count, 2) if count > 1 else range(index % 2 == half)

    return picked(calibration, own)


def picked(calibration: Calibration, numbers: Callable[[int, int], range]) -> Calibration:
    """Some samples of each batch, without the batches that keep none. Each batch is read once.

    Args:
        numbers: returns those of the samples that are kept, given the index of a batch and how many samples it has. A
            batch that cannot be counted is one sample.
    """
    batches, weights, turns = [], [], []
    for index, batch in enumerate(calibration.batches):
        count = samples_of(batch)
        own = numbers(index, count)
        if not own:
            continue
        given, whole = calibration.given(index, batch), len(own) == count
        batches.append(batch if whole else some_samples(batch, own.start, own.stop, own.step))
        turns.append(calibration.in_turn[index])
        if given is not None:
            weights.append(given if whole else given[own.start : own.stop : own.step])
    return dataclasses.replace(calibration, batches=batches, weights=weights, turns=turns)
