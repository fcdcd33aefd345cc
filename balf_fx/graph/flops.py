"""The FLOPs of a graph, counted as `torch.utils.flop_counter` counts them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from balf_fx.graph.annotation import annotate, annotation, record_graph
from balf_fx.graph.experts import read_assignment

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


class _Profiler(fx.Interpreter):
    """Runs a graph node by node, as torch's ShapeProp does, and annotates each node with its FLOPs."""

    def __init__(self, graph_module: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(graph_module)
        self.counter = counter

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if isinstance(n.target, torch._ops.HigherOrderOperator):  # the counter cannot count inside these with gradients
            args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        return tuple(map(_mutable, args)), {key: _mutable(value) for key, value in kwargs.items()}

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        shape = tuple(result.shape) if isinstance(result, torch.Tensor) else None
        number = result if isinstance(result, int) else None
        annotate(n, flops=self.counter.get_total_flops() - before, shape=shape, number=number)
        assigned = read_assignment(n)
        if assigned is not None:
            annotate(n, loads=assigned.loads(self.env[assigned.node], result.shape[0]))
        return result


class _NoModules(contextlib.nullcontext[None]):
    """Replaces the counter's tracker of modules, whose global hooks would affect Dynamo in other threads."""

    parents = frozenset({"Global"})


def _mutable(value: Any) -> Any:
    """Convert FX's immutable lists and dicts to ordinary ones, since some functions change their arguments."""
    if isinstance(value, list):
        return [_mutable(item) for item in value]
    if isinstance(value, dict):
        return {key: _mutable(item) for key, item in value.items()}
    return value


_GROUPED = (
    *("aten::_grouped_mm", "aten::_scaled_grouped_mm", "aten::_scaled_grouped_mm_v2"),
    "transformers::grouped_mm_fallback",
)


def flop_counter() -> FlopCounterMode:
    """torch's counter, with operators that it leaves out: the attention kernel of CPUs and grouped products."""
    # only here: it imports triton where that is installed
    from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

    def count(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    added: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count}
    added |= dict.fromkeys(_operators(_GROUPED), grouped_flops)
    missing = {operator: formula for operator, formula in added.items() if operator not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=missing)


def _operators(names: Iterable[str]) -> Iterator[Any]:
    """The operators with these names that are registered here."""
    for name in names:
        namespace, _, own = name.partition("::")
        if hasattr(getattr(torch.ops, namespace), own):
            yield getattr(getattr(torch.ops, namespace), own)


def grouped_flops(first: Sequence[int], second: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of a grouped product from the shapes of its operands, each [rows, columns] with or without groups before.

    Every row, column or summand of a matrix without groups belongs to one group: it costs as much as in one product.
    """
    groups = first[0] if len(first) == len(second) == 3 else 1
    return 2 * groups * first[-2] * first[-1] * second[-1]


def count_flops(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """FLOPs of one call of a model without gradients."""
    with torch.no_grad(), flop_counter() as counter:
        model(*args, **kwargs)
    return int(counter.get_total_flops())


def profile(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run the graph once on `inputs`, one for each placeholder, and record the FLOPs of the graph and of every node.

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
    """FLOPs and number of output elements over all uses of a site, as recorded by `profile`."""
    marks = [annotation(node) for node in nodes]
    return sum(mark.flops or 0 for mark in marks), sum(math.prod(mark.shape or (0,)) for mark in marks)
