"""What a graph costs, counted as `torch.utils.flop_counter` counts it, and what a site costs as a function of rank."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from balf_fx.linalg import tail_energies
from balf_fx.sites import (
    Candidate,
    EnergyCurve,
    PartRanks,
    Rank,
    RankCurve,
    Site,
    Spectrum,
    annotate,
    annotation,
    record_graph,
)

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

_POINTS = 64  # of an energy curve: more than a picture shows, few enough to be kept with the model


class _Profiler(fx.Interpreter):
    """Runs a graph node by node, as torch's ShapeProp does, and annotates each node with its FLOPs."""

    def __init__(self, graph_module: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(graph_module)
        self.counter = counter

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if isinstance(n.target, torch._ops.HigherOrderOperator):  # the counter cannot look into these with gradients
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        return tuple(map(_mutable, args)), {key: _mutable(value) for key, value in kwargs.items()}

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        shape = tuple(result.shape) if isinstance(result, torch.Tensor) else None
        annotate(n, flops=self.counter.get_total_flops() - before, shape=shape)
        return result


class _NoModules(contextlib.nullcontext[None]):
    """In place of the counter's tracker of modules, whose global hooks Dynamo would meet in other threads."""

    parents = frozenset({"Global"})


def _mutable(value: Any) -> Any:
    """Lists and dicts as generated code passes them, for FX's immutable ones: some functions change their arguments."""
    if isinstance(value, list):
        return [_mutable(item) for item in value]
    if isinstance(value, dict):
        return {key: _mutable(item) for key, item in value.items()}
    return value


def flop_counter() -> FlopCounterMode:
    """torch's counter. Some versions leave out the attention kernel of CPUs, which counts here as all others do."""
    # only here: it imports triton where that is installed
    from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

    def count(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={} if kernel in flop_registry else {kernel: count})


def profile(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run the graph once on `inputs`, one for each placeholder; record its FLOPs and annotate every node with its own.

    Returns:
        The graph's output.
    """
    counter = flop_counter()
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with torch.no_grad(), counter:
        output = _Profiler(graph_module, counter).run(*inputs)
    record_graph(graph_module, flops=counter.get_total_flops())
    return output


def use(nodes: Iterable[fx.Node]) -> tuple[int, int]:
    """FLOPs and output elements of all uses of a site together, as `profile` recorded them."""
    marks = [annotation(node) for node in nodes]
    return sum(mark.flops or 0 for mark in marks), sum(math.prod(mark.shape or (0,)) for mark in marks)


def rank_params(site: Site, rank: Rank, bias: bool) -> int:
    """Parameters of a site at a rank; with `bias` a site that has none gains one for what is not dense."""
    outputs, inputs = site.out_features, site.in_features
    total, parts, dense = _spread(rank)
    weights = total * (outputs // parts + inputs) + dense * (outputs // parts * inputs)
    if site.keeps_weight and rank is not None:
        weights += outputs * inputs
    biased = outputs if site.bias is not None else outputs // parts * (parts - dense) * bias
    return site.groups * (weights + biased)


def rank_flops(site: Site, rank: Rank, dense_flops: int, output_elements: int) -> int:
    """FLOPs of a site at a rank.

    The first factor is the layer itself with r outputs per group in place of O; the second takes r multiply-adds for
    each element of the output, or of that part of the output to which the rank belongs.

    Args:
        dense_flops, output_elements: of all uses of the site together.
    """
    if dense_flops == 0:
        return 0
    total, parts, dense = _spread(rank)
    return (
        dense_flops // site.out_features * total + 2 * total * output_elements // parts + dense_flops // parts * dense
    )


def _spread(rank: Rank) -> tuple[int, int, int]:
    """The outputs of the first factor per group, how many parts there are, and how many of them stay dense."""
    ranks = rank if isinstance(rank, tuple) else (rank,)
    return sum(r or 0 for r in ranks), len(ranks), ranks.count(None)


def rank_curve(
    site: Site, spectrum: Spectrum, dense_flops: int, output_elements: int, parts: Spectrum | None = None
) -> RankCurve:
    """Every choice there is for a site: ranks 1 .. break-even, ranks of its parts, then dense at distortion 0.

    Args:
        parts: the spectrum of the site's parts, if these may have factors of their own.
    """
    tail = tail_energies(spectrum)
    bias = site.bias is not None or spectrum.mean is not None

    def candidate(rank: Rank, distortion: float) -> Candidate:
        flops = rank_flops(site, rank, dense_flops, output_elements)
        return Candidate(rank, flops, rank_params(site, rank, bias), distortion)

    # Break-even is below min(O, D): the tail reaches that far.
    joint = [candidate(rank, tail[rank]) for rank in range(1, site.break_even + 1)]
    split = [] if parts is None else [candidate(*choice) for choice in _parts_choices(site, parts, tail)]
    dense = Candidate(None, dense_flops, rank_params(site, None, site.bias is not None), 0.0)
    return RankCurve((*joint, *split, dense), tail[0], output_elements, spectrum, parts)


def energy_curve(site: Site, curve: RankCurve) -> EnergyCurve:
    """What ranks of the site as a whole keep, up to the full rank; a site of no energy keeps all of it."""
    tail = tail_energies(curve.spectrum)
    steps = min(_POINTS - 1, site.full_rank)
    ranks = sorted({max(i, round(site.full_rank * (i / steps) ** 2)) for i in range(steps + 1)})
    return EnergyCurve(tuple(ranks), tuple(round(1.0 - curve.normalised(tail[rank]), 5) for rank in ranks))


def largest_part_rank(site: Site) -> int:
    """The largest rank of a part: at its D inputs the part had better stay dense."""
    return min(site.out_features // site.parts, site.in_features - 1)


def parts_candidate(site: Site, parts: Spectrum, ranks: PartRanks, dense_flops: int, output_elements: int) -> Candidate:
    """The choice of one rank, or None for dense, for each part of a site."""
    lost = [float(row[rank:].sum()) for row, rank in zip(parts.energies, ranks, strict=True) if rank is not None]
    flops = rank_flops(site, ranks, dense_flops, output_elements)
    return Candidate(ranks, flops, rank_params(site, ranks, site.bias is not None or parts.mean is not None), sum(lost))


def _parts_choices(site: Site, parts: Spectrum, tail: Sequence[float]) -> Iterator[tuple[PartRanks, float]]:
    """Ranks of the parts, ascending in cost, that lose less than whatever costs no more, with what they lose.

    Any of the parts may stay dense. A component costs the same in each of the others, so that there the largest
    energies are the best choice; each keeps one component at least.
    """
    outputs, inputs, largest = site.out_features // site.parts, site.in_features, largest_part_rank(site)
    price = outputs + inputs
    choices: list[tuple[int, float, tuple[int, ...], Tensor]] = []
    for count in range(1, site.parts + 1):
        for thin in itertools.combinations(range(site.parts), count):
            rest = parts.energies[list(thin), 1:largest]
            order = torch.argsort(rest.flatten(), descending=True, stable=True)
            lost = parts.energies[list(thin), 1:].sum() - torch.cat(
                [rest.new_zeros(1), rest.flatten()[order].cumsum(0)]
            )
            fixed = (site.parts - count) * outputs * inputs + count * price
            choices += [(fixed + i * price, value, thin, order[:i]) for i, value in enumerate(lost.tolist())]
    choices.sort(key=lambda choice: choice[:3])
    best = math.inf
    for cost, lost_here, thin, chosen in choices:
        rank = cost // (site.out_features + inputs)
        if cost >= site.out_features * inputs:
            return
        if lost_here < min(best, tail[min(rank, len(tail) - 1)]):
            best = lost_here
            counts = torch.bincount(chosen // max(largest - 1, 1), minlength=len(thin)) + 1
            ranks = dict(zip(thin, counts.tolist(), strict=True))
            yield tuple(ranks.get(part) for part in range(site.parts)), max(best, 0.0)
