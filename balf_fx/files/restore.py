"""Rebuilds a compressed model from its plan and its tensors: the graph is captured again, so files contain no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from balf_fx.calibration.batches import Forward
from balf_fx.capture.arguments import rebuild
from balf_fx.capture.normal_form import Method, capture
from balf_fx.engine.rewriting import fill, find_features, finish, held_tensors, normalise, rewrite_as
from balf_fx.errors import CalibrationError, PlanError
from balf_fx.graph.curves import Rank
from balf_fx.graph.plan import Plan


@dataclass(frozen=True)
class Stored:
    """A compressed model without its code.

    Attributes:
        plan: the plan of the compression.
        tensors: tensors by dotted path: all tensors of a graph or, for a model that the backend compiled, those of the
            replaced layers.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]

    @property
    def ranks(self) -> dict[str, Rank]:
        """{site: rank}, None for dense, as in the option `allocation`."""
        return self.plan.ranks


def stored(graph_module: fx.GraphModule) -> Stored:
    """The plan of a compressed graph, and all its tensors.

    Raises:
        PassError: the module has no plan.
    """
    return Stored(Plan.of(graph_module), dict(held_tensors(graph_module)))


def restore(
    found: Stored, model: nn.Module, example: Any | None = None, forward: Forward | None = None
) -> fx.GraphModule:
    """Rebuild a compressed model.

    Args:
        model: a model of the architecture that was compressed, with any weights; it is not changed. The result is on
            its device.
        example: one batch; None to use the recorded arguments, with tensors of the same shapes.
        forward: as in `balf_fx.compile`, if there is an example.

    Raises:
        PlanError: the model has another architecture, or was captured as several graphs.
    """
    with torch.inference_mode(False), torch.no_grad():
        graph_module = _captured_again(found.plan, model, example, forward)
        normalise(graph_module, found.plan.origin)
        find_features(graph_module, found.plan)
        rewrite_as(graph_module, found.plan)
        fill(graph_module, found.tensors)
    return finish(graph_module, found.plan)


def _captured_again(planned: Plan, model: nn.Module, example: Any | None, forward: Forward | None) -> fx.GraphModule:
    """Capture the graph in the same way as before."""
    origin, captured = planned.origin, planned.captured
    methods: dict[str, Method] = {"symbolic_trace": "symbolic_trace", "export": "export"}
    if captured not in methods:
        raise PlanError(
            f"the graph was captured by {captured}, and cannot be rebuilt here"
            + ("; pass options={'plan': ...} to torch.compile" if captured == "dynamo" else "")
        )
    if example is None:
        if origin.arguments is None:
            raise PlanError("the plan does not record the arguments of the model: pass example=, one batch")
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        positional = rebuild(origin.arguments["positional"], device)
        keywords = rebuild(origin.arguments["keywords"], device)
        example, forward = (), lambda module, _: module(*positional, **keywords)
    try:
        return capture(model, example, forward, methods[captured])
    except CalibrationError as error:
        raise PlanError(f"the model cannot be called like the one for which the plan was made: {error}") from error
