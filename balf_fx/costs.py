"""What a graph costs, counted as `torch.utils.flop_counter` counts it, and what a site costs as a function of rank."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from balf_fx.linalg import tail_energies
from balf_fx.sites import Candidate, RankCurve, Site, Spectrum, annotate, record_graph

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


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


def profile(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run the graph once on `inputs`, one for each placeholder; record its FLOPs and annotate every node with its own.

    Returns:
        The graph's output.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where it is installed: only when needed

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with torch.no_grad(), counter:
        output = _Profiler(graph_module, counter).run(*inputs)
    record_graph(graph_module, flops=counter.get_total_flops())
    return output


def rank_params(site: Site, rank: int | None, bias: bool) -> int:
    """Parameters of a site at a rank (None: dense), with or without a bias on its output."""
    outputs, inputs = site.out_features, site.in_features
    weights = 0 if rank is None else rank * (outputs + inputs)
    if rank is None or site.keeps_weight:
        weights += outputs * inputs
    return site.groups * (weights + (outputs if bias else 0))


def rank_flops(site: Site, rank: int | None, dense_flops: int, output_elements: int) -> int:
    """FLOPs of a site at a rank.

    The first factor is the layer itself with r outputs per group in place of O; the second takes r multiply-adds for
    each element of the output.

    Args:
        dense_flops, output_elements: of all uses of the site together.
    """
    if rank is None or dense_flops == 0:
        return dense_flops
    return dense_flops // site.out_features * rank + 2 * rank * output_elements


def rank_curve(site: Site, spectrum: Spectrum, dense_flops: int, output_elements: int) -> RankCurve:
    """Every choice there is for a site: ranks 1 .. break-even, then dense at distortion 0."""
    tail = tail_energies(spectrum)
    bias = site.bias is not None or spectrum.mean is not None
    ranks = [
        Candidate(rank, rank_flops(site, rank, dense_flops, output_elements), rank_params(site, rank, bias), tail[rank])
        for rank in range(1, site.break_even + 1)  # break-even is below min(O, D): the tail reaches that far
    ]
    dense = Candidate(None, dense_flops, rank_params(site, None, site.bias is not None), 0.0)
    return RankCurve((*ranks, dense), tail[0])
