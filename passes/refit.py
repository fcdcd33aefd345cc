"""Solve every layer again for the input that it gets in the compressed model.

One-shot factors assume that a layer's input is what it was. Refit walks the original and the compressed model side by
side (`lockstep`), and at each layer regresses y on the compressed model's own x' (`regression`): the error made
upstream is corrected as far as x' tells of it. Or it keeps the right factor B and regresses y on B x', which is much
cheaper and much less.

Three things make the target more than y. Where the layer's output is added to another value, the target takes in that
value's error, too: so residual streams are mended at every block. Where ReLU or ReLU6 follows, an error below zero, or
above six, is none: the target is moved there to what the first solution puts out, and the layer solved again. And
positions count by the gradients that the loss has there.

How far to trust the regression is decided on a held-out quarter of all samples: the ridge that has the least error
there is taken, or the layer as it was if that is better. Of a convolution's output every pixel counts only until there
are some hundred positions for each unknown: beyond these a grid of pixels is read, another one in every chunk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.calibration.batches import MEMORY
from balf_fx.calibration.moments import by_sample, input_columns, output_columns
from balf_fx.calibration.observers import SensitivityObserver, observer_of
from balf_fx.errors import OptionError, PassError
from balf_fx.graph.annotation import annotate, annotation
from balf_fx.graph.curves import Rank, Solution, Spectrum
from balf_fx.graph.layers import read_layer, site_input
from balf_fx.graph.parameters import grouped_weight, owns_weight, parameter_users
from balf_fx.graph.site import Reason, Site
from balf_fx.graph.substitute import Substitute, build
from balf_fx.passes.base import Pass
from balf_fx.passes.factorize import planned
from balf_fx.ranks.spectra import in_parts
from balf_fx.refit.lockstep import Batch, Lockstep
from balf_fx.refit.regression import Inputs, Joint, JointSums, apply, best
from balf_fx.refit.targets import addition_of, limits_of, observes, target_of, within_limits
from balf_fx.refit.windows import Window, chunks, pixel_grid, pixel_step, repeated
from balf_fx.widths.narrowing import Cut, find_cuts

RefitMode = Literal["full", "up"]


@dataclass(frozen=True)
class Refit(Pass):
    """Refit the chosen factors and the dense layers between Allocate and Factorize.

    Attributes:
        inputs: of each calibration batch, the values of the graph's placeholders by name; may be read from files on
            access (`offload.Shelved`).
        mode: "full" solves for all of a layer; "up" keeps right factors, and of dense layers all but the bias.
        memory: bytes of values that are kept in memory; what is beyond waits in temporary files (`lockstep`).
        handed: where the graph is a part of a larger program, of each batch the values that the compressed model
            hands to it in place of some of `inputs`: layers are solved against the error made before, too. Empty
            where there are none.
    """

    inputs: Sequence[Mapping[str, Any]]
    mode: RefitMode = "full"
    memory: int = MEMORY
    handed: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        if self.mode not in get_args(RefitMode):
            raise OptionError(f"mode is one of {', '.join(map(repr, get_args(RefitMode)))}, not {self.mode!r}")
        if len(self.handed) not in (0, len(self.inputs)):
            raise OptionError(f"handed has {len(self.handed)} batches, inputs {len(self.inputs)}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        nodes = [node for node in graph_module.graph.nodes if node.op != "output" and not observes(node)]
        layers = {node for node in nodes if isinstance(read_layer(graph_module, node), Site) and not _is_excluded(node)}
        with torch.no_grad():
            walk = Lockstep(graph_module, self.inputs, self.handed, self.memory)
            walk.run(nodes, layers, _Solver(walk, self.mode).replace)
        return PassResult(graph_module, False)


@dataclass(frozen=True)
class _Problem:
    """What is to be solved at a layer: its outputs from columns, which are its input or something made of it.

    Attributes:
        columns: of a window of a batch, [G, D, n].
        outputs: cuts windows of values like the layer's output into [G, O, n].
        toward: [G, O, D], the map that the ridge draws to.
        prior: the solution so far, from columns to outputs, one for each part.
        spectra: the metric of each part, None for the plain squared error.
        offset: [G, O, n], what the layer puts out beside what is solved for.
    """

    columns: Callable[[Batch, Window], Tensor]
    outputs: Callable[[Tensor], Tensor]
    toward: Tensor
    prior: tuple[Solution, ...]
    spectra: tuple[Spectrum | None, ...]
    offset: Callable[[Batch, Window], Tensor] | None = None


@dataclass(frozen=True)
class _Earlier:
    """A first solution of a layer whose output is seen between limits only."""

    solution: tuple[Solution, ...]
    limits: tuple[float, float]


class _Solver:
    """Finds what takes each layer's place in the compressed model."""

    def __init__(self, walk: Lockstep, mode: RefitMode) -> None:
        self.walk = walk
        self.mode = mode
        self.graph_module = walk.graph_module
        self.users = parameter_users(walk.graph_module)
        self.solved: dict[Site, Substitute] = {}
        self.cuts = find_cuts(walk.graph_module)

    def replace(self, node: fx.Node) -> None:
        """Solve a layer, and run what takes its place on the compressed model's values."""
        site, rank = _site(self.graph_module, node), _rank(node)
        cut = self.cuts.get(node.name, Cut())
        moved = site_input(node) in self.walk.moved
        if moved and self._refittable(node, site, rank):
            (self._refit if self.mode == "full" else self._refit_up)(node, site, cut)
        elif moved or rank is not None or cut.changes:
            if site not in self.solved:
                self.solved[site] = self._build(site, cut, self._prior(node, site, cut))
            self.walk.store(node, partial(_run, self.solved[site], partial(_reads, node, site, cut)))

    def _refittable(self, node: fx.Node, site: Site, rank: Rank) -> bool:
        """Whether the regression can be written down, and nothing else needs the weight that it changes."""
        owned = owns_weight(self.graph_module, self.users, node, site)
        return owned and not site.transposed and not (rank is None and site.keeps_weight)

    def _build(self, site: Site, cut: Cut, solution: tuple[Solution, ...]) -> Substitute:
        """What computes a solution in the walk, where every layer still writes all of its features."""
        solution = solution if len(solution) > 1 else (cut.project(solution[0]),)
        return build(self.graph_module, cut.inputs(site), solution)

    def _prior(self, node: fx.Node, site: Site, cut: Cut) -> tuple[Solution, ...]:
        """The one-shot solution, or the layer as it is."""
        return planned(self.graph_module, node, site, cut)

    def _refit(self, node: fx.Node, site: Site, cut: Cut) -> None:
        """Solve for all of a layer."""
        prior, thin = self._prior(node, site, cut), cut.inputs(site)
        whole = cut.narrow_inputs(Solution(None, grouped_weight(self.graph_module, site), None), site)
        problem = _Problem(
            columns=partial(_input, node, site, cut),
            outputs=lambda value: _in_parts(output_columns(value, site), len(prior)),
            toward=in_parts(whole.right, len(prior)),
            prior=prior,
            spectra=_spectra(node, site),
        )
        solution = self._solve(node, thin, problem)
        annotate(node, refit=solution)
        self.walk.store(node, partial(_run, self._build(site, cut, solution), partial(_reads, node, site, cut)))

    def _refit_up(self, node: fx.Node, site: Site, cut: Cut) -> None:
        """Solve for left factors and biases; until it is done, the values are what first factors put out."""
        prior, site = self._prior(node, site, cut), cut.inputs(site)
        before = self._build(site, dataclasses.replace(cut, read=None), prior)
        reads = partial(_reads, node, _site(self.graph_module, node), cut)
        self.walk.store(node, lambda batch: before.run_first(reads(batch)))
        spectra = _spectra(node, site)
        solution = tuple(self._solve_part(node, site, prior, spectra, index) for index in range(len(prior)))
        annotate(node, refit=solution)
        after = self._build(site, dataclasses.replace(cut, read=None), solution)
        shifts = [None if old.left is not None else _shift(old, new) for old, new in zip(prior, solution, strict=True)]

        def finished(batch: Batch) -> Tensor:
            values = zip(batch.compressed[node], shifts, strict=True)
            return after.run_second([_shifted(value, site, shift) for value, shift in values])

        self.walk.store(node, finished)

    def _solve_part(
        self, node: fx.Node, site: Site, prior: tuple[Solution, ...], spectra: tuple[Spectrum | None, ...], index: int
    ) -> Solution:
        """What is new of one part: the left factor and the bias, or of what stays dense the bias alone."""
        part = prior[index]
        own = slice(index, index + 1) if len(prior) > 1 else slice(None)
        width = part.right.shape[1]
        inner = dataclasses.replace(site, out_features=width)

        def columns(batch: Batch, window: Window) -> Tensor:
            return output_columns(window.of(by_sample(batch.compressed[node][index], site)), inner)

        def outputs(value: Tensor) -> Tensor:
            return _in_parts(output_columns(value, site), len(prior))[own]

        def no_columns(batch: Batch, window: Window) -> Tensor:
            value = window.of(by_sample(batch.compressed[node][index], site))
            return value.new_empty(site.groups, 0, value.numel() // (site.groups * width))

        if part.left is not None:
            known = (Solution(None, part.left, part.bias),)
            (found,) = self._solve(node, site, _Problem(columns, outputs, part.left, known, (spectra[index],)))
            return Solution(found.right, part.right, found.bias)
        if part.bias is None:
            return part
        nothing = part.right[..., :0]
        bias = part.bias
        problem = _Problem(
            columns=no_columns,
            outputs=outputs,
            toward=nothing,
            prior=(Solution(None, nothing, torch.zeros_like(bias)),),
            spectra=(spectra[index],),
            offset=columns,
        )
        (found,) = self._solve(node, site, problem)
        return Solution(None, part.right, bias if found.bias is None else bias + found.bias)

    def _solve(self, node: fx.Node, site: Site, problem: _Problem) -> tuple[Solution, ...]:
        """The solution of least error on what was held out; a dense layer gains no bias that it has not had."""
        biased = any(part.left is not None or part.bias is not None for part in problem.prior)
        train, held_out = self._sums(node, site, problem)
        solution = _best(train, held_out, problem, biased)
        limits = limits_of(self.graph_module, node)
        if limits is not None:
            known = (train.inputs, held_out.inputs)
            train, held_out = self._sums(node, site, problem, _Earlier(solution, limits), known)
            solution = _best(train, held_out, problem, biased)
        return solution

    def _sums(
        self,
        node: fx.Node,
        site: Site,
        problem: _Problem,
        earlier: _Earlier | None = None,
        known: tuple[Inputs, Inputs] | tuple[None, None] = (None, None),
    ) -> tuple[Joint, Joint]:
        """What the regression needs to know of the training share and of the held-out share of all batches.

        Args:
            earlier: where not all of the output is seen, decides what an error is where it is not.
            known: the sums over the inputs, where these have been taken.
        """
        groups, outputs, inputs = problem.toward.shape
        shape = (groups if len(problem.prior) == 1 else 1, inputs)
        device = problem.toward.device
        shares = [JointSums(shape, (groups, outputs), device, inputs_of) for inputs_of in known]
        addition = addition_of(self.graph_module, node)
        seen = turn = 0  # windows take turns, so that between them they see all pixels
        for batch in self.walk.batches():
            original = by_sample(batch.original[node], site)
            sizes = tuple(original.shape[2:] if site.conv is not None else original.shape[1:2])
            step = pixel_step(len(self.walk.inputs) * len(original), sizes, inputs) if site.conv is not None else 1
            positions = math.prod(-(-size // step) for size in sizes)
            weights = self._weights(node, sizes)
            for share, samples in chunks(seen, len(original), positions, max(inputs, outputs)):
                own = Window(samples, pixel_grid(sizes, step, turn))
                turn += 1
                x = problem.columns(batch, own)
                x = x.to(torch.promote_types(x.dtype, torch.float32))
                wanted, other = target_of(batch, node, addition, site, own)
                beside = None if problem.offset is None else problem.offset(batch, own)
                if earlier is None:
                    y = problem.outputs(wanted if other is None else wanted - other)
                else:
                    if other is not None:
                        beside = problem.outputs(other) if beside is None else beside + problem.outputs(other)
                    predicted = apply(earlier.solution, x)
                    predicted = predicted if beside is None else predicted + beside
                    y = within_limits(problem.outputs(wanted), predicted, earlier.limits)
                y = y if beside is None else y - beside
                shares[share].add(x, y.to(x.dtype), None if weights is None else repeated(weights, own, x))
            seen += len(original)
        return shares[0].joint(), shares[1].joint()

    def _weights(self, node: fx.Node, sizes: tuple[int, ...]) -> Tensor | None:
        """What each position of a sample counts, 1 on average, in the output's shape."""
        observer = observer_of(self.graph_module, annotation(node).sensitivity, SensitivityObserver)
        if observer is None or observer.positions is None:
            return None
        own = observer.positions
        if len(own) != math.prod(sizes):
            return None
        return (own / own.mean().clamp_min(torch.finfo(own.dtype).tiny)).reshape(sizes)


def _is_excluded(node: fx.Node) -> bool:
    """Whether the user wants a layer to stay as it is: it only runs on other values then."""
    refusal = annotation(node).refusal
    return refusal is not None and refusal.reason is Reason.EXCLUDED


def _best(train: Joint, held_out: Joint, problem: _Problem, biased: bool) -> tuple[Solution, ...]:
    if biased:
        return best(train, held_out, problem.toward, problem.prior, problem.spectra)
    solution = best(train.uncentred(), held_out.uncentred(), problem.toward, problem.prior, problem.spectra)
    return tuple(dataclasses.replace(part, bias=None) for part in solution)


def _run(substitute: Substitute, reads: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    return substitute.run(reads(batch))


def _reads(node: fx.Node, site: Site, cut: Cut, batch: Batch) -> Tensor:
    """A layer's input in the compressed model: of a narrowed width, the features that it has left."""
    value: Tensor = batch.current(site_input(node))
    return cut.read_features(value, -1 if site.conv is None else -1 - len(site.conv.kernel_size))


def _input(node: fx.Node, site: Site, cut: Cut, batch: Batch, own: Window) -> Tensor:
    """What a window's inputs are in the compressed model, [G, D, n]."""
    value = by_sample(batch.current(site_input(node)), site)[own.samples]
    axis = -1 if site.conv is None else -1 - len(site.conv.kernel_size)
    return input_columns(cut.read_features(value, axis), cut.inputs(site), own.pixels)


def _in_parts(outputs: Tensor, parts: int) -> Tensor:
    """[1, O, n] as [parts, O / parts, n]."""
    return outputs if parts == 1 else outputs.reshape(parts, -1, outputs.shape[-1])


def _shift(old: Solution, new: Solution) -> Tensor | None:
    """[G, O], by how much the bias has changed."""
    return new.bias if old.bias is None or new.bias is None else new.bias - old.bias


def _shifted(value: Tensor, site: Site, shift: Tensor | None) -> Tensor:
    """An output [.., G * O] or [.., G * O, *size] with a shift added to its features."""
    if shift is None:
        return value
    sizes = () if site.conv is None else (1,) * len(site.conv.kernel_size)
    return value + shift.to(value.dtype).reshape(-1, *sizes)


def _site(graph_module: fx.GraphModule, node: fx.Node) -> Site:
    """A layer as Annotate has marked it, or as it is where it is no site."""
    layer = annotation(node).site or read_layer(graph_module, node)
    if not isinstance(layer, Site):
        raise PassError(f"Refit: {node.name} is no layer")
    return layer


def _rank(node: fx.Node) -> Rank:
    choice = annotation(node).choice
    return None if choice is None else choice.chosen.rank


def _spectra(node: fx.Node, site: Site) -> tuple[Spectrum | None, ...]:
    """The metric of each part that has a rank of its own."""
    curve = annotation(node).curve
    if curve is None:
        return (None,)
    if curve.parts is None or not isinstance(_rank(node), tuple):
        return (curve.spectrum,)
    return tuple(map(curve.parts.only, range(site.parts)))
