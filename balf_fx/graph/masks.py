"""Which inputs of a graph are attention masks, and which values have the positions of which mask."""

from __future__ import annotations

import math
import re

from torch import fx

from balf_fx.graph.annotation import annotation
from balf_fx.graph.operators import reads_metadata

OTHER = "other_inputs"
"""Stands for the mask of values that have the positions of no mask, such as those of a vision tower."""

MASKS = ("decoder_attention_mask", "attention_mask", "encoder_attention_mask")
"""The names of the arguments that are read as masks.

A value that depends on the inputs of several of them has the positions of the first: a decoder reads what the encoder
returns, and its values have the decoder's positions.
"""

_DYNAMO = re.compile(r"[lL]_(?:kwargs_)?(\w+?)_?")  # how Dynamo names the input for an argument


def argument_name(node: fx.Node) -> str:
    """The name of the model's argument that a placeholder takes."""
    found = _DYNAMO.fullmatch(str(node.target))
    return annotation(node).argument or (str(node.target) if found is None else found[1])


def mask_inputs(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    """The placeholders that take masks, by the name of the mask."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    return {name: node for node in placeholders if (name := argument_name(node)) in MASKS}


def mask_names(graph_module: fx.GraphModule) -> dict[fx.Node, str]:
    """The name of the mask, one of MASKS or OTHER, whose positions each value has that depends on an input.

    The graph need not have an input for this mask: it may be given otherwise, or read by an earlier part of the model.
    """
    positions = _positions(graph_module)
    found: dict[fx.Node, str] = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            found[node] = _input_mask(node, positions)
        elif annotation(node).number is None and not reads_metadata(node):
            names = {found[source] for source in node.all_input_nodes if source in found}
            if names:
                found[node] = next((name for name in MASKS if name in names), OTHER)
    return found


def main_mask(graph_module: fx.GraphModule) -> str:
    """The name of the mask whose positions the outputs of a graph have."""
    positions = _positions(graph_module)
    names = {_input_mask(node, positions) for node in graph_module.graph.find_nodes(op="placeholder")}
    return next((name for name in MASKS if name in names), OTHER)


def _positions(graph_module: fx.GraphModule) -> tuple[int, ...] | None:
    """[N, L], the shape of `attention_mask` on the example batch; None if the graph does not read it."""
    mask = mask_inputs(graph_module).get("attention_mask")
    return None if mask is None else annotation(mask).shape


def _input_mask(node: fx.Node, positions: tuple[int, ...] | None) -> str:
    """The mask whose positions an input has: by its name, and by its shape if that of the mask is known."""
    name, shape = argument_name(node), annotation(node).shape
    for mask in MASKS:
        if mask != "attention_mask" and name.startswith(mask.removesuffix("attention_mask")):
            return mask
    if positions is None or shape is None:
        return "attention_mask"
    fits = shape[:2] in (positions, positions[::-1]) or shape[:1] == (math.prod(positions),)
    return "attention_mask" if fits else OTHER
