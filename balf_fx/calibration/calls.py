"""How a function forward(model, batch) calls the model: with what arguments, or with outputs that are known already."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from balf_fx.calibration.batches import Forward, ordinary
from balf_fx.errors import CalibrationError


class _Recorded(BaseException):
    """Ends a call once its arguments are recorded; a user's `except Exception` does not catch it."""


class _StandIn(nn.Module):
    """Stands for a module whose attributes it has."""

    def __init__(self, subject: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_subject", subject)  # no submodule, whose parameters would be this one's

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_subject"], name)


class _Recorder(_StandIn):
    """Records how it is called."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.call = (args, kwargs)
        raise _Recorded


class KnownOutputs(_StandIn):
    """Returns outputs that are known already, whatever it is called with.

    Args:
        subject: the module for which it stands.
        outputs: what that would return for each call in turn; read one by one.

    Raises:
        CalibrationError: there are more calls.
    """

    def __init__(self, subject: nn.Module, outputs: Iterable[Any]) -> None:
        super().__init__(subject)
        self.outputs = iter(outputs)

    def forward(self, *_: Any, **__: Any) -> Any:
        try:
            return next(self.outputs)
        except StopIteration:
            raise CalibrationError(
                "forward(model, batch) calls the model more than once, which it may not where the model goes block by "
                "block: pass batches for one call each, or more memory="
            ) from None


def placeholder_values(graph_module: fx.GraphModule, batch: Any, forward: Forward) -> dict[str, Any]:
    """The values of a graph's placeholders when `forward` calls it on a batch; the graph is not run.

    Raises:
        CalibrationError: `forward` does not call the model.
    """
    recorder = _Recorder(graph_module)
    try:
        forward(recorder, batch)
    except _Recorded:
        args, kwargs = recorder.call
    else:
        raise CalibrationError("forward(model, batch) did not call the model")
    args, kwargs = ordinary((args, kwargs))
    bound = inspect.signature(graph_module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
