"""The contract that all passes share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.errors import PassError
from balf_fx.graph.annotation import sites
from balf_fx.graph.site import Site


class Pass(ABC):
    """Takes a GraphModule and returns `PassResult(graph_module, modified)`.

    `modified` means that the graph or a weight changed; annotations do not count. `requires` checks the input and
    `ensures` checks the result (torch's own PassBase checks the input twice).
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        self.requires(graph_module)
        result = self.call(graph_module)
        if result.modified:
            result.graph_module.graph.lint()
            result.graph_module.recompile()
        self.ensures(result.graph_module)
        return result

    @abstractmethod
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass. The caller lints and recompiles a changed graph."""

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise PassError if an earlier pass is missing."""

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Raise PassError if the result violates the pass's postcondition."""

    def require_sites(self, graph_module: fx.GraphModule) -> dict[Site, list[fx.Node]]:
        """Return all sites of the graph with their nodes; a graph without sites is an error."""
        found = sites(graph_module)
        if not found:
            raise PassError(f"{type(self).__name__} needs a graph with sites: run Annotate first")
        return found


def scored_alike(known: tuple[Any, ...] | None, new: tuple[Any, ...]) -> bool:
    """Whether a score was made with these options, which come first, and with these objects as statistics."""
    if known is None or len(known) != len(new):
        return False
    return bool(known[0] == new[0]) and all(a is b for a, b in zip(known[1:], new[1:], strict=True))
