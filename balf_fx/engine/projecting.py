"""Try an allocation of ranks alone without building its layers.

The factors of a site output L R W x in place of W x (`graph.curves.Spectrum`). Where L and R are applied to the outputs
of the original layers, a few samples show what the factors would output, without the products R W of all layers. Where
kernels are divided (`ranks.divided`), L and R are applied to the inputs if these are read pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from balf_fx.engine.program import Program
from balf_fx.graph.allocation import Allocation
from balf_fx.graph.annotation import annotation, graph_record, sites
from balf_fx.graph.blocks import weight_bytes
from balf_fx.graph.curves import Rank, RankCurve, each_rank
from balf_fx.graph.layers import site_input
from balf_fx.graph.parameters import grouped_bias
from balf_fx.graph.site import Site
from balf_fx.passes.factorize import factor_modules
from balf_fx.refit.offload import storage_bytes

_PREFIX = "balf_projection"


def projected(original: Program, allocation: Allocation) -> Program | None:
    """A copy of a program whose sites output what their factors would.

    Args:
        original: a scored program without observers.

    Returns:
        None if the allocation makes a width narrower or the matrices of experts thinner.
    """
    ranks = {choice.site.name: choice.chosen.rank for choice in allocation.choices}
    if not all(_projects(graph_module, allocation, ranks) for graph_module in original.graph_modules):
        return None
    copied = original.copy()
    for graph_module in copied.graph_modules:
        for index, (site, nodes) in enumerate(sites(graph_module).items()):
            curve, rank = annotation(nodes[0]).curve, ranks[site.name]
            if curve is None or rank is None:
                continue
            name = f"{_PREFIX}_{index}"
            if site.divided == "separable" and isinstance(rank, int):
                _replace(graph_module, nodes[0], name, factor_modules(graph_module, site, curve, rank).module)
                continue
            graph_module.add_submodule(name, Projection(site, curve, rank, grouped_bias(graph_module, site)))
            (_insert if site.divided is None else _insert_before)(graph_module, nodes, name)
        graph_module.recompile()
    return copied


def _projects(graph_module: fx.GraphModule, allocation: Allocation, ranks: Mapping[str, Rank]) -> bool:
    if any(allocation.size_of(width) < width.features for width in graph_record(graph_module).widths):
        return False
    for site, nodes in sites(graph_module).items():
        curve = annotation(nodes[0]).curve
        if ranks[site.name] is not None and (curve is None or site.has_experts):
            return False
    return True


def _insert(graph_module: fx.GraphModule, nodes: Sequence[fx.Node], name: str) -> None:
    for node in nodes:
        with graph_module.graph.inserting_after(node):
            call = graph_module.graph.call_module(name, (node,))
        for user in set(node.users) - {call}:
            user.replace_input_with(node, call)


def _insert_before(graph_module: fx.GraphModule, nodes: Sequence[fx.Node], name: str) -> None:
    for node in nodes:
        with graph_module.graph.inserting_before(node):
            call = graph_module.graph.call_module(name, (site_input(node),))
        node.replace_input_with(site_input(node), call)


def _replace(graph_module: fx.GraphModule, node: fx.Node, name: str, factors: nn.Module) -> None:
    """Run the factors of a separable convolution: functions neither of its output nor of single pixels of its input."""
    graph_module.add_submodule(name, factors)
    with graph_module.graph.inserting_before(node):
        call = graph_module.graph.call_module(name, (site_input(node),))
    node.replace_all_uses_with(call)
    graph_module.graph.erase_node(node)


def bytes_read(graph_module: fx.GraphModule) -> dict[fx.Node, int]:
    """As `graph.blocks.weight_bytes`, with the spectra that projections read."""
    found = weight_bytes(graph_module)
    for node in graph_module.graph.find_nodes(op="call_module"):
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, Projection):
            found[node] = module.nbytes
    return found


class Projection(nn.Module):
    """Turns a site's output y into b' + L R W x, with b' as in `ranks.spectra.corrected_bias`.

    With c = b + E[W x], or b if the spectrum is not centred, this is L R y + (I - L R) c. Before a convolution whose
    first factor reads single pixels, x becomes L R x + (I - L R) E[x] in the same way.

    Args:
        bias: b [G, O], or None.
    """

    def __init__(self, site: Site, curve: RankCurve, rank: Rank, bias: Tensor | None) -> None:
        super().__init__()
        self._sizes = () if site.conv is None else (1,) * len(site.conv.kernel_size)
        own = None if site.divided is not None else bias
        self._pieces = list(_pieces(curve, rank, site.parts, own))  # no buffers: spectra may be in files

    @property
    def nbytes(self) -> int:
        """The bytes of the spectra that it reads."""
        return storage_bytes(each for maps in self._pieces if maps is not None for each in maps)

    @torch.no_grad()
    def forward(self, value: Tensor) -> Tensor:
        if len(self._pieces) == 1:
            return self._applied(value, self._pieces[0])
        axis = value.dim() - 1 - len(self._sizes)
        pairs = zip(value.chunk(len(self._pieces), axis), self._pieces, strict=True)
        return torch.cat([self._applied(piece, maps) for piece, maps in pairs], axis)

    def _applied(self, value: Tensor, maps: _Maps | None) -> Tensor:
        """The output of the site, or of one of its parts, [..., G * O, *size]."""
        if maps is None:
            return value
        left, right, centre = maps
        shift = (centre - left @ (right @ centre)).squeeze(-1)
        left, right, shift = (each.to(value).flatten(0, 1) for each in (left, right, shift))
        if not self._sizes:
            return F.linear(F.linear(value, right), left, shift)
        convolve, groups = _CONVOLUTIONS[len(self._sizes)], len(maps[0])
        left, right = (each.reshape(*each.shape, *self._sizes) for each in (left, right))
        return convolve(convolve(value, right, groups=groups), left, shift, groups=groups)


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

_Maps = tuple[Tensor, Tensor, Tensor]
"""L [G, O, r], R [G, r, O] and c [G, O, 1], read in each call alone: spectra may be in files."""


def _pieces(curve: RankCurve, rank: Rank, parts: int, bias: Tensor | None) -> Iterator[_Maps | None]:
    """The maps of the whole site, or of each part; None for a dense part."""
    spectra, biases = [curve.ranked], [bias]
    if isinstance(rank, tuple) and curve.parts is not None:
        spectra = [curve.parts.only(index) for index in range(parts)]
        biases = [None] * parts if bias is None else list(bias.reshape(parts, 1, -1))
    for each, spectrum, own in zip(each_rank(rank), spectra, biases, strict=True):
        if each is None:
            yield None
            continue
        left, right = spectrum.maps(each)
        centre = torch.zeros_like(left[..., :1])
        for mean in (own, spectrum.mean):
            centre = centre if mean is None else centre + mean.unsqueeze(-1)
        yield left, right, centre
