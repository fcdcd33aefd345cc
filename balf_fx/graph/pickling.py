"""Makes a pickled graph the same as the original."""

from __future__ import annotations

from torch import Tensor, fx, nn

from balf_fx.graph.parameters import constant_nodes, get_tensor

READ = "balf_read"
"""Path of the module through which buffers are read."""


def keep_reads_of_buffers(graph_module: fx.GraphModule) -> None:
    """Let a graph read buffers through an nn.Identity where it computes something from buffers alone.

    Unpickling traces the code of a graph again. Parameters are proxies then, but buffers are not: what is computed from
    buffers alone would become a constant, and a buffer that the graph changes would be read only once. The call of a
    module is recorded whatever its arguments are. The caller recompiles the graph.
    """
    graph = graph_module.graph
    constants = constant_nodes(graph_module)
    for node in graph.find_nodes(op="get_attr"):
        value = get_tensor(graph_module, str(node.target))
        readers = [user for user in node.users if user in constants]
        if isinstance(value, nn.Parameter) or not isinstance(value, Tensor) or not readers:
            continue
        if not hasattr(graph_module, READ):
            graph_module.add_submodule(READ, nn.Identity())
        with graph.inserting_after(node):
            read = graph.call_module(READ, (node,))
        for user in readers:
            user.replace_input_with(node, read)
