"""Let operations change their arguments in place again where the user's model does."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from balf_fx.graph.annotation import annotation
from balf_fx.graph.operators import is_convolution, operation, set_inplace_flag
from balf_fx.passes.base import Pass

_LAYERS = (nn.Linear, _ConvNd, _NormBase, nn.LayerNorm, nn.GroupNorm)
_PRODUCTS = frozenset(("linear", "addmm", "matmul", "mm", "bmm", "baddbmm"))
_OPERATIONS = _PRODUCTS | frozenset(
    (
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
        *("batch_norm", "layer_norm", "group_norm", "instance_norm"),
        *("add", "sub", "cat"),
    )
)


_VIEWS = frozenset(("movedim", "permute", "transpose", "view", "reshape", "flatten", "unflatten"))


class Overwrite(Pass):
    """Undo for single operations what capture did for all of them (`capture.functional`), as the last step.

    A new value for each activation takes memory, and time: on a processor, the pages of a large value are fetched from
    the operating system each time. An operation changes its first argument in place again if nothing else reads this
    value, and if a layer, a sum or a concatenation made it: these return new memory, and autograd does not need what
    they return. The result is the same in every bit.

    What a linear layer or a product of matrices returns stays as it is where a convolution reads it later: compiled, it
    would read a view of a view, which has no features last if there is one sample, and is copied.

    Its graph is no longer functional: put passes that need a functional graph before it.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        nodes = [node for node in graph_module.graph.nodes if annotation(node).overwrites is not None]
        free = dict.fromkeys(node for node in nodes if _may_overwrite(graph_module, node))
        modified = False
        for node in free:
            if node.op != "call_module":
                _restore(node)
                modified = True
            elif set(graph_module.graph.find_nodes(op="call_module", target=node.target)) <= free.keys():
                modified |= _set_module_inplace(graph_module, node)
        return PassResult(graph_module, modified)


def _may_overwrite(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may change its first argument in place."""
    target: Any = node.args[0]
    reader = node
    while isinstance(target, fx.Node) and list(target.users) == [reader] and operation(target) in _VIEWS:
        target, reader = target.args[0], target
    if not isinstance(target, fx.Node) or list(target.users) != [reader]:
        return False
    if target.op == "call_module":
        module = graph_module.get_submodule(str(target.target))
        known = isinstance(module, _LAYERS) and type(module).__module__.startswith("torch.nn.")
        product = isinstance(module, nn.Linear)
    else:
        known, product = operation(target) in _OPERATIONS, operation(target) in _PRODUCTS
    return known and not (product and _read_by_convolution(graph_module, node))


def _read_by_convolution(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a convolution reads a value, maybe through views or after it was overwritten again."""
    readers = dict.fromkeys(node.users)
    pending = list(readers)
    while pending:
        user = pending.pop()
        if is_convolution(graph_module, user):
            return True
        if operation(user) in _VIEWS or annotation(user).overwrites is not None:
            pending += [each for each in user.users if each not in readers]
            readers |= user.users
    return False


def _set_module_inplace(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Let a module work in place, as a copy since it may have other names, too; returns whether it did not yet."""
    module: Any = graph_module.get_submodule(str(node.target))
    if module.inplace:
        return False
    own = copy.copy(module)
    own.inplace = True
    graph_module.set_submodule(str(node.target), own)
    return True


def _restore(node: fx.Node) -> None:
    """Give a call the operation that it had in the user's model."""
    op, target = annotation(node).overwrites or (node.op, node.target)
    if (op, target) == (node.op, node.target):
        set_inplace_flag(node, True)
    node.op, node.target = op, target
