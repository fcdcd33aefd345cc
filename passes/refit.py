"""Solve every layer again for the input that it has in the compressed model.

One-shot factors assume that a layer's input is the original one. Refit runs the original and the compressed model side
by side (`refit.lockstep`). At each layer it regresses the original output y on the compressed model's input x'
(`refit.regression`), which corrects the error made upstream as far as x' predicts it. Alternatively it keeps the right
factor B and regresses y on B x', which is much cheaper and corrects less.

Three things change the plain target y (`refit.targets`). Where the layer's output is added to another value, in any
layout, the error of that value is added to the target, so that residual streams are corrected at every block. Where
ReLU or the like follows, an output below zero has no error: the target becomes the output of the first solution there,
and the layer is solved again. Finally, positions are weighted by the squared gradients of the loss.

The strength of the regularisation is chosen on a held-out quarter of all samples: the ridge with the least error there
is taken, or the layer as it was if that is better. Every pixel of a convolution's output is used until there are some
hundred positions per unknown. Beyond that, a grid of pixels is read, with another offset in every chunk
(`refit.windows`). Positions without weight, such as padding, are left out.

Experts are solved one by one on the rows that they see (`refit.experts`). What chooses rows, such as `topk` in a
router, chooses the original's in both models, so that these are the same rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from balf_fx.calibration.batches import MEMORY, sample_count
from balf_fx.calibration.freed import BETWEEN_WALKS, give_back
from balf_fx.calibration.moments import by_sample, input_columns, output_columns
from balf_fx.calibration.observers import SensitivityObserver, observer_of
from balf_fx.calibration.pages import Pages
from balf_fx.calibration.parking import parked
from balf_fx.calibration.weights import Weights, read_masks
from balf_fx.checkpoint.journal import NO_JOURNAL, Journal
from balf_fx.distributed.group import ALONE, Group
from balf_fx.errors import OptionError, PassError
from balf_fx.graph.annotation import annotate, annotation
from balf_fx.graph.curves import Rank, Solution, Spectrum
from balf_fx.graph.expert_factors import build_experts
from balf_fx.graph.experts import leads_to_experts, read_experts
from balf_fx.graph.layers import read_layer, site_input
from balf_fx.graph.masks import mask_inputs
from balf_fx.graph.parameters import get_tensor, grouped_bias, grouped_weight, owns_weight, parameter_users
from balf_fx.graph.pivoted import feature_axis
from balf_fx.graph.site import Site
from balf_fx.graph.substitute import Substitute, build
from balf_fx.passes.base import Pass
from balf_fx.passes.factorize import planned
from balf_fx.progress import SILENT, Progress
from balf_fx.ranks.divided import by_column, by_patch
from balf_fx.ranks.spectra import in_parts
from balf_fx.refit.biases import shift_between, shifted
from balf_fx.refit.experts import refit_experts
from balf_fx.refit.lockstep import Batch, Lockstep, sources_of, without_ends
from balf_fx.refit.problems import BiasProblem, DividedProblem, LinearTarget, Problem
from balf_fx.refit.targets import Target, observes, summands_first
from balf_fx.refit.windows import Window
from balf_fx.refit.work import Shape, node_work, solved_shape
from balf_fx.widths.narrowing import Cut, find_cuts

RefitMode = Literal["full", "up"]
AnyMode = Literal[RefitMode, "outputs"]


@dataclass(frozen=True)
class Refit(Pass):
    """Refit the chosen factors and the dense layers between Allocate and Factorize.

    Attributes:
        inputs: the values of the graph's placeholders by name, for each calibration batch; may be read from files on
            access (`refit.offload.Shelved`).
        mode: "full" solves for the whole layer; "up" keeps right factors, and changes only the bias of dense layers.
            "outputs" is "up", but maps the outputs of divided kernels, which takes less time and recovers less.
        memory: bytes of values that are kept in memory; the rest are written to temporary files (`refit.lockstep`).
        handed: where the graph is a part of a larger program, the values for each batch that the compressed program
            has in place of some of `inputs`, so that the error of earlier parts is corrected too. Empty if none has.
        weights: the weights of positions by name of a mask, for each batch (`calibration.weights`). Without them, the
            masks among `inputs` say which positions count.
        group: the processes that refit together, each on its own batches: all sums are over the batches of all.
        progress: shows the progress over the nodes.
        journal: has the layers that were solved before a run was killed.
        pages: files for solutions, which give back what was read of them after each layer; None to keep all in memory.
        turns: the order of the batches of all processes (`distributed.shares`); by default, these take turns.
    """

    inputs: Sequence[Mapping[str, Any]]
    mode: AnyMode = "full"
    memory: int = MEMORY
    handed: Sequence[Mapping[str, Any]] = ()
    weights: Sequence[Mapping[str, Weights]] = ()
    group: Group = field(default=ALONE, repr=False, compare=False)
    progress: Progress = field(default=SILENT, repr=False, compare=False)
    journal: Journal = field(default=NO_JOURNAL, repr=False, compare=False)
    pages: Pages | None = field(default=None, repr=False, compare=False)
    turns: Sequence[int] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.mode not in get_args(AnyMode):
            raise OptionError(f"mode must be one of {', '.join(map(repr, get_args(AnyMode)))}, not {self.mode!r}")
        if len(self.handed) not in (0, len(self.inputs)):
            raise OptionError(f"handed has {len(self.handed)} batches, inputs has {len(self.inputs)}")
        if len(self.weights) not in (0, len(self.inputs)):
            raise OptionError(f"weights has {len(self.weights)} batches, inputs has {len(self.inputs)}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        ends = {node for node in graph_module.graph.nodes if node.op == "output" or observes(node)}
        nodes = [node for node in graph_module.graph.nodes if node not in ends and not leads_to_experts(node)]
        layers = {node for node in nodes if isinstance(read_layer(graph_module, node), Site)}
        layers -= {node for node in layers if annotation(node).keeps_weights}
        nodes = summands_first(graph_module, without_ends(graph_module, nodes, layers, ends), layers)
        with torch.no_grad():
            weights = self.weights
            if not len(weights) and mask_inputs(graph_module):
                weights = [read_masks(graph_module, values) for values in self.inputs]
            walk = Lockstep(graph_module, self.inputs, self.handed, self.memory, weights, self.group, self.turns)
            solver = _Solver(walk, self.mode, self.journal, self.pages)
            samples = sample_count(self.inputs[0]) * len(self.inputs) if self.inputs else 0
            work = node_work(nodes, solver.regressions(nodes, layers), max(samples, len(self.inputs)))
            walk.run(nodes, layers, solver.replace, partial(self.progress.track, weights=work))
        return PassResult(graph_module, False)


class _Solver:
    """Finds the replacement of each layer in the compressed model."""

    def __init__(self, walk: Lockstep, mode: AnyMode, journal: Journal, pages: Pages | None = None) -> None:
        self.walk, self.mode, self.journal, self.pages = walk, mode, journal, pages
        self.graph_module = walk.graph_module
        self.users = parameter_users(walk.graph_module)
        self.solved: dict[Site, Substitute] = {}
        self.cuts = find_cuts(walk.graph_module)

    def regressions(self, nodes: Sequence[fx.Node], layers: Set[fx.Node]) -> dict[fx.Node, tuple[Site, Shape]]:
        """The layers that will be solved, each with the shape of the map that is solved for."""
        moved = {node for node in nodes if self.walk.is_handed(node)}
        found: dict[fx.Node, tuple[Site, Shape]] = {}
        for node in nodes:
            changes = False
            if node in layers:
                site, rank, cut = _site(self.graph_module, node), _rank(node), self.cuts.get(node.name, Cut())
                if site_input(node) in moved and self._refittable(node, site, rank):
                    found[node] = site, solved_shape(cut.inputs(site), rank, self.mode == "full")
                changes = rank is not None or cut.changes
            if changes or not moved.isdisjoint(sources_of(node)):
                moved.add(node)
        return found

    def replace(self, node: fx.Node) -> None:
        """Solve a layer, and run its replacement on the compressed model's values."""
        site, rank = _site(self.graph_module, node), _rank(node)
        cut = self.cuts.get(node.name, Cut())
        moved = site_input(node) in self.walk.moved
        if site.has_experts:
            self._replace_experts(node, site, moved)
        elif moved and self._refittable(node, site, rank):
            (self._refit if self.mode == "full" else self._refit_up)(node, site, cut)
        elif moved or rank is not None or cut.changes:
            if site not in self.solved:
                self.solved[site] = self._build(site, cut, self._prior(node, site, cut))
            self.walk.finish(node, partial(_run, self.solved[site], partial(_reads, node, site, cut)))
        self._give_back(node, site)

    def _give_back(self, node: fx.Node, site: Site) -> None:
        """Give memory back after a layer; where there are files, its solution goes to them."""
        if self.pages is None:
            give_back(BETWEEN_WALKS, site.numel)
        else:
            annotate(node, refit=parked(annotation(node).refit, self.pages))
            self.pages.release()

    def _replace_experts(self, node: fx.Node, site: Site, moved: bool) -> None:
        """Solve for the factors of experts; those that stay dense run on the compressed model's values.

        In other modes they keep their one-shot factors: left factors fitted to rows that all count alike were worse.
        """
        product, curve = read_experts(node), annotation(node).curve
        if _rank(node) is None or product is None or curve is None:
            if not self.walk.moved.isdisjoint(sources_of(node)):
                self.walk.finish(node, partial(self.walk.compressed, node))
            return
        (solution,) = self._prior(node, site, Cut())
        if moved and self.mode == "full" and self._refittable(node, site, _rank(node)):
            weight = grouped_weight(self.graph_module, site)
            refitted = partial(refit_experts, self.walk, product, weight, solution, curve.spectrum)
            solution = self.journal.cached(f"layer {node.name}", refitted)
            annotate(node, refit=(solution,))
        factors = build_experts(get_tensor(self.graph_module, site.weight), site, solution)
        self.walk.finish(node, lambda batch: factors.run(node, batch.current))

    def _refittable(self, node: fx.Node, site: Site, rank: Rank) -> bool:
        """Whether the regression is defined for the layer, and nothing else reads the weight that it changes."""
        owned = owns_weight(self.graph_module, self.users, node, site) and not annotation(node).shared
        return owned and not site.transposed and not (rank is None and site.keeps_weight)

    def _build(self, site: Site, cut: Cut, solution: tuple[Solution, ...]) -> Substitute:
        """The module of a solution for the walk, in which every layer still outputs all of its features."""
        solution = solution if len(solution) > 1 else (cut.project(solution[0]),)
        built: Substitute = build(self.graph_module, cut.inputs(site), solution)  # type: ignore[assignment]
        return built

    def _prior(self, node: fx.Node, site: Site, cut: Cut) -> tuple[Solution, ...]:
        """The one-shot solution, or the unchanged layer where it is dense."""
        return planned(self.graph_module, node, site, cut)

    def _refit(self, node: fx.Node, site: Site, cut: Cut) -> None:
        """Solve for the whole layer."""
        prior, target = self._prior(node, site, cut), Target.of(self.graph_module, node, cut.inputs(site))
        linear = self._linear_target_of_parts(target, site, prior)
        problem = Problem(
            target=target,
            importance=self._importance(node),
            columns=partial(_input, node, site, cut),
            outputs=lambda value: in_parts(output_columns(value, site), len(prior)),
            toward=self._toward(site, cut, len(prior), linear),
            prior=prior,
            spectra=_spectra(node, site),
            linear=linear,
        )
        solution = self.journal.cached(f"layer {node.name}", partial(problem.solve, self.walk))
        annotate(node, refit=solution)
        self.walk.finish(node, partial(_run, self._build(site, cut, solution), partial(_reads, node, site, cut)))

    def _linear_target_of_parts(self, target: Target, site: Site, prior: Sequence[Solution]) -> LinearTarget | None:
        """The outputs of all parts as maps of a layer's inputs and 1, where these are fewer."""
        if any(part.divided for part in prior):
            return None
        linear = self._linear_target(target, site, site.out_features)
        return None if linear is None else dataclasses.replace(linear, map=in_parts(linear.map, len(prior)))

    def _toward(self, site: Site, cut: Cut, parts: int, linear: LinearTarget | None) -> Tensor:
        """The map of the original layer from the inputs that remain, to its outputs, or to z of the linear target."""
        if linear is None:
            whole = Solution(None, grouped_weight(self.graph_module, site), None)
            return in_parts(cut.narrow_inputs(whole, site).right, parts)
        same = torch.eye(site.in_features, dtype=linear.map.dtype, device=linear.map.device)
        narrowed = cut.narrow_inputs(Solution(None, same.expand(site.groups, -1, -1), None), site).right
        return F.pad(narrowed, (0, 0, 0, 1))

    def _linear_target(self, target: Target, site: Site, outputs: int, extra: int = 0) -> LinearTarget | None:
        """A layer's outputs as a map of its inputs and 1, if these and `extra` are fewer and it is the target."""
        changed = bool(target.additions) or target.limits is not None
        if changed or outputs <= site.in_features + 1 + extra:
            return None
        weight, bias = grouped_weight(self.graph_module, site), grouped_bias(self.graph_module, site)
        bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
        return LinearTarget(partial(_inputs_and_one, target.node, site), torch.cat([weight, bias.unsqueeze(-1)], -1))

    def _refit_up(self, node: fx.Node, site: Site, cut: Cut) -> None:
        """Solve for left factors and biases; until then, the layer's value is the output of its right factors."""
        prior, thin = self._prior(node, site, cut), cut.inputs(site)
        if self.mode == "outputs" and prior[0].divided:
            self._map_outputs(node, site, cut, prior[0])
            return
        as_read, reads = dataclasses.replace(cut, read=None), partial(_reads, node, site, cut)
        before = self._build(thin, as_read, prior)
        self.walk.store(node, lambda batch: before.run_first(reads(batch)))
        parts = zip(prior, _spectra(node, thin), self._linear_targets(node, site, prior), strict=True)
        solution = tuple(
            self.journal.cached(f"layer {node.name}, {index}", partial(self._solve_part, node, thin, index, *part))
            for index, part in enumerate(parts)
        )
        annotate(node, refit=solution)
        after = self._build(thin, as_read, solution)
        shifts = [
            None if old.left is not None else shift_between(old, new) for old, new in zip(prior, solution, strict=True)
        ]

        def finished(batch: Batch) -> Tensor:
            values = zip(batch.compressed[node], shifts, strict=True)
            return after.run_second([shifted(value, thin, shift) for value, shift in values])

        self.walk.finish(node, finished)

    def _map_outputs(self, node: fx.Node, site: Site, cut: Cut, prior: Solution) -> None:
        """Map the outputs of a layer with a divided kernel; until then, they are its value."""
        thin = cut.inputs(site)
        as_read, reads = dataclasses.replace(cut, read=None), partial(_reads, node, site, cut)
        self.walk.store(node, partial(_run, self._build(thin, as_read, (prior,)), reads))
        target = Target.of(self.graph_module, node, thin)
        problem = DividedProblem(target, self._importance(node), prior, *_spectra(node, thin))
        solution = self.journal.cached(f"layer {node.name}", partial(problem.solve, self.walk))
        annotate(node, refit=(solution,))
        self.walk.finish(node, partial(_run, self._build(thin, as_read, (solution,)), reads))

    def _linear_targets(self, node: fx.Node, site: Site, prior: Sequence[Solution]) -> Iterator[LinearTarget | None]:
        """For each part with a left factor, its outputs as a map of fewer values: inputs, 1, and its right factor's."""
        target = Target.of(self.graph_module, node, site)
        for index, part in enumerate(prior):
            found = None
            if part.left is not None and not part.divided:
                found = self._linear_target(target, site, *part.left.shape[1:])
            if found is not None and part.left is not None:
                map_ = found.map if len(prior) == 1 else in_parts(found.map, len(prior))[index : index + 1]
                map_ = torch.cat([map_, part.left], -1)
                found = dataclasses.replace(found, map=map_, zeros=part.left.shape[-1])
            yield found

    def _solve_part(
        self,
        node: fx.Node,
        site: Site,
        index: int,
        part: Solution,
        spectrum: Spectrum | None,
        linear: LinearTarget | None,
    ) -> Solution:
        """One part with a new left factor and bias; a dense part gets only a new bias, if it has one."""
        inner = dataclasses.replace(site, out_features=part.right.shape[1])
        if part.divided:
            inner = dataclasses.replace(inner, in_features=inner.out_features * part.taps[1], conv=site.factor_convs[1])

        def columns(batch: Batch, window: Window) -> Tensor:
            value = by_sample(batch.compressed[node][index], site)
            if part.divided:
                return input_columns(value[window.samples], inner, window.pixels)
            return output_columns(window.of(value), inner)

        def outputs(value: Tensor) -> Tensor:
            found = output_columns(value, site)
            size = part.right.shape[1] if part.left is None else part.left.shape[1] // part.taps[1]
            return found if size == site.out_features else found[:, index * size : (index + 1) * size]

        target, weights = Target.of(self.graph_module, node, site), self._importance(node)
        if part.left is not None:
            map_ = by_patch(part.left, site.out_features) if part.divided else part.left
            prior, toward = Solution(None, map_, part.bias), map_
            if linear is not None:
                same = torch.eye(linear.zeros, dtype=map_.dtype, device=map_.device)
                toward = F.pad(same.expand(len(map_), -1, -1), (0, 0, linear.size, 0))
            problem = Problem(target, weights, columns, outputs, toward, (prior,), (spectrum,), linear, part.taps[1])
            (found,) = problem.solve(self.walk)
            left = by_column(found.right, part.taps[1]) if part.divided else found.right
            return dataclasses.replace(part, left=left, bias=found.bias)
        if part.bias is None:
            return part
        bias = BiasProblem(target, weights, outputs, columns, part.bias, spectrum).solve(self.walk)
        return Solution(None, part.right, bias)

    def _importance(self, node: fx.Node) -> Tensor | None:
        """The weight of each position of a sample, where its gradients are known."""
        observer = observer_of(self.graph_module, annotation(node).sensitivity, SensitivityObserver)
        return None if observer is None else observer.positions


def _run(substitute: Substitute, reads: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    return substitute.run(reads(batch))


def _reads(node: fx.Node, site: Site, cut: Cut, batch: Batch) -> Tensor:
    """A layer's input in the compressed model: the remaining features where its width was narrowed."""
    value: Tensor = batch.current(site_input(node))
    return cut.read_features(value, feature_axis(site))


def _input(node: fx.Node, site: Site, cut: Cut, batch: Batch, own: Window) -> Tensor:
    """The compressed model's inputs at a window's positions, [G, D, n]."""
    value = by_sample(batch.current(site_input(node)), site)[own.samples]
    return input_columns(cut.read_features(value, feature_axis(site)), cut.inputs(site), own.pixels)


def _inputs_and_one(node: fx.Node, site: Site, batch: Batch, own: Window) -> Tensor:
    """The original model's inputs at a window's positions, and a row of ones, [G, D + 1, n]."""
    value = by_sample(batch.before(site_input(node)), site)[own.samples]
    return F.pad(input_columns(value, site, own.pixels), (0, 0, 0, 1), value=1.0)


def _site(graph_module: fx.GraphModule, node: fx.Node) -> Site:
    """The site recorded by Annotate, or the layer itself where it is not a site."""
    layer = annotation(node).site or read_layer(graph_module, node)
    if not isinstance(layer, Site):
        raise PassError(f"Refit: {node.name} is not a layer")
    return layer


def _rank(node: fx.Node) -> Rank:
    choice = annotation(node).choice
    return None if choice is None else choice.chosen.rank


def _spectra(node: fx.Node, site: Site) -> tuple[Spectrum | None, ...]:
    """The spectrum, and with it the metric, of each part that has a separate rank; None for the others."""
    curve = annotation(node).curve
    if curve is None:
        return (None,)
    if curve.parts is None or not isinstance(_rank(node), tuple):
        return (curve.spectrum,)
    return tuple(map(curve.parts.only, range(site.parts)))
