"""Capture by torch.export: every operation becomes an ATen operator, and weights are read by `get_attr`.

Sizes of inputs are fixed to those of the example. Only the batch dimension and, for integer inputs [batch, length], the
length may vary, if the model's code allows it; vmap does not, for the dimension that it maps. The ranges that export
found for these are asserted in the graph: a call with other sizes fails and does not return a wrong result. So is what
the model's code asks about values, if nothing else captures the model: whether a mask has any entry, for instance.
"""

from __future__ import annotations

import functools
import inspect
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch import config
from torch.utils import _pytree as pytree

from balf_fx.calibration.batches import MODEL_ERRORS, holds_tensor
from balf_fx.capture.contexts import transforms
from balf_fx.capture.lengths import symbolic_lengths
from balf_fx.capture.names import illegal_name
from balf_fx.capture.outputs import nested
from balf_fx.capture.tracing import guard_constant, plain, user_line
from balf_fx.errors import CaptureError
from balf_fx.graph.operators import aten
from balf_fx.graph.parameters import get_tensor

_LOGGER = logging.getLogger(__name__)
_COPIES = (aten.lift_fresh_copy.default, aten.detach.default, aten.detach_.default, aten.alias.default)


def export(
    model: nn.Module, positional: Mapping[str, Any], keywords: Mapping[str, Any], conditional: bool = False
) -> fx.GraphModule:
    """Export a model with a dynamic batch dimension, and a dynamic length of its token inputs.

    The batch dimension is dimension 0 of every tensor that has the same size there as the first tensor. A batch of one
    is doubled, since export treats a dimension of one as a constant.

    Args:
        model: its parameters become those of the graph.
        positional, keywords: the arguments of an example call by name. No two of their tensors may share memory, since
            export would take them for one input.
        conditional: whether the graph may be one that is only valid for inputs for which the model's code takes the
            same branches, and computes the same sizes from their values; it asserts that.

    Raises:
        CaptureError: the model cannot be exported.
    """
    illegal = illegal_name(model)
    if illegal is not None:
        raise CaptureError(
            f"{type(model).__name__} cannot be exported: torch.export allows no module called {illegal!r}"
        )
    leaves = pytree.tree_leaves((positional, keywords))
    batch = next((leaf.shape[0] for leaf in leaves if _has_batch(leaf)), None)
    if batch == 1:
        positional, keywords = pytree.tree_map_only(Tensor, _doubled, (dict(positional), dict(keywords)))
        batch = 2
    args, kwargs = tuple(positional.values()), dict(keywords)
    try:
        with _named_keywords(model, keywords), symbolic_lengths(model):
            bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
            shapes = pytree.tree_map(lambda leaf: _dynamic(leaf, batch), dict(bound))
            program = _exported(model, args, kwargs, shapes, conditional)
        if any(transforms(program.graph)):  # those of vmap become operations on batches
            program = program.run_decompositions({})
        exported = program.module()
    # Export raises errors of many classes, most of them private; all are treated in the same way here.
    except (*MODEL_ERRORS, torch._dynamo.exc.TorchDynamoException) as error:
        reason = str(error).strip().partition("\n")[0] or f"{type(error).__name__} in torch.export"
        raise CaptureError(f"{type(model).__name__} cannot be exported: {user_line(error)}{reason}") from error
    example = {**positional, **keywords}
    return _plain(exported, list(positional), example, type(model).__name__, program.range_constraints)


@contextmanager
def _named_keywords(model: nn.Module, keywords: Iterable[str]) -> Iterator[None]:
    """Let the model's `forward` have a parameter for each keyword in place of `**kwargs`.

    With `**kwargs`, torch 2.8 does not export dynamic shapes.
    """
    forward = model.forward
    signature = inspect.signature(forward)
    named = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    names = {each.name for each in named}
    if len(named) == len(signature.parameters):
        yield
        return
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in keywords if name not in names]

    def with_names(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    with_names.__signature__ = signature.replace(parameters=[*named, *added])  # type: ignore[attr-defined]
    own = vars(model).get("forward")
    model.forward = with_names
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _exported(model: nn.Module, args: Any, kwargs: Any, shapes: Any, conditional: bool) -> torch.export.ExportedProgram:
    """Export with gradients, without which some layers take fast paths that hide their operations."""

    def exported() -> torch.export.ExportedProgram:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)

    try:
        with torch.enable_grad():
            return exported()
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        if conditional and _ON_VALUES in str(error) and _branches_are_asserted():
            return _with_conditions(exported, error)
        if not any(word in str(error) for word in _WITHOUT_GRADIENTS):
            raise
    with torch.no_grad():
        return exported()


def _with_conditions(
    exported: Callable[[], torch.export.ExportedProgram], reason: Exception
) -> torch.export.ExportedProgram:
    """Export with the example's values; what the model's code asks about integers and truth values is asserted.

    Raises:
        Exception: the given reason, if the code asks about other numbers, which export does not assert.
    """
    with torch.enable_grad(), _real_values():
        program = exported()
    if not all(symbol.is_integer for symbol in program.range_constraints):
        raise reason
    line = user_line(reason).removesuffix(": ")
    _LOGGER.warning(
        "the model's code branches on values, or computes sizes from them%s: the graph raises an error for inputs "
        "with others than the example's",
        f" ({line})" if line else "",
    )
    for node in program.graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        node.args = (node.args[0], f"{_OTHER_VALUES} ({node.args[1]})")
    return program


class _Branch(nn.Module):
    """Takes one of two branches."""

    def forward(self, value: Tensor) -> Tensor:
        return value + 1 if value.sum() > 0 else value - 1


@functools.cache
def _branches_are_asserted() -> bool:
    """Whether a graph that is exported with real values asserts its branches: torch 2.8 only asserts sizes."""
    with _real_values():
        values = [sign * torch.ones(2, device="cpu") for sign in (1, -1)]
        programs = [torch.export.export(_Branch(), (value,), strict=False) for value in values]
    found = [program.graph.find_nodes(op="call_function", target=aten._assert_scalar.default) for program in programs]
    return all(found)


def _real_values() -> AbstractContextManager[Any]:
    """Lets export compute with the example's values."""
    patched: AbstractContextManager[Any] = config.patch(fake_tensor_propagate_real_tensors=True)
    return patched


_OTHER_VALUES = (
    "the model's code branches on values of its input, or computes sizes from them, and this graph was captured on an "
    "example for which they are others: torch.compile(model, backend='balf') runs such a model"
)

_ON_VALUES = "data-dependent"
"""In the errors of branches and sizes that depend on values of tensors."""

_WITHOUT_GRADIENTS = ("inplace", "in-place", "out=")
"""Words in the errors of operations that autograd does not allow."""


def _has_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _doubled(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.dim() > 0 and tensor.shape[0] == 1 else tensor


def _dynamic(leaf: Any, batch: int | None) -> Any:
    if not _has_batch(leaf):
        return None
    if leaf.shape[0] != batch:
        return {}
    tokens = leaf.dim() == 2 and not leaf.is_floating_point()
    return dict.fromkeys((0, 1) if tokens and leaf.shape[1] > 1 else (0,), torch.export.Dim.AUTO)


def _plain(
    exported: fx.GraphModule,
    names: Sequence[str],
    example: Mapping[str, Any],
    class_name: str,
    ranges: dict[Any, Any],
) -> fx.GraphModule:
    """A GraphModule that is called like the model, without export's calling convention and guards."""
    graph = exported.graph
    guards = [node for node in graph.find_nodes(op="call_module") if str(node.target) == "_guards_fn"]
    # These assert dtypes and devices of intermediate values, which change where the result is cast or moved.
    guards += graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default)
    for node in guards:
        graph.erase_node(node)
    _drop_copies_of_constants(exported)
    info: Any = graph._codegen.pytree_info  # type: ignore[attr-defined]
    flat = graph.find_nodes(op="placeholder")
    args, kwargs = pytree.tree_unflatten(flat, info.in_spec)
    inputs = {**dict(zip(names, args, strict=True)), **kwargs}
    _name_inputs(graph, {name: inputs[name] for name in example}, example, ranges)
    output = graph.output_node()
    leaves = output.args[0] if isinstance(output.args[0], list | tuple) else (output.args[0],)
    with graph.inserting_before(output):
        output.args = (nested(graph, pytree.tree_unflatten(leaves, info.out_spec)),)
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(exported, plain(graph), class_name)


def _drop_copies_of_constants(exported: fx.GraphModule) -> None:
    """Read constants of the model's code themselves, not export's copies: unpickling would make these new constants."""
    for node in exported.graph.nodes:
        source = node.args[0] if node.target in _COPIES else None
        if not isinstance(source, fx.Node) or source.op != "get_attr" or not _only_reads(node):
            continue
        if not isinstance(get_tensor(exported, str(source.target)), nn.Parameter):
            node.replace_all_uses_with(source)
            exported.graph.erase_node(node)


def _only_reads(node: fx.Node) -> bool:
    """Whether a node neither changes the values that it reads nor returns a view, which others might change."""
    if node.target in _COPIES:
        return all(map(_only_reads, node.users))
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    return not schema.is_mutable and all(value.alias_info is None for value in schema.returns)


def _name_inputs(
    graph: fx.Graph, inputs: Mapping[str, Any], example: Mapping[str, Any], ranges: dict[Any, Any]
) -> None:
    """Create one placeholder for each argument, with its name; arguments without tensors keep their values."""
    start = next(iter(graph.nodes))
    constants = {name for name, value in example.items() if not holds_tensor(value)}
    placeholders: dict[str, fx.Node] = {}
    for name in inputs:
        with graph.inserting_before(start):
            placeholders[name] = graph.placeholder(name)
    leaves = [(name, leaf) for name, value in inputs.items() for leaf in _scatter(graph, placeholders[name], value)]
    order = list(graph.nodes)
    with graph.inserting_before(order[max(map(order.index, (leaf for _, leaf in leaves)), default=0) + 1]):
        for name, leaf in leaves:
            if name in constants:
                guard_constant(graph, leaf, example[name])
            elif isinstance(leaf.meta.get("val"), Tensor):
                _guard_shape(graph, leaf, name, leaf.meta["val"].shape, ranges)
    for name in reversed(list(inputs)):
        if name not in constants:
            break
        placeholders[name].args = (example[name],)


def _guard_shape(graph: fx.Graph, node: fx.Node, name: str, shape: Sequence[Any], ranges: dict[Any, Any]) -> None:
    """Assert in the graph that an input has sizes for which the graph is valid."""
    for dimension, size in enumerate(shape):
        low, high = _limits(size, ranges, is_batch=dimension == 0)
        if low == high:
            message = (
                f"{name!r} had size {low} in dimension {dimension} when torch.export captured the graph and cannot "
                "have another; capture='symbolic_trace' allows other sizes if the model does"
            )
            _assert_size(graph, node, dimension, operator.eq, low, message)
            continue
        message = (
            f"{name!r} has {low} to {high or 'any'} in dimension {dimension} of the graph that torch.export captured"
        )
        if low > 1:
            _assert_size(graph, node, dimension, operator.ge, low, message)
        if high is not None:
            _assert_size(graph, node, dimension, operator.le, high, message)


def _assert_size(graph: fx.Graph, node: fx.Node, dimension: int, compare: Any, limit: int, message: str) -> None:
    size = graph.call_method("size", (node, dimension))
    graph.call_function(torch._assert, (graph.call_function(compare, (size, limit)), message))


def _limits(size: Any, ranges: dict[Any, Any], is_batch: bool) -> tuple[int, int | None]:
    """The least and the largest size for which a graph is valid; None for the largest if there is no limit."""
    known = size if isinstance(size, int) else size.node.maybe_as_int()
    found = None if known is not None else ranges.get(size.node.expr)
    if found is None:
        only = size.node.hint if known is None else known
        return only, only
    low, high = int(found.lower), int(found.upper) if found.upper.is_Integer else None
    low, high = _around(size, ranges, low, high, is_batch)
    # Export assumes at least 2; the graph is also valid for a batch of one (`capture.single`), not for a length of one.
    return (1 if is_batch and low == 2 else low), high


_WALK = 1024  # how many sizes above the example's are tried where conditions cannot be solved


def _around(size: Any, ranges: dict[Any, Any], low: int, high: int | None, is_batch: bool) -> tuple[int, int | None]:
    """The sizes around the example's, from low to high, for which the conditions of the model's code hold.

    Most conditions follow from the range. Others ask whether a size, or a part of it, is a certain number, as 1 often
    is; or compare it with a limit; or ask whether it is even, so that no other size is left. Of batches, all sizes are
    right if all that are tried are, and conditions on other sizes, too, are taken to hold.
    """
    from torch.utils._sympy.value_ranges import bound_sympy  # only here: it imports sympy

    environment, symbol, given = size.node.shape_env, size.node.expr, size.node.hint
    conditions = [environment.replace(guard.expr) for guard in environment.guards]
    for condition in (each for each in conditions if symbol in each.free_symbols):
        if bool(bound_sympy(condition, ranges).lower):
            continue
        if condition.free_symbols != {symbol} and is_batch:
            continue
        if condition.free_symbols != {symbol}:
            return given, given
        root = _root(condition, symbol)
        if root is not None:
            low, high = (max(low, root + 1), high) if root < given else (low, root - 1)
            continue
        low = next((n + 1 for n in range(given, low - 1, -1) if not bool(condition.subs(symbol, n))), low)
        most = given + _WALK if high is None else min(high, given + _WALK)
        wrong = (n - 1 for n in range(given, most + 1) if not bool(condition.subs(symbol, n)))
        high = next(wrong, high if is_batch else most)
    return low, high


def _root(condition: Any, symbol: Any) -> int | None:
    """The size that a condition `a * size != b` excludes; None for any other condition."""
    if type(condition).__name__ != "Unequality":
        return None
    difference = condition.lhs - condition.rhs
    slope = difference.diff(symbol) if difference.is_polynomial(symbol) else None
    if slope is None or not slope.is_Integer or slope == 0:
        return None
    root = -difference.subs(symbol, 0) / slope
    return int(root) if root.is_Integer else None


def _scatter(graph: fx.Graph, source: fx.Node, value: Any) -> list[fx.Node]:
    """Replace export's flat placeholders by `source`, or by its items if it is a container.

    Returns:
        The nodes that replace the flat placeholders.
    """
    if isinstance(value, fx.Node):
        source.meta = dict(value.meta)
        value.replace_all_uses_with(source)
        graph.erase_node(value)
        return [source]
    found = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        flat = [leaf for leaf in pytree.tree_leaves(item) if isinstance(leaf, fx.Node)]
        if flat:
            with graph.inserting_before(flat[0]):
                picked = graph.call_function(operator.getitem, (source, key))
            found += _scatter(graph, picked, item)
    return found
