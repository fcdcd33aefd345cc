"""Let ranks and widths be multiples of a number that suits the hardware."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.distributed.group import ALONE, Group
from balf_fx.errors import OptionError
from balf_fx.graph.annotation import annotate, graph_record, record_graph, sites
from balf_fx.graph.parameters import get_tensor
from balf_fx.graph.site import Site
from balf_fx.graph.widths import Width
from balf_fx.latency.operations import Run
from balf_fx.latency.table import Table, open_table
from balf_fx.latency.uses import use_of
from balf_fx.passes.base import Pass
from balf_fx.progress import SILENT, Progress


@dataclass(frozen=True)
class Align(Pass):
    """Set the steps of ranks and of widths, from which `Allocate` chooses.

    Kernels of matrix products and convolutions work on vectors and tiles of 8 to 64 values and pad what is left over,
    so that other sizes cost nearly as much time as the next multiple.

    Attributes:
        multiple_of: the number of which the rank of each layer (over all its groups), the channels between layers and
            the features of each head of attention are multiples, except where they stay as they are. Or "auto": what
            is measured here for each layer (`latency.granules`), at most a quarter of its full rank or features.
        table: for "auto", the known times; by default, those of this machine.
        group: the processes that share them.
        progress: shows the progress of the measurements.

    Raises:
        OptionError: it is not a whole number of at least 1.
    """

    multiple_of: int | Literal["auto"] = 1
    table: Table | None = None
    group: Group = field(default=ALONE, repr=False, compare=False)
    progress: Progress = field(default=SILENT, repr=False, compare=False)

    def __post_init__(self) -> None:
        number = isinstance(self.multiple_of, int) and not isinstance(self.multiple_of, bool) and self.multiple_of >= 1
        if not number and self.multiple_of != "auto":
            raise OptionError(
                f"multiple_of must be a whole number of at least 1, such as 8, or 'auto', not {self.multiple_of!r}"
            )

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.require_sites(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = sites(graph_module)
        granules = self._granules(graph_module) if self.multiple_of == "auto" else {}
        for site, nodes in found.items():
            step = self._step(max(granules.get(site.name, (1, 1, 1))), site.full_rank * site.groups)
            for node in nodes:
                annotate(node, site=dataclasses.replace(site, multiple_of=step))
        names = {node.name: site.name for site, nodes in found.items() for node in nodes}
        widths = (self._aligned(width, granules, names) for width in graph_record(graph_module).widths)
        record_graph(graph_module, widths=tuple(widths))
        return PassResult(graph_module, False)

    def _step(self, granule: int, full: int) -> int:
        """The step of a size: the option's, or the granule unless too few sizes would be left."""
        if self.multiple_of != "auto":
            return self.multiple_of
        return max(step for step in (1, 2, 4, granule) if step <= min(max(full // 4, 1), granule))

    def _aligned(self, width: Width, granules: Mapping[str, tuple[int, int, int]], names: Mapping[str, str]) -> Width:
        """A width with its step: its features are outputs of its producers, and inputs of its consumers."""
        wanted = [granules[names[name]][1] for name in width.producers if names.get(name) in granules]
        wanted += [granules[names[name]][0] for name in width.consumers if names.get(name) in granules]
        granule = max(wanted, default=1)
        features = min(map(len, width.branches), default=width.features)
        step = self._step(granule // math.gcd(granule, width.heads), features)
        return dataclasses.replace(width, step=math.lcm(step, width.block))

    def _granules(self, graph_module: fx.GraphModule) -> dict[str, tuple[int, int, int]]:
        """For each site, the granules of its inputs, of its outputs, and of what reads its ranks."""
        runs: dict[Site, tuple[Run, Run]] = {}
        for site, nodes in sites(graph_module).items():
            if not site.has_experts:
                first, second = use_of(graph_module, site, nodes[0]).layers(site)
                inputs = site.in_features // site.taps
                runs[site] = Run(first, inputs, site.out_features), Run(second, site.full_rank, site.out_features)
        if not runs:
            return {}
        device = get_tensor(graph_module, next(iter(runs)).weight).device
        table = open_table(device, self.group) if self.table is None else self.table
        table.probe([run for pair in runs.values() for run in pair], self.progress)
        known = table.granules
        return {
            site.name: (*known[first.operation.family], known[second.operation.family][0])
            for site, (first, second) in runs.items()
        }
