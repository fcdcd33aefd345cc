"""Where in the model a node's call comes from, as tracing notes it in `node.meta`.

torch's matchers, as quantizers use them, take nodes with the same innermost module for parts of one layer.
"""

from __future__ import annotations

from torch import fx

MODULE_STACK = "nn_module_stack"
"""The key: {a unique name: (path, class)} from the outermost module to the innermost."""


def module_stack(graph_module: fx.GraphModule, path: str, node: fx.Node, replaced: str) -> dict[str, tuple[str, type]]:
    """The stack of a call that stands in for a node.

    Args:
        path: of the module that is called, at `replaced` or inside of it.
        node: the modules around it stay around the call.
        replaced: path of the module, or parameter, that the node stood for.
    """
    stack = {key: entry for key, entry in (node.meta.get(MODULE_STACK) or {}).items() if entry[0] != replaced}
    inside = path.removeprefix(replaced).split(".")
    for depth in range(len(inside)):
        name = replaced + ".".join(inside[: depth + 1])
        stack[name] = (name, type(graph_module.get_submodule(name)))
    return stack
