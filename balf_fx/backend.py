"""`torch.compile(model, backend="balf", options={"flops": 0.55})`: compression while the model is in use.

    record (the first calls, exact) -> one budget over all graphs, as in balf_fx.compile -> inner backend

Dynamo calls the backend for every graph that it captures. The backend returns a `Region`: the graph and its bindings,
one for each set of weights with which the graph is called. All regions of one call of `torch.compile` share a
`Session`, which counts the calls, compresses all graphs together at the switch, and stores the plan.

* The options are those of `balf_fx.compile`, with the same defaults, and those of `dynamo.options.BackendOptions`.
* Calibration calls run the model's own graphs. Their inputs are kept in memory up to `memory` bytes, and the rest in
  temporary files. The call after the last of them takes as long as `balf_fx.compile` does on the same batches.
* With graph breaks, one budget covers all parts. Layers are narrowed and refitted within their part. They are refitted
  on the outputs of the compressed parts before it, or on the original's values where the inputs come from elsewhere.
* Graphs that are compiled after the switch, for another shape for example, get the layers of the plan. Weights that
  were not part of calibration stay dense. A layer whose width cannot be narrowed there stays dense and is logged.
* Calls that require gradients or run in training mode are neither observed nor compressed.
* Weights that change during calibration restart it. After the switch, a call raises `WeightsChangedError` if a weight
  that was replaced or folded in a compressed graph has changed, until `torch.compiler.reset()`. `load_state_dict`,
  optimizer steps and a new `.data` are detected; writes through `.data` and to inference tensors are not.
* With `dynamic=True` the epsilon of a BatchNorm is an input of the graph, so the BatchNorm is not folded.

The logger `balf_fx.backend` reports each step (`TORCH_LOGS="balf_fx.backend"`), and the whole report at level DEBUG.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx
from torch._dynamo.exc import ShortenTraceback

from balf_fx.dynamo.frames import current_request, owner_of
from balf_fx.dynamo.options import BackendOptions, parse_options
from balf_fx.dynamo.session import Session
from balf_fx.errors import BalfError, NotCalibratedError, OptionError
from balf_fx.files.restore import Stored


class BackendOptionError(ShortenTraceback, OptionError):
    """An option of the backend is wrong.

    Dynamo wraps a backend's errors in its own, except for those derived from ShortenTraceback. Deriving from both lets
    the user catch an OptionError.
    """


def _parsed(options: Mapping[str, Any]) -> BackendOptions:
    """The options, with errors that reach the user as they are."""
    try:
        return parse_options(options)
    except (BalfError, OSError) as error:  # of an option, or of the file of a plan
        raise BackendOptionError(str(error), first_useful_frame=None) from None


class Backend:
    """The backend that Dynamo finds by the name "balf"."""

    __name__ = "balf"

    def __init__(self) -> None:
        # A session lives as long as some code that Dynamo compiled. It keeps its owner alive, so that ids stay unique.
        self._sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()

    def __call__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: list[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
        name: str | None = None,  # noqa: ARG002 (torch 2.15 passes the name of the region)
    ) -> Callable[..., Any]:
        """Return the callable that runs in place of one graph.

        Args:
            graph_module: as Dynamo captured it, with weights among its inputs.
            example_inputs: the arguments of the call for which Dynamo compiles.
            options: see `balf_fx.dynamo.options.BackendOptions`.
            mode: the mode of the inner backend.

        Raises:
            BackendOptionError: there is no budget, an option does not exist, or the plan cannot be read.
        """
        request = current_request()
        given = {**({} if mode is None else {"mode": mode}), **(options or {})}
        return self._session(request.owner, given).take(graph_module, example_inputs, request)

    def _session(self, owner: object | None, options: Mapping[str, Any]) -> Session:
        found = None if owner is None else self._sessions.get(id(owner))
        if found is None:
            found = Session(_parsed(options), owner)
            self._sessions[id(found if owner is None else owner)] = found
        return found

    def find(self, compiled: Any) -> Session:
        """The session of a compiled module or function.

        Args:
            compiled: the result of `torch.compile`, or a module after `module.compile`.

        Raises:
            NotCalibratedError: it has not been called yet, or was compiled with another backend.
        """
        owner = owner_of(compiled)
        found = None if owner is None else self._sessions.get(id(owner))
        if found is None:
            raise NotCalibratedError(
                "there is nothing to report: pass the result of torch.compile(..., backend='balf'), once it has been "
                "called without gradients"
            )
        return found

    def reset(self) -> None:
        """Delete all sessions; `torch.compiler.reset` calls this."""
        self._sessions.clear()  # the compiled code held everything else, and Dynamo releases it now

    def __eq__(self, other: object) -> bool:
        # Dynamo shares compiled graphs between calls of torch.compile on the same code if backend and options are
        # equal. A model would then run with another model's factors, so no two uses of this backend compare equal.
        return False

    __hash__ = object.__hash__


balf = Backend()
"""The object that the entry point of the package names."""


def is_compiled(value: Any) -> bool:
    """Whether `torch.compile` created this object."""
    return owner_of(value) is not None


def plan(compiled: Any) -> Stored:
    """Return the plan of a compiled model with its new layers; `options={"plan": plan}` then needs no calibration.

    `balf_fx.save` writes both to a file, whose path can be passed as a plan, too.

    Args:
        compiled: the result of `torch.compile(..., backend="balf")`, or a module after `module.compile`.

    Raises:
        NotCalibratedError: it is still calibrating; the message says how many calls were observed.
    """
    return balf.find(compiled).plan
