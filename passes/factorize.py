"""Rewrite each chosen site into two thinner stock modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.errors import PassError
from balf_fx.graph.annotation import Replaced, annotation, graph_record, record_graph
from balf_fx.graph.curves import Form, PartRanks, Rank, RankCurve, Solution, Spectrum
from balf_fx.graph.expert_factors import keeping
from balf_fx.graph.fingerprint import Fingerprint
from balf_fx.graph.layers import read_layer
from balf_fx.graph.layouts import allow_any_layout
from balf_fx.graph.parameters import fingerprint, get_tensor, grouped_bias, grouped_weight, put
from balf_fx.graph.site import Site
from balf_fx.graph.substitute import AnySubstitute, build, features_last, replace_site
from balf_fx.passes.base import Pass
from balf_fx.ranks.divided import strips_of
from balf_fx.ranks.pivots import written_as_columns, written_as_rows
from balf_fx.ranks.spectra import corrected_bias, factors, in_parts
from balf_fx.widths.elementwise import table_of
from balf_fx.widths.narrowing import Cut, find_cuts, hosted_rows


@dataclass(frozen=True)
class Factorize(Pass):
    """Replace every site that was given a rank by `name.0` (D -> r, the layer's own geometry) and `name.1` (r -> O).

    `name` becomes an nn.Sequential of the two, and the graph calls each of them in a separate node. Where the parts
    of a site have separate ranks, `name.1` is a list of layers, one for each part (`Substitute`). Parameters keep
    dtype, device, memory format and requires_grad. `SplitBias` moves biases of linear layers out of them.

    Attributes:
        done: called with the modules that replace a layer once they are built, if given.
    """

    done: Callable[[nn.Module], None] | None = field(default=None, repr=False, compare=False)

    def requires(self, graph_module: fx.GraphModule) -> None:
        for site, nodes in self.require_sites(graph_module).items():
            if annotation(nodes[0]).choice is None or annotation(nodes[0]).curve is None:
                raise PassError(f"Factorize: site {site.name!r} has no choice; run Score and Allocate first")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        cuts = find_cuts(graph_module)
        found = self.require_sites(graph_module)
        layers: dict[Site, list[fx.Node]] = dict(found)
        for node in graph_module.graph.nodes:  # layers that are not sites may have been refitted or narrowed
            layer = read_layer(graph_module, node)
            changed = annotation(node).refit is not None or node.name in cuts
            if annotation(node).site is None and changed and isinstance(layer, Site):
                layers[layer] = [node]
        replaced: list[Replaced] = []
        built: list[AnySubstitute] = []
        for site, nodes in layers.items():
            mark, cut = annotation(nodes[0]), cuts.get(nodes[0].name)
            rank = None if mark.choice is None else mark.choice.chosen.rank
            if rank is None and mark.refit is None and (cut is None or site.keeps_weight):
                continue  # a weight that is tied to an embedding was reordered with it
            solution = solution_of(graph_module, nodes[0], site, cut)
            thin = site if cut is None else cut.outputs(cut.inputs(site))
            if mark.pivots is not None:
                parts = zip(solution, mark.pivots.orders, strict=True)
                blocks = hosted_rows(graph_module, nodes[0].name, cut or Cut())
                solution = tuple(_written(part, mark.pivots.form, order, blocks) for part, order in parts)
            substitute = build(graph_module, thin, solution)
            if self.done is not None:
                self.done(substitute.module)
            built.append(substitute)
            original = mark.fingerprint or fingerprint(graph_module, site)
            replaced.append(_replaced(site.name, rank, substitute.biased, original, solution))
            replace_site(graph_module, nodes, site, substitute)
        reorder_tables(graph_module, cuts)
        if any(map(features_last, built)):
            allow_any_layout(graph_module)
        graph_module.delete_all_unused_submodules()
        record_graph(graph_module, replaced=(*graph_record(graph_module).replaced, *replaced))
        return PassResult(graph_module, bool(replaced))


def reorder_tables(graph_module: fx.GraphModule, cuts: Mapping[str, Cut]) -> None:
    """Give the features of embeddings their new order; layers that are tied to one read the same features."""
    reordered: set[int] = set()  # a table may be read several times
    for node in graph_module.graph.nodes:
        path = table_of(graph_module, node, len(annotation(node).shape or ()) - 1) if node.name in cuts else None
        if path is None or id(get_tensor(graph_module, path)) in reordered:
            continue
        value: Tensor = get_tensor(graph_module, path)
        order = cuts[node.name].written[0]
        new = nn.Parameter(order.of(value.detach().mT).mT.contiguous(), requires_grad=value.requires_grad)
        tied = [name for name, each in graph_module.named_parameters(remove_duplicate=False) if each is value]
        for name in tied or [path]:
            put(graph_module, name, new)
        reordered.add(id(new))


def _written(part: Solution, form: Form, order: Tensor | None, blocks: tuple[Tensor, ...]) -> Solution:
    """A part in its form; a dense one only changes if it gets identity blocks."""
    if form == "blocks":
        return dataclasses.replace(part, form=form, order=order, blocks=blocks)
    if part.left is None:
        return part
    return written_as_columns(part, order) if form == "columns" else written_as_rows(part, order)


def _replaced(
    name: str, rank: Rank, biased: tuple[bool, ...], fingerprint: Fingerprint, solution: Sequence[Solution]
) -> Replaced:
    """The record of a layer that was replaced by a solution."""
    kept = () if solution[0].kept is None else solution[0].kept.experts
    written = [part for part in solution if part.left is not None or part.form == "blocks"]
    form: Form = written[0].form if written else "pair"
    return Replaced(name, rank, biased, fingerprint, kept, form, any(part.order is not None for part in written))


def solution_of(graph_module: fx.GraphModule, node: fx.Node, site: Site, cut: Cut | None) -> tuple[Solution, ...]:
    """A layer's solution for its chosen rank, and for the features around it in their number, order and basis."""
    solution = annotation(node).refit or planned(graph_module, node, site, cut)
    if cut is None:
        return solution
    if len(solution) == 1:
        solution = (cut.turn(cut.narrow_outputs(solution[0])),)
    return tuple(cut.order_inputs(part, site) for part in solution)


def planned(graph_module: fx.GraphModule, node: fx.Node, site: Site, cut: Cut | None) -> tuple[Solution, ...]:
    """A layer's one-shot solution for its chosen rank and features, with as many outputs as the narrower layer has."""
    mark = annotation(node)
    if mark.curve is None or mark.choice is None:
        solution: tuple[Solution, ...] = (
            Solution(None, grouped_weight(graph_module, site), grouped_bias(graph_module, site)),
        )
    else:
        solution = one_shot(graph_module, site, mark.curve, mark.choice.chosen.rank)
    return solution if cut is None or len(solution) > 1 else (cut.narrow_inputs(solution[0], site),)


def factor_modules(graph_module: fx.GraphModule, site: Site, curve: RankCurve, rank: int | PartRanks) -> AnySubstitute:
    """The modules that replace a site, with the one-shot optimum as their weights."""
    return build(graph_module, site, one_shot(graph_module, site, curve, rank))


def one_shot(graph_module: fx.GraphModule, site: Site, curve: RankCurve, rank: Rank) -> tuple[Solution, ...]:
    """The one-shot optimum: one solution, or one for each part where the parts have separate ranks."""
    weight = grouped_weight(graph_module, site)
    bias = grouped_bias(graph_module, site)
    if curve.strips is not None and isinstance(rank, int):
        return (_divided(site, weight, bias, curve.strips, rank),)
    if not isinstance(rank, tuple):
        return (keeping(_one_shot(weight, bias, curve.spectrum, rank), weight, curve.kept),)
    if curve.parts is None:
        raise PassError(f"Factorize: the parts of site {site.name!r} were not scored")
    weights = in_parts(weight, site.parts).unsqueeze(1)
    biases = [None] * site.parts if bias is None else list(in_parts(bias, site.parts).unsqueeze(1))
    spectra = [curve.parts.only(index) for index in range(site.parts)]
    return tuple(map(_one_shot, weights, biases, spectra, rank))


def _divided(site: Site, weight: Tensor, bias: Tensor | None, strips: Spectrum, rank: int) -> Solution:
    taps, (left, right) = site.factor_taps, strips.maps(rank)
    matrix = strips_of(weight, taps)
    if strips.mean is not None:
        mean = strips.mean.unsqueeze(-1)
        lost = (matrix @ (mean - left @ (right @ mean))).reshape(1, -1, taps[1]).sum(-1)
        bias = lost if bias is None else bias + lost
    left = matrix @ left
    return Solution(left, right, bias, form=site.form(rank), taps=taps)


def _one_shot(weight: Tensor, bias: Tensor | None, spectrum: Spectrum, rank: int | None) -> Solution:
    if rank is None:
        return Solution(None, weight, bias)
    left, right = factors(weight, spectrum, rank)
    return Solution(left, right, corrected_bias(bias, spectrum, rank))
