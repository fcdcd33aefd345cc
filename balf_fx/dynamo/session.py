"""What one call of `torch.compile(..., backend="balf")` knows: graphs, statistics, and in the end factors."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from balf_fx.dynamo.binding import Binding, Key, Use, computing
from balf_fx.dynamo.frames import Request, WeightInput, is_training, legal_path, weight_inputs
from balf_fx.dynamo.options import BackendOptions
from balf_fx.dynamo.watch import Watch
from balf_fx.errors import BalfError, NoSiteError, NotCalibratedError, WeightsChangedError
from balf_fx.files.restore import Stored
from balf_fx.graph.annotation import GraphRecord, Origin, Replaced, sites
from balf_fx.graph.curves import Rank, RankCurve
from balf_fx.graph.plan import Plan
from balf_fx.graph.site import Reason, Refusal, Site
from balf_fx.graph.substitute import Substitute, replace_site
from balf_fx.passes import Annotate, FoldBatchNorm, InsertObservers, Score
from balf_fx.passes.allocate import Totals
from balf_fx.passes.annotate import check_patterns
from balf_fx.passes.factorize import factor_modules, fingerprint
from balf_fx.reporting.report import Report, summarise

_LOGGER = logging.getLogger("balf_fx.backend")


@dataclass(frozen=True)
class Factors:
    """The two layers in place of a site, None where it stays dense, and the watch over the tensors they stand for."""

    pair: Substitute | None
    originals: Mapping[str, Tensor]
    watch: Watch


class Region:
    """One graph that Dynamo captured: what the compiled code calls.

    It is called with the weights among its arguments; each set of weights has a binding of its own, since Dynamo runs
    all layers of one class through the same graph where it can.
    """

    def __init__(
        self, session: Session, graph_module: fx.GraphModule, weights: tuple[WeightInput, ...], request: Request
    ) -> None:
        self.graph_module = graph_module
        self.weights = weights
        self.frame = request.frame
        self.module = None if request.module is None else weakref.ref(request.module)
        self._session = session
        positions = [weight.position for weight in weights]
        count = len(graph_module.graph.find_nodes(op="placeholder"))
        self._weights = _picker(positions)
        self._inputs = _picker(sorted(set(range(count)) - set(positions)))
        self.bindings: dict[tuple[int, ...], Binding] = {}

    def __call__(self, *args: Any) -> Any:
        weights, inputs = self._weights(args), self._inputs(args)
        binding = self.bindings.get(tuple(map(id, weights)))
        if binding is None or binding.compiled is None:  # calibrating, switching, or weights seen for the first time
            return self._session.run(self, weights, inputs)
        if not binding.watch.unchanged():
            raise changed(binding)
        return binding.compiled(*inputs)


def _picker(positions: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Takes some items out of a tuple, as fast as Python can."""
    if len(positions) < 2:  # itemgetter would give a single item, and needs one at least
        return lambda values: tuple(values[position] for position in positions)
    return itemgetter(*positions)


class Session:
    """Calibrates, switches once, and keeps the factors, for one call of `torch.compile`."""

    def __init__(self, options: BackendOptions, owner: object | None) -> None:
        self.options = options
        self._owner = owner
        self._lock = threading.RLock()
        self._warned = False
        self._forget()

    def _forget(self) -> None:
        self._regions: list[Region] = []
        self._names: dict[int, str] = {}  # by the weight's id
        self._taken: set[str] = set()
        self._step = 0
        self._generator = torch.Generator().manual_seed(self.options.seed)
        self._entered: set[tuple[Any, ...]] = set()
        self._failure: BalfError | None = None
        self._plan: Stored | None = self.options.stored
        self._factors: dict[Key, Factors] | None = None if self._plan is None else {}

    def release(self) -> None:
        """Let go of every tensor and graph; whatever is called after this calibrates anew."""
        for region in self._regions:
            region.bindings.clear()  # in place: Dynamo copies a region's attributes to the function that it calls
        self._forget()

    @property
    def plan(self) -> Stored:
        """Ranks and factors.

        Raises:
            NotCalibratedError: it is still calibrating.
        """
        if self._plan is None:
            raise NotCalibratedError(
                f"{self._step} of {self.options.calibration_steps} calls of the model have been observed so far; the "
                "one after the last is compressed"
            )
        return self._plan

    # Taking in graphs, while Dynamo compiles. Dynamo's lock is held here, and `run` may ask for it with ours: no lock.

    def take(self, graph_module: fx.GraphModule, example_inputs: list[Any], request: Request) -> Callable[..., Any]:
        """What stands in for one graph: a region, or the graph itself where it must not be compressed."""
        needs_gradients = torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in example_inputs
        )
        if needs_gradients or is_training(graph_module):
            self._warn_uncompressed("gradients are required" if needs_gradients else "the model is in training mode")
            return self.options.compiler(graph_module, example_inputs)
        region = Region(self, graph_module, weight_inputs(graph_module, example_inputs), request)
        if request.module is not None and not self._regions:  # the model, or the first part of it that is compiled
            weakref.finalize(request.module, _release, weakref.ref(self)).atexit = False
        self._regions.append(region)
        return region

    def _warn_uncompressed(self, reason: str) -> None:
        if not self._warned:
            _LOGGER.warning(
                "%s: such calls run uncompressed and are not observed. Compression is for inference, after "
                "model.eval() and under torch.no_grad() or torch.inference_mode()",
                reason,
            )
        self._warned = True

    # Running them, until each is compiled.

    def run(self, region: Region, weights: Sequence[Tensor], inputs: Sequence[Any]) -> Any:
        """Run a graph that is not compiled yet: observed, or, from the switch on, compiled now."""
        with self._lock:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            binding = self._binding(region, weights)
            if self._factors is None and not binding.watch.unchanged():
                self._restart(binding.watch.changed())
                binding = self._binding(region, weights)
            if self._factors is None and self._calibrates(region, binding):
                return binding.observe(inputs, self._generator)
            if self._factors is None:
                self._switch()
            if not binding.rewritten:
                with computing():
                    self._rewrite(binding)
            if binding.compiled is None:
                binding.compiled = self.options.compile(binding.graph_module, inputs)
            compiled = binding.compiled
        return compiled(*inputs)

    def _binding(self, region: Region, weights: Sequence[Tensor]) -> Binding:
        key = tuple(map(id, weights))
        if key not in region.bindings:
            module = None if region.module is None else region.module()
            if module is not None:
                self._take_names(module)
            names = [self._name(given.name, weight) for given, weight in zip(region.weights, weights, strict=True)]
            sensitive = self._factors is None and self.options.factors == "sensitivity"
            gradients = self._prepare_gradients if sensitive else None
            binding = Binding(region.graph_module, region.weights, names, weights, gradients)
            self._annotate(binding.graph_module)
            if self._factors is None and self.options.factors == "activations" and sites(binding.graph_module):
                InsertObservers(skip_non_finite=True)(binding.graph_module)
            region.bindings[key] = binding
        return region.bindings[key]

    def _take_names(self, module: nn.Module) -> None:
        """Call weights what the module calls them: Dynamo may have found them in other places."""
        for name, weight in (*module.named_parameters(), *module.named_buffers()):
            self._name(legal_path(name), weight)

    def _name(self, proposed: str, weight: Tensor) -> str:
        """The weight's name in all graphs; two modules may have the same name for different weights."""
        if id(weight) not in self._names:
            owner, dot, last = proposed.rpartition(".")
            numbered = (f"{owner}_{number}{dot}{last}" for number in itertools.count(1))
            names = itertools.chain([proposed], numbered)
            self._names[id(weight)] = next(name for name in names if name not in self._taken)
            self._taken.add(self._names[id(weight)])
        return self._names[id(weight)]

    def _annotate(self, graph_module: fx.GraphModule) -> None:
        """Find the sites of one graph; which patterns match nothing is known when all graphs are."""
        Annotate()(graph_module)
        names = [site.name for site in sites(graph_module)]
        include, exclude = (
            [pattern for pattern in patterns or () if any(fnmatchcase(name, pattern) for name in names)]
            for patterns in (self.options.include, self.options.exclude)
        )
        Annotate(None if self.options.include is None else include, exclude)(graph_module)

    def _prepare_gradients(self, graph_module: fx.GraphModule) -> None:
        """Bring a copy of a graph into the form that is scored, and put observers into it."""
        if self.options.fold_batchnorm:
            FoldBatchNorm()(graph_module)
        self._annotate(graph_module)
        if sites(graph_module):
            InsertObservers(sensitivity=True, skip_non_finite=True)(graph_module)

    def _restart(self, changed: Sequence[str]) -> None:
        """Forget what was observed."""
        _LOGGER.warning("%s changed: calibration starts again", ", ".join(changed))
        self._step, self._entered = 0, set()
        self._generator.manual_seed(self.options.seed)
        for region in self._regions:
            region.bindings.clear()

    def _calibrates(self, region: Region, binding: Binding) -> bool:
        """Count a call of the model whenever a frame is entered again, and tell whether it is still to be observed."""
        entered = (region.frame, *map(id, binding.originals.values()))
        if not self._entered or entered in self._entered:
            self._step, self._entered = self._step + 1, set()
        self._entered.add(entered)
        return self._step <= self.options.calibration_steps

    def _bindings(self) -> list[Binding]:
        return [binding for region in self._regions for binding in region.bindings.values()]

    # The switch.

    def _switch(self) -> None:
        try:
            with computing():
                self._solve([binding for binding in self._bindings() if binding.calls])
        except BalfError as error:
            self._failure = error  # later calls would only find the same
            raise

    def _solve(self, bindings: list[Binding]) -> None:
        """Spend one budget on all graphs that were called, and keep the factors that it chooses."""
        options = self.options
        # 1. Bring the graphs into the form that is rewritten, and see which sites they have in common.
        for binding in bindings:
            binding.settle(options.fold_batchnorm)
            self._annotate(binding.graph_module)
        refusals = [(refusal, flops, b.calls) for b in bindings for refusal, flops in b.refusals]
        layers = _merge([use for binding in bindings for use in binding.uses()], options.factors != "svd")
        self._check_sites([use.site for use in layers.values()], [refusal for refusal, *_ in refusals])
        # 2. Score every rank of every site, at what it costs in one call of the model.
        repeats = math.gcd(*(binding.calls for binding in bindings))
        curves = {use.site: _score(options.score, use, repeats) for use in layers.values()}
        # 3. Solve the budget.
        totals = Totals(
            flops=sum(binding.calls * binding.flops for binding in bindings) // repeats,
            params=_count_by_name(binding.originals for binding in bindings),
            params_now=_count_by_name(dict(binding.graph_module.named_parameters()) for binding in bindings),
        )
        allocation = options.allocate.solve(curves, totals)
        # 4. Keep the factors: each graph is rewritten and compiled when it is called next.
        ranks = [choice.chosen.rank for choice in allocation.choices]
        factors = {
            key: _factors(use, curves[use.site], rank) for (key, use), rank in zip(layers.items(), ranks, strict=True)
        }
        record = GraphRecord(
            flops=totals.flops,
            params=totals.params,
            params_after=totals.params_after(allocation),
            captured="dynamo",
            allocation=allocation,
            refusals=tuple((refusal, flops * calls // repeats) for refusal, flops, calls in refusals),
        )
        report = summarise(record, allocation)
        self._plan = _stored(layers, factors, Origin(None, options.fold_batchnorm), report)
        self._factors = factors
        self._log_switch(report, len(bindings))

    def _check_sites(self, found: list[Site], refusals: list[Refusal]) -> None:
        excluded = [refusal.name for refusal in refusals if refusal.reason is Reason.EXCLUDED]
        check_patterns(self.options.include, self.options.exclude, [*(site.name for site in found), *excluded])
        if not found and self.options.strict:
            listed = "; ".join(f"{refusal.name}: {refusal}" for refusal in refusals) or "they have no parameters"
            raise NoSiteError(f"nothing in the compiled graphs can be factorized ({listed})")

    def _log_switch(self, report: Report, graphs: int) -> None:
        ranks = ", ".join(f"{row.name}: {'dense' if row.rank is None else row.rank}" for row in report.sites)
        _LOGGER.info("call %d is the first compressed one (graphs: %d); ranks: {%s}", self._step, graphs, ranks)
        _LOGGER.info(
            "FLOPs of a call %s -> %s (%.2f %% kept), parameters %s -> %s (%.2f %% kept)",
            f"{report.flops_before:,}",
            f"{report.flops_after:,}",
            100 * (report.flops_kept or 0.0),
            f"{report.params_before:,}",
            f"{report.params_after:,}",
            100 * report.params_kept,
        )
        _LOGGER.debug("%s", report)

    # After the switch.

    def _rewrite(self, binding: Binding) -> None:
        """Put the factors that there are into a graph."""
        binding.settle(self.plan.fold_batchnorm)
        self._annotate(binding.graph_module)
        uses = binding.uses()
        known = {use.key: factors for use in uses if (factors := self._find(use)) is not None}
        stale = [name for factors in known.values() for name in factors.watch.changed()]
        if stale:
            raise WeightsChangedError(_changed_message(stale))
        for use in uses:
            pair = known[use.key].pair if use.key in known else None
            if pair is not None:
                replace_site(binding.graph_module, use.nodes, use.site, pair)
        replaced = [factors.originals for factors in known.values() if factors.pair is not None]
        binding.finish(Watch({name: tensor for originals in replaced for name, tensor in originals.items()}))

    def _find(self, use: Use) -> Factors | None:
        """The factors of a site: those of the switch, or else the plan's."""
        known = self._factors or {}
        if use.key not in known and self.options.stored is not None:
            pair = self.options.stored.pair(use.graph_module, use.site)
            known[use.key] = Factors(pair, use.originals, Watch(use.originals))
            self._factors = known
        if use.key not in known:
            _LOGGER.info("site %s stays dense: calibration has not seen its weights", use.site.name)
        return known.get(use.key)


def changed(binding: Binding) -> WeightsChangedError:
    """The error for a call with weights that are not what the factors stand for."""
    return WeightsChangedError(_changed_message(binding.watch.changed()))


def _changed_message(names: Sequence[str]) -> str:
    return (
        f"{', '.join(names)} changed after the switch, and the compressed graphs still compute with what was there: "
        "call torch.compiler.reset() to calibrate again with the new weights"
    )


def _release(session: weakref.ref[Session]) -> None:
    found = session()
    if found is not None:
        found.release()


def _merge(uses: Sequence[Use], observed: bool) -> dict[Key, Use]:
    """One use for each site, with the statistics and costs of all; without those that no finite value has reached."""
    merged: dict[Key, Use] = {}
    for use in uses:
        other = merged.get(use.key)
        merged[use.key] = use if other is None else other.merge(use)
    if observed:
        for use in merged.values():
            if use.seen is None:
                _LOGGER.warning("site %s stays dense: no finite value has reached it", use.site.name)
        merged = {key: use for key, use in merged.items() if use.seen is not None}
    names: set[str] = set()
    for key, use in merged.items():
        numbered = (f"{use.site.name}_{number}" for number in range(1, len(names) + 1))
        name = next(name for name in (use.site.name, *numbered) if name not in names)
        merged[key] = replace(use, site=replace(use.site, name=name))
        names.add(name)
    return merged


def _count_by_name(graphs: Iterable[Mapping[str, Tensor]]) -> int:
    """Parameters in all graphs together, each once."""
    sizes = {
        name: tensor.numel() for held in graphs for name, tensor in held.items() if isinstance(tensor, nn.Parameter)
    }
    return sum(sizes.values())


def _score(score: Score, use: Use, repeats: int) -> RankCurve:
    """The curve of a site, at what it costs in one call of the model."""
    costs = use.flops // repeats, use.elements // repeats
    if use.seen is None or use.seen.sample is None:
        return score.score(use.graph_module, use.site, None if use.seen is None else use.seen.moments, *costs)
    sample, halves = use.seen.sample, use.seen.halves
    return score.score(use.graph_module, use.site, sample.moments, *costs, sample.gradients, halves=halves)


def _factors(use: Use, curve: RankCurve, rank: Rank) -> Factors:
    pair = None if rank is None else factor_modules(use.graph_module, use.site, curve, rank)
    return Factors(pair, use.originals, Watch(use.originals))


def _stored(layers: Mapping[Key, Use], factors: Mapping[Key, Factors], origin: Origin, report: Report) -> Stored:
    """The plan and the factors that were chosen."""
    ranks = {row.name: row.rank for row in report.sites}
    replaced, tensors = [], {}
    for key, use in layers.items():
        pair, name = factors[key].pair, use.site.name
        if pair is not None:
            replaced.append(Replaced(name, ranks[name], pair.biased, fingerprint(use.graph_module, use.site)))
            tensors.update({f"{name}.{path}": value for path, value in pair.module.named_parameters()})
    return Stored(Plan(report, origin, tuple(replaced)), tensors)
