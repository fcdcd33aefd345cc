"""Batches of one sample, for which torch.export does not say whether a graph is valid: it assumes at least two."""

from __future__ import annotations

import operator
from contextlib import suppress

import torch
from torch import Tensor, fx, nn

from balf_fx.calibration.batches import MODEL_ERRORS, sample_count, some_samples
from balf_fx.capture.arguments import Call, copied
from balf_fx.capture.checks import same_outputs


def assert_several(graph_module: fx.GraphModule, model: nn.Module, call: Call) -> None:
    """Let an exported graph refuse a batch of one sample if the model computes something else for it, or fails.

    Args:
        model: a copy of the model, which may be run.
        call: the call on the example.
    """
    count = sample_count(tuple(call.supplied.values()))
    if count < 2 or call.autocast or _alike_on_one(graph_module, model, call):
        return
    graph = graph_module.graph
    *_, last = graph.find_nodes(op="placeholder")
    for node in graph.find_nodes(op="placeholder"):
        value = call.input(str(node.target))
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == count:
            message = f"{node.target!r} has 2 or more samples: for one sample, the model's code computes something else"
            with graph.inserting_after(last):
                size = graph.call_method("size", (node, 0))
            with graph.inserting_after(size):
                several = graph.call_function(operator.ge, (size, 2))
            with graph.inserting_after(several):
                last = graph.call_function(torch._assert, (several, message))
    graph_module.recompile()


def _alike_on_one(graph_module: fx.GraphModule, model: nn.Module, call: Call) -> bool:
    """Whether graph and model return the same for the first sample alone, or the graph refuses it already."""
    args, kwargs = some_samples((tuple(call.by_position.values()), call.by_keyword), 0, 1)
    inputs = [call.input(str(node.target)) for node in graph_module.graph.find_nodes(op="placeholder")]
    with torch.no_grad(), suppress(*MODEL_ERRORS):
        got = graph_module(*copied(some_samples(tuple(inputs), 0, 1)))
        with suppress(*MODEL_ERRORS):
            return same_outputs(model(*copied(args), **copied(kwargs)), got)
        return False
    return True
