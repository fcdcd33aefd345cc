"""Rebuilds a compressed model from its plan and its tensors: the graph is captured again, so files contain no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from balf_fx.calibration.batches import Forward
from balf_fx.capture.arguments import rebuild
from balf_fx.capture.models import copy_model, plain_model
from balf_fx.capture.normal_form import Method, capture
from balf_fx.engine.grafting import rebuild as rebuild_modules
from balf_fx.engine.rewriting import fill, find_features, finish, held_tensors, normalise, rewrite_as, with_plan
from balf_fx.errors import CalibrationError, PlanError
from balf_fx.graph.annotation import Origin
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


def stored(compressed: nn.Module) -> Stored:
    """The plan of a compressed model, and all its tensors.

    Raises:
        PassError: the module has no plan.
    """
    return Stored(Plan.of(compressed), dict(held_tensors(compressed)))


def restore(found: Stored, model: nn.Module, example: Any | None = None, forward: Forward | None = None) -> nn.Module:
    """Rebuild a compressed model.

    Args:
        model: a model of the architecture that was compressed, with any weights; it is not changed. The result is on
            its device.
        example: one batch; None to use the recorded arguments, with tensors of the same shapes.
        forward: as in `balf_fx.compile`, if there is an example.

    Raises:
        PlanError: the model has another architecture, or was captured as several graphs.
    """
    model = plain_model(model)
    with torch.inference_mode(False), torch.no_grad():
        if found.plan.modules is not None:
            copied = copy_model(model)
            rebuild_modules(copied, found.plan.modules)
            fill(copied, found.tensors)
            return with_plan(copied, found.plan)
        graph_module = _captured_again(found.plan, model, example, forward)
        normalise(graph_module, found.plan.origin)
        find_features(graph_module, found.plan)
        rewrite_as(graph_module, found.plan)
        fill(graph_module, found.tensors)
    return finish(graph_module, found.plan)


def recorded_call(origin: Origin, model: nn.Module) -> Forward:
    """A function that calls a model with arguments in the shapes of the first batch.

    Raises:
        PlanError: these were not recorded.
    """
    if origin.arguments is None:
        raise PlanError("the plan does not record the arguments of the model: pass example=, one batch")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    positional = rebuild(origin.arguments["positional"], device)
    keywords = rebuild(origin.arguments["keywords"], device)
    return lambda module, _: module(*positional, **keywords)


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
        example, forward = (), recorded_call(origin, model)
    try:
        return capture(model, example, forward, methods[captured])
    except CalibrationError as error:
        raise PlanError(f"the model cannot be called like the one for which the plan was made: {error}") from error
