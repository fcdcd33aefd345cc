"""Let ranks and widths be multiples of a number that suits the hardware."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.errors import OptionError
from balf_fx.graph.annotation import annotate, graph_record, record_graph, sites
from balf_fx.passes.base import Pass


@dataclass(frozen=True)
class Align(Pass):
    """Set the steps of ranks and of widths, from which `Allocate` chooses.

    Kernels of matrix products and convolutions work on vectors and tiles of 8 to 64 values and pad what is left over,
    so that other sizes cost nearly as much time as the next multiple.

    Attributes:
        multiple_of: the number of which the rank of each layer (over all its groups), the channels between layers and
            the features of each head of attention are multiples, except where they stay as they are.

    Raises:
        OptionError: it is not a whole number of at least 1.
    """

    multiple_of: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.multiple_of, bool) or not isinstance(self.multiple_of, int) or self.multiple_of < 1:
            raise OptionError(f"multiple_of must be a whole number of at least 1, such as 8, not {self.multiple_of!r}")

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.require_sites(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for site, nodes in sites(graph_module).items():
            for node in nodes:
                annotate(node, site=dataclasses.replace(site, multiple_of=self.multiple_of))
        widths = graph_record(graph_module).widths
        record_graph(graph_module, widths=tuple(dataclasses.replace(own, step=self.multiple_of) for own in widths))
        return PassResult(graph_module, False)
