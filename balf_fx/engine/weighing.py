"""The weights of the positions of one call of a program: those that the user gave, or those of its masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from balf_fx.calibration.batches import MODEL_ERRORS, Calibration
from balf_fx.calibration.weights import CallWeights, Weights, read_mask, read_masks
from balf_fx.engine.program import Program, Step
from balf_fx.graph.masks import MASKS, OTHER, main_mask, mask_inputs

_Masks = Mapping[str, Weights]


def call_weights(program: Program, batch: Any, given: Tensor | None = None) -> CallWeights:
    """The weights of the positions in one call of a program.

    All parts of a call share its masks: one that reads no mask has that of the last part before it that reads one, or
    of the next one after it.

    Args:
        batch: a batch in the form that the program's steps are made from.
        given: the user's weights of the batch, which take the place of masks.
    """
    graph_modules = program.graph_modules
    if given is not None:
        weights = Weights(given)
        return CallWeights([dict.fromkeys((*MASKS, OTHER), weights)] * len(graph_modules), weights, given=True)
    if not any(map(mask_inputs, graph_modules)):
        named = _of_mapping(batch)
        return CallWeights([named] * len(graph_modules), named.get(main_mask(graph_modules[-1])))
    try:
        steps = program.trace(batch)
    except MODEL_ERRORS:  # what is wrong with the batch is told when it is run
        return CallWeights([{}] * len(graph_modules))
    masks = [_of_step(graph_modules[step.part], step) for step in steps]
    first = {step.part: index for index, step in reversed(list(enumerate(steps)))}
    found = [
        _of_part(graph_module, masks, first[part]) if part in first else {}
        for part, graph_module in enumerate(graph_modules)
    ]
    last = steps[-1].part
    return CallWeights(found, found[last].get(main_mask(graph_modules[last])))


def output_weights(program: Program, calibration: Calibration, index: int) -> Weights | None:
    """The weights of a program's outputs for the batch of an index."""
    batch = calibration.batches[index]
    return call_weights(program, batch, calibration.given(index, batch)).outputs


def _of_mapping(batch: Any) -> _Masks:
    """The masks of a batch whose model reads none."""
    found = {name: read_mask(batch.get(name)) for name in MASKS} if isinstance(batch, Mapping) else {}
    return {name: Weights(mask) for name, mask in found.items() if mask is not None}


def _of_step(graph_module: fx.GraphModule, step: Step) -> _Masks:
    names = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
    return read_masks(graph_module, dict(zip(names, step.args, strict=True)))


def _of_part(graph_module: fx.GraphModule, masks: Sequence[_Masks], step: int) -> _Masks:
    """The masks of a part, and those that the other steps of the call hand to it.

    Args:
        masks: the masks of each step.
        step: the first step that runs the part.
    """
    own = mask_inputs(graph_module)
    others = [*reversed(masks[:step]), *masks[step + 1 :]]
    found = dict(masks[step])
    for name in set(MASKS) - set(own):
        candidates = list(_candidates(others, name))
        if candidates:
            found[name] = Weights(*candidates)
    return found


def _candidates(masks: Sequence[_Masks], name: str) -> Iterator[Tensor]:
    """The masks of a name. A value that depends on no decoder's input here may still be a decoder's."""
    for found in masks:
        for each in MASKS if name == "attention_mask" else (name,):
            if each in found:
                yield from found[each].candidates
