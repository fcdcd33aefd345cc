"""`torch.compile(model, backend="balf", options={"flops": 0.55})`: compression while the model is in use.

    record (the first calls, exact) -> one budget over all graphs, as in balf_fx.compile -> inner backend

Dynamo calls the backend for every graph that it captures. What it gets back is a `Region`: the graph and its bindings,
one for each set of weights that the graph is called with. All regions of one call of `torch.compile` share a `Session`,
which counts the calls, compresses all graphs together at the switch, and keeps the plan.

* The options are those of `balf_fx.compile`, with the same defaults, and those of `dynamo.options.BackendOptions`.
* Calibration calls run the model's own graphs. Their inputs are kept within `memory`; what is beyond waits in temporary
  files. The call after the last of them takes as long as `balf_fx.compile` does on the same batches.
* With graph breaks, one budget covers all parts. Layers are narrowed and refitted within their part, on what the
  compressed parts before it return; where something else than these graphs made a part's input, on the original's.
* What is compiled after the switch, as for another shape, gets the layers of the plan. Weights that calibration has not
  met stay dense; a layer whose width cannot be narrowed there stays dense, and the log says so.
* Calls that require gradients or run in training mode are neither observed nor compressed.
* Weights that change during calibration start it again. After the switch, a call with a changed weight that a
  compressed graph stands for raises `WeightsChangedError`, until `torch.compiler.reset()`. `load_state_dict`, optimizer
  steps and a new `.data` are detected; writes through `.data` and to inference tensors are not.
* With `dynamic=True` the epsilon of a BatchNorm is an input of the graph, so that it is not folded.

The logger `balf_fx.backend` says what happens (`TORCH_LOGS="balf_fx.backend"`), and at level DEBUG prints the report.
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
from balf_fx.errors import NotCalibratedError, OptionError
from balf_fx.files.restore import Stored


class BackendOptionError(ShortenTraceback, OptionError):
    """An option of the backend means nothing.

    Dynamo wraps what a backend raises into an error of its own, except for what derives from ShortenTraceback: this
    way the user catches an OptionError.
    """


class Backend:
    """The backend that Dynamo finds under the name "balf"."""

    __name__ = "balf"

    def __init__(self) -> None:
        # A session lives as long as something that Dynamo has compiled, and keeps its owner, so that no id recurs.
        self._sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()

    def __call__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: list[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
        name: str | None = None,  # noqa: ARG002 (torch 2.15 passes on what it calls the region)
    ) -> Callable[..., Any]:
        """Take in one graph.

        Args:
            graph_module: as Dynamo captured it, weights among its inputs.
            example_inputs: the arguments of the call that Dynamo compiles for.
            options: see `balf_fx.dynamo.options.BackendOptions`.
            mode: for the inner backend.

        Returns:
            What stands in for the graph.

        Raises:
            BackendOptionError: there is no budget, or an option that does not exist; lists those that do.
        """
        try:
            parsed = parse_options({**({} if mode is None else {"mode": mode}), **(options or {})})
        except OptionError as error:
            raise BackendOptionError(str(error), first_useful_frame=None) from None
        request = current_request()
        return self._session(request.owner, parsed).take(graph_module, example_inputs, request)

    def _session(self, owner: object | None, options: BackendOptions) -> Session:
        found = None if owner is None else self._sessions.get(id(owner))
        if found is None:
            found = Session(options, owner)
            self._sessions[id(found if owner is None else owner)] = found
        return found

    def find(self, compiled: Any) -> Session:
        """The session of what `torch.compile` or `module.compile` returned.

        Raises:
            NotCalibratedError: it has not been called yet, or was compiled with another backend.
        """
        owner = owner_of(compiled)
        found = None if owner is None else self._sessions.get(id(owner))
        if found is None:
            raise NotCalibratedError(
                "there is nothing to report: pass what torch.compile(..., backend='balf') returned, once it has been "
                "called without gradients"
            )
        return found

    def reset(self) -> None:
        """Forget everything; `torch.compiler.reset` calls this."""
        self._sessions.clear()  # what Dynamo has compiled held the rest, and lets go of it now

    def __eq__(self, other: object) -> bool:
        # Dynamo lets two calls of torch.compile on the same code share compiled graphs where backend and options are
        # equal. Then a model would run through another one's factors: no two uses of this backend are equal.
        return False

    __hash__ = object.__hash__


balf = Backend()
"""What the entry point names."""


def is_compiled(value: Any) -> bool:
    """Whether `torch.compile` has made this."""
    return owner_of(value) is not None


def plan(compiled: Any) -> Stored:
    """What was done to a compiled model, and its new layers: `options={"plan": plan}` starts compressed at once.

    `balf_fx.save` writes them to a file, whose path will do as a plan, too.

    Args:
        compiled: what `torch.compile(..., backend="balf")` returned, or a module after `module.compile`.

    Raises:
        NotCalibratedError: it is still calibrating; says how far it is.
    """
    return balf.find(compiled).plan
