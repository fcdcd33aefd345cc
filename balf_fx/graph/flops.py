"""The FLOPs of a graph, counted as `torch.utils.flop_counter` counts them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """Replaces the tracker of modules, whose global hooks affect Dynamo in other threads and do not work for views."""

    parents = frozenset({"Global"})


def _mutable(value: Any) -> Any:
    """Convert FX's immutable lists and dicts to ordinary ones, since some functions change their arguments."""
    if isinstance(value, list):
        return [_mutable(item) for item in value]
    if isinstance(value, dict):
        return {key: _mutable(item) for key, item in value.items()}
    return value


def flop_counter() -> FlopCounterMode:
    """torch's counter, with operators that it leaves out: attention on CPUs, grouped products, recurrent layers..."""
    # only here: it imports triton where that is installed
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    added: dict[Any, Any] = {}
    for formula, names in _FORMULAS.items():
        added |= dict.fromkeys(_operators(names), formula)
    missing = {
        operator: formula
        for operator, formula in added.items()
        if operator not in flop_registry or formula is attention_flops  # torch's fails for fewer heads up to 2.11
    }
    counter = FlopCounterMode(display=False, custom_mapping=missing)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


def _operators(names: Iterable[str]) -> Iterator[Any]:
    """The operators with these names that are registered here."""
    for name in names:
        namespace, _, own = name.partition("::")
        if hasattr(getattr(torch.ops, namespace), own):
            yield getattr(getattr(torch.ops, namespace), own)


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of both products of attention from the shapes [N, heads, length, size]; keys may have fewer heads."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def grouped_flops(first: Sequence[int], second: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of a grouped product from the shapes of its operands, each [rows, columns] with or without groups before.

    Every row, column or summand of a matrix without groups belongs to one group: it costs as much as in one product.
    """
    groups = first[0] if len(first) == len(second) == 3 else 1
    return 2 * groups * first[-2] * first[-1] * second[-1]


def _lstm_layer_flops(value: Sequence[int], *rest: Any, **__: Any) -> int:
    """FLOPs of one direction of an LSTM's layer, from its input [steps, samples, features] and its two matrices."""
    return _recurrent_flops(value, rest[:2])


def _recurrent_flops(value: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """FLOPs of the matrix products of recurrent layers: each matrix is multiplied at each position."""
    matrices = sum(math.prod(shape) for shape in weights if len(shape) > 1)
    return 2 * math.prod(value[:-1]) * matrices


def _trilinear_flops(*args: Any, **__: Any) -> int:
    """FLOPs of a bilinear layer: of the sum over the product of three tensors that are broadcast to one shape.

    Args:
        args: the shapes of the tensors, and for each of them its dimensions of size 1 in this shape.
    """
    shapes = []
    for shape, added in zip(args[:3], args[3:6], strict=True):
        sizes = iter(shape)
        shapes.append([1 if index in added else next(sizes) for index in range(len(shape) + len(added))])
    return 2 * math.prod(int(max(sizes)) for sizes in zip(*shapes, strict=True))


def _matrix_vector_flops(*args: Any, **__: Any) -> int:
    """FLOPs of a product of a matrix and a vector, with or without a vector that is added."""
    rows, columns = next(shape for shape in args if len(shape) == 2)
    return 2 * int(rows) * int(columns)


def _deformable_flops(value: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """FLOPs of a convolution at deformed positions, without the interpolation."""
    return 2 * math.prod(weight) * math.prod((value[0], *out_shape[2:]))


_FORMULAS: dict[Callable[..., int], tuple[str, ...]] = {
    attention_flops: tuple(
        f"aten::_scaled_dot_product_{kernel}"
        for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    ),
    grouped_flops: (
        *("aten::_grouped_mm", "aten::_scaled_grouped_mm", "aten::_scaled_grouped_mm_v2"),
        "transformers::grouped_mm_fallback",
    ),
    _lstm_layer_flops: ("aten::mkldnn_rnn_layer",),
    _recurrent_flops: ("aten::_cudnn_rnn", "aten::miopen_rnn"),
    _trilinear_flops: ("aten::_trilinear",),
    _matrix_vector_flops: ("aten::mv", "aten::addmv"),
    _deformable_flops: ("torchvision::deform_conv2d",),
}


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
    with torch.no_grad(), flop_counter() as counter:
        output = _Profiler(graph_module, counter).run(*inputs)
    record_graph(graph_module, flops=counter.get_total_flops())
    return output


def flops_and_outputs(nodes: Iterable[fx.Node]) -> tuple[int, int]:
    """FLOPs and number of output elements over all uses of a site, as recorded by `profile`."""
    marks = [annotation(node) for node in nodes]
    return sum(mark.flops or 0 for mark in marks), sum(math.prod(mark.shape or (0,)) for mark in marks)
