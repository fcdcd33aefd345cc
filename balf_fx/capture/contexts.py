"""Contexts inside of a graph: blocks without gradients are inlined, and what autocast casts is cast explicitly.

A graph runs node by node, for many batches at once and with gradients, so no node may switch a mode for those after it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from balf_fx.errors import CaptureError
from balf_fx.graph.parameters import get_tensor, parameter_users, put

Autocast = tuple[str, torch.dtype, bool, bool]
"""The arguments of a context of autocast: device type, dtype, whether it is enabled, whether it caches."""


def check_transforms(graph_module: fx.GraphModule) -> None:
    """Check that a graph does not run inside of a transform of `torch.func`.

    Raises:
        CaptureError: it does.
    """
    transform = next(transforms(graph_module.graph), None)
    if transform is not None:
        raise CaptureError(
            f"the model uses a transform of torch.func ({transform.name}), such as vmap, whose operations belong to no "
            "graph: write it with operations on batches"
        )


def transforms(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes where a transform of `torch.func` begins."""
    for node in graph.nodes:
        if node.op == "call_function" and str(getattr(node.target, "__name__", "")).endswith("_increment_nesting"):
            yield node


def inline_contexts(graph_module: fx.GraphModule) -> None:
    """Inline the blocks that torch.export and Dynamo put into contexts of gradients and autocast, in place."""
    graph = graph_module.graph
    changed = True
    while changed:
        changed = False
        for node in list(graph.nodes):
            name = str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""
            changed |= name in _BLOCKS and _inline(graph_module, node, _BLOCKS[name])
            if node.target is torch._C._set_grad_enabled:
                graph.erase_node(node)
    graph_module.recompile()


_BLOCKS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Operators that run a graph in a context, with the number of arguments of the context."""


def _inline(graph_module: fx.GraphModule, node: fx.Node, count: int) -> bool:
    """Inline one block; returns whether it was."""
    graph, (body, *inputs) = graph_module.graph, node.args[count:]
    if any(user.target is not operator.getitem for user in node.users):
        return False
    path = str(body.target)  # type: ignore[union-attr]
    block = get_tensor(graph_module, path)
    known = dict(zip(block.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        entered = graph.call_function(_enter_autocast, node.args[:count]) if count == 4 else None
        before = node.prev
        results: Any = graph.graph_copy(block.graph, known)
        while before.next is not node:
            before = before.next
            if before.op == "get_attr":
                before.target = f"{path}.{before.target}"
        if entered is not None:
            graph.call_function(_exit_autocast, (entered,))
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    return True


def cast_explicitly(graph_module: fx.GraphModule, inputs: Sequence[Any], around: Sequence[Autocast] = ()) -> None:
    """Replace contexts of autocast by explicit casts of the arguments that they cast, in place.

    Weights that only autocast read in full precision become constants in the lower one (`passes.FoldConstants`).

    Args:
        inputs: an example, one for each placeholder.
        around: the contexts in which the model is called.
    """
    graph = graph_module.graph
    start = next(node for node in graph.nodes if node.op != "placeholder")
    for context in around:
        with graph.inserting_before(start):
            entered = graph.call_function(_enter_autocast, context)
        with graph.inserting_before(graph.output_node()):
            graph.call_function(_exit_autocast, (entered,))
    if not graph.find_nodes(op="call_function", target=_enter_autocast):
        return
    seen = _Casts(graph_module)
    with torch.no_grad():
        seen.run(*inputs)
    users, known = parameter_users(graph_module), dict[int, tuple[Tensor, nn.Parameter]]()
    for node, dtype in seen.casts.items():
        if node.op == "call_module":
            _cast_module(graph_module.get_submodule(str(node.target)), dtype, seen.casts, users, known)
        with graph.inserting_before(node):
            node.args = map_arg(node.args, lambda value: seen.cast(value, dtype))  # noqa: B023
            node.kwargs = map_arg(node.kwargs, lambda value: seen.cast(value, dtype))  # noqa: B023
    for target in (_exit_autocast, _enter_autocast):
        for node in graph.find_nodes(op="call_function", target=target):
            graph.erase_node(node)
    graph.lint()
    graph_module.recompile()


def _cast_module(
    module: nn.Module,
    dtype: torch.dtype,
    casts: Mapping[fx.Node, torch.dtype],
    users: Mapping[int, set[fx.Node]],
    known: dict[int, tuple[Tensor, nn.Parameter]],
) -> None:
    """Cast a module that only nodes with the same cast use; its parameters are the user's, and stay as they are.

    Args:
        known: the parameters that were cast, by id, and what they became.

    Raises:
        CaptureError: something else uses its weights.
    """
    cast = {id(new) for _, new in known.values()}
    readers = set[fx.Node]().union(*(users[id(each)] for each in module.parameters() if id(each) not in cast))
    if any(casts.get(reader) != dtype for reader in readers):
        raise CaptureError(f"a {type(module).__name__} is used inside and outside of a context of autocast")
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if parameter.is_floating_point() and id(parameter) not in cast:
            new = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            put(module, name, known.setdefault(id(parameter), (parameter, new))[1])
    for name, buffer in list(module.named_buffers()):
        if buffer.is_floating_point():
            put(module, name, buffer.to(dtype))


class _Casts(fx.Interpreter):
    """Runs a graph with its contexts and notes where autocast casts the arguments of a node, and to which dtype."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.casts: dict[fx.Node, torch.dtype] = {}
        self._dtypes: dict[fx.Node, torch.dtype] = {}
        self._open: list[Any] = []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run(*args, **kwargs)
        finally:
            for context in reversed(self._open):
                _exit_autocast(context)  # type: ignore[no-untyped-call]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is _enter_autocast:
            self._open.append(result)
        elif n.target is _exit_autocast:
            self._open.pop()
        elif self._open and n.op.startswith("call"):
            mine = _dtype(result)
            if mine is not None and mine != self._plain_dtype(n):
                self.casts[n] = mine
        if isinstance(result, Tensor):
            self._dtypes[n] = result.dtype
        return result

    def _plain_dtype(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of a node's value without autocast; None if its arguments do not fit together then."""
        with torch.autocast(self._open[-1].device, enabled=False):
            try:
                return _dtype(super().run_node(node))
            except RuntimeError:
                return None

    def cast(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A floating-point value in another dtype."""
        held = self._dtypes.get(value)
        if held is None or held == dtype or not held.is_floating_point:
            return value
        return value.graph.call_method("to", (value, dtype))


def _dtype(value: Any) -> torch.dtype | None:
    """The dtype of the first floating-point tensor in a value."""
    leaves = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
    return next((leaf.dtype for leaf in leaves if leaf.is_floating_point()), None)
