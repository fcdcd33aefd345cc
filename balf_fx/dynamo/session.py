"""The state of one call of `torch.compile(..., backend="balf")`: its graphs, their recorded inputs, and the plan."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from balf_fx.calibration.batches import Calibration, is_empty
from balf_fx.capture.checks import check_values
from balf_fx.capture.names import legal_path
from balf_fx.dynamo.binding import Binding, computing, watched_by
from balf_fx.dynamo.frames import Request, WeightInput, is_training, name_arguments, weight_inputs
from balf_fx.dynamo.options import BackendOptions
from balf_fx.dynamo.recording import Recording, confirmed, on_inputs, weights_of_inputs
from balf_fx.dynamo.watch import Watch
from balf_fx.engine import compress
from balf_fx.engine.program import Key, Program, keys_of, name_alike, per_call, run_trace
from balf_fx.engine.resuming import check_batches, open_journal
from balf_fx.engine.rewriting import applicable, fill, find_features, held_tensors, normalise, rewrite_as
from balf_fx.engine.run import run
from balf_fx.errors import BalfError, NotCalibratedError, OptionError, WeightsChangedError
from balf_fx.files.checkpoint import read_result, write_result
from balf_fx.files.restore import Stored
from balf_fx.graph.annotation import sites
from balf_fx.graph.layers import layers_of
from balf_fx.graph.parameters import fingerprint, get_tensor
from balf_fx.graph.plan import Plan
from balf_fx.progress import Progress, progress_bar
from balf_fx.reporting.report import Report

_LOGGER = logging.getLogger("balf_fx.backend")


class Region:
    """One graph that Dynamo captured, as a callable for the compiled code.

    Its arguments include the weights. Each set of weights has a separate binding, since Dynamo may run all layers of
    one class through the same graph.
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
            return self._session.run(self, args, weights, inputs)
        if not binding.watch.unchanged():
            raise WeightsChangedError(_changed_message(binding.watch.changed()))
        return binding.compiled(*inputs)


def _picker(positions: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return a fast function that selects the items at these positions of a tuple."""
    if len(positions) < 2:  # itemgetter would return a single item, and requires at least one
        return lambda values: tuple(values[position] for position in positions)
    return itemgetter(*positions)


class Session:
    """Records the first calls, compresses the graphs once, and stores the plan, for one call of `torch.compile`."""

    def __init__(self, options: BackendOptions, owner: object | None) -> None:
        self.options = options
        self.settings = options.settings
        self._memory = options.settings.memory_bytes
        self._owner = owner
        self._lock = threading.RLock()
        self._warned = False
        self._forget()

    def _forget(self) -> None:
        self._regions: list[Region] = []
        self._names: dict[int, str] = {}  # by the weight's id
        self._taken: set[str] = set()
        self._sites: dict[Key, str] = {}
        self._step = 0
        self._recording = Recording(self._memory)
        self._entered: list[tuple[Any, ...]] = []  # the frames of the current call
        self._failure: BalfError | None = None
        self._stored: Stored | None = self.options.stored
        self._watch = Watch({})

    def release(self) -> None:
        """Release every tensor and graph; later calls start a new calibration."""
        for region in self._regions:
            region.bindings.clear()  # in place: Dynamo copies a region's attributes to the function that it calls
        self._recording.close()
        self._forget()

    @property
    def plan(self) -> Stored:
        """The plan, and the tensors of the layers that were replaced.

        Raises:
            NotCalibratedError: the session is still calibrating.
        """
        if self._stored is None:
            raise NotCalibratedError(
                f"{self._step} of {self.options.calibration_steps} calls of the model have been observed so far; the "
                "model is compressed in the call after the last of them"
            )
        return self._stored

    # Called while Dynamo compiles. Dynamo holds its lock here, and `run` may request it while holding the session's:
    # taking the session's lock here could deadlock.

    def take(self, graph_module: fx.GraphModule, example_inputs: list[Any], request: Request) -> Callable[..., Any]:
        """Return the callable for one graph: a region, or the graph itself if it must not be compressed."""
        needs_gradients = torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in example_inputs
        )
        if needs_gradients or is_training(graph_module):
            self._warn_uncompressed("gradients are required" if needs_gradients else "the model is in training mode")
            return self.options.compiler(graph_module, example_inputs)
        name_arguments(graph_module, request.arguments)
        region = Region(self, graph_module, weight_inputs(graph_module, example_inputs), request)
        if request.module is not None and not self._regions:  # the model, or the first part of it that is compiled
            weakref.finalize(request.module, _release, weakref.ref(self)).atexit = False
        self._regions.append(region)
        return region

    def _warn_uncompressed(self, reason: str) -> None:
        if not self._warned:
            _LOGGER.warning(
                "%s: such calls run uncompressed and are not observed. Compression is for inference: call the model "
                "after model.eval(), under torch.no_grad() or torch.inference_mode()",
                reason,
            )
        self._warned = True

    # Runs of the graphs, until each is compiled.

    def run(self, region: Region, args: Sequence[Any], weights: Sequence[Tensor], inputs: Sequence[Any]) -> Any:
        """Run a graph that is not compiled yet: unchanged and recorded or, after the switch, compiled first."""
        with self._lock:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            binding = self._binding(region, weights)
            if self._stored is None and not binding.watch.unchanged():
                self._restart(binding.watch.changed())
                binding = self._binding(region, weights)
            if self._stored is None and is_empty(inputs):
                return region.graph_module(*args)
            if self._stored is None and self._calibrates(binding):
                with computing():
                    run = self._recording.enter(binding, inputs)
                output = region.graph_module(*args)
                self._recording.leave(run, output)
                return output
            if self._stored is None:
                self._switch()
            if not binding.rewritten:
                with computing():
                    self._rewrite(binding, inputs)
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
            region.bindings[key] = Binding(region.graph_module, region.weights, names, weights, region.frame)
        return region.bindings[key]

    def _take_names(self, module: nn.Module) -> None:
        """Use the module's names for its weights: Dynamo may have found them by other paths."""
        for name, weight in (*module.named_parameters(), *module.named_buffers()):
            self._name(legal_path(name), weight)

    def _name(self, proposed: str, weight: Tensor) -> str:
        """The weight's unique name in all graphs; two modules may use the same name for different weights."""
        if id(weight) not in self._names:
            owner, dot, last = proposed.rpartition(".")
            numbered = (f"{owner}_{number}{dot}{last}" for number in itertools.count(1))
            names = itertools.chain([proposed], numbered)
            self._names[id(weight)] = next(name for name in names if name not in self._taken)
            self._taken.add(self._names[id(weight)])
        return self._names[id(weight)]

    def _restart(self, changed: Sequence[str]) -> None:
        """Delete the recorded calls and start calibration again."""
        _LOGGER.warning("%s changed: calibration starts again", ", ".join(changed))
        self._step, self._entered = 0, []
        self._recording.close()
        self._recording = Recording(self._memory)
        for region in self._regions:
            region.bindings.clear()

    def _calibrates(self, binding: Binding) -> bool:
        """Count a new call of the model if a frame is entered again, and return whether the call is calibration.

        One call may enter frames without weights several times, such as those of activations: such a frame only counts
        where it was the first of a call.
        """
        entered, weights = binding.code, bool(binding.originals)
        if not self._entered or (entered in self._entered and (weights or entered == self._entered[0])):
            self._step, self._entered = self._step + 1, []
            self._recording.begin()
        self._entered.append(entered)
        return self._step <= self.options.calibration_steps

    # The switch.

    def _switch(self) -> None:
        devices = {tensor.device for binding in self._recording.bindings for tensor in binding.originals.values()}
        cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})
        try:
            with (
                computing(),
                torch.random.fork_rng(devices=cuda),
                progress_bar(self.settings.progress, "compressing") as bar,
            ):
                self._compress(self._recording.bindings, bar)
        except BalfError as error:
            self._failure = error  # later calls would fail in the same way
            self._recording.close()
            raise
        self._recording.close()  # not after other errors, such as an interrupt: the next call tries again

    def _compress(self, bindings: list[Binding], progress: Progress) -> None:
        """Compress all graphs that were called under one budget, and store the new layers."""
        settings, traces = self.settings, self._recording.traces()
        # 1. Make the graphs parts of one program, and the calls traces through it.
        first = {step.part: step.args for trace in reversed(traces) for step in reversed(trace)}
        calls, together = per_call([binding.calls for binding in bindings], [binding.code for binding in bindings])
        origin = settings.origin(None)
        parts = [bound.part(n, first[i], origin) for i, (bound, n) in enumerate(zip(bindings, calls, strict=True))]
        program = Program(tuple(parts), lambda _, batch: batch)
        for graph_module in program.graph_modules:
            check_values(graph_module)
        with confirmed(program.graph_modules, traces, self._memory) as batches:
            # 2. Observe, calibrate and convert, as for a model that is captured as a whole.
            compress.observe(program, settings, {settings.chosen_factors})
            journal = open_journal(program, settings, run_trace)
            check_batches(journal, batches)
            self._sites, self._stored = keys_of(parts), read_result(journal)
            if self._stored is not None:
                return
            unchanged = sum(not sites(graph_module) for graph_module in program.graph_modules)
            calibration = Calibration(
                batches,
                run_trace,
                on_inputs(settings.loss),
                self._memory,
                settings.seed,
                None if settings.weights is None else weights_of_inputs(settings.weights),
            )
            compressed, plan = run(program, settings, calibration, lenient=True, progress=progress, journal=journal)
            plan = plan.of_one_call(together)
        # 3. Run each graph with its new layers, and watch the tensors that these replace.
        replaced = {layer.name for layer in plan.layers}
        tensors: dict[str, Tensor] = {}
        watched: dict[str, Tensor] = {}
        for part, bound, graph_module in zip(parts, bindings, compressed.graph_modules, strict=True):
            own = watched_by(part, replaced)
            watched |= own
            tensors |= _tensors_of(graph_module, replaced)
            bound.finish(graph_module, part, own)
        self._watch, self._stored = Watch(watched), Stored(plan, tensors)
        write_result(journal, self._stored)
        self._log_switch(plan, len(bindings), unchanged)

    def _log_switch(self, plan: Plan, graphs: int, unchanged: int) -> None:
        ranks = ", ".join(f"{name}: {'dense' if rank is None else rank}" for name, rank in plan.ranks.items())
        _LOGGER.info("call %d is the first compressed one (graphs: %d); ranks: {%s}", self._step, graphs, ranks)
        if unchanged:
            _LOGGER.info("%d of %d graphs have no layers to compress and run unchanged", unchanged, graphs)
        narrowed = [width for width in plan.widths if width.is_narrower]
        if narrowed:
            sizes = ", ".join(f"{width.key}: {width.features} -> {width.size}" for width in narrowed)
            _LOGGER.info("widths: {%s}", sizes)
        _LOGGER.info(
            "FLOPs of a call %s -> %s (%.2f %% kept), parameters %s -> %s (%.2f %% kept)",
            f"{plan.flops or 0:,}",
            f"{plan.flops_after or 0:,}",
            100 * (plan.flops_kept or 0.0),
            f"{plan.params:,}",
            f"{plan.params_after:,}",
            100 * plan.params_kept,
        )
        _LOGGER.debug("%s", Report.of(plan))

    # After the switch.

    def _rewrite(self, binding: Binding, inputs: Sequence[Any]) -> None:
        """Rewrite a graph that did not run in calibration by the plan: for another shape, or a part compiled later."""
        stale = self._watch.changed()
        if stale:
            raise WeightsChangedError(_changed_message(stale))
        found = self.plan
        part = binding.part(1, inputs, found.plan.origin)
        graph_module = part.graph_module
        normalise(graph_module, found.plan.origin, partial=True)
        name_alike(part, self._sites)
        if sites(graph_module):
            find_features(graph_module, found.plan)
        unseen = [site.name for site in sites(graph_module) if site.name not in found.plan.ranks]
        if unseen:
            _LOGGER.info("%s stay dense: they were not part of calibration", ", ".join(unseen))
        plan = applicable(found.plan, graph_module)
        self._check_weights(graph_module, plan)
        replaced = {layer.name for layer in plan.layers}
        watched = watched_by(part, replaced)
        layers = layers_of(graph_module)
        weights = {name: get_tensor(graph_module, layers[name][0].weight) for name in replaced}
        rewrite_as(graph_module, plan)
        for name, weight in weights.items():
            own = {path.removeprefix(f"{name}."): value for path, value in found.tensors.items() if _inside(path, name)}
            fill(graph_module.get_submodule(name), own, like=weight)
        binding.finish(graph_module, part, watched)

    def _check_weights(self, graph_module: fx.GraphModule, plan: Plan) -> None:
        """Check that a plan was made for these weights.

        Raises:
            OptionError: it was made for other weights; names the first layer that differs.
        """
        layers = layers_of(graph_module)
        for layer in plan.layers:
            if not layer.fingerprint.matches(fingerprint(graph_module, layers[layer.name][0])):
                raise OptionError(
                    f"the plan was made for other weights than those of site {layer.name!r}: calibrate again"
                )


def _tensors_of(graph_module: fx.GraphModule, replaced: set[str]) -> dict[str, Tensor]:
    """The tensors of the layers that were replaced, by dotted path."""
    held = dict(graph_module.named_modules())
    return {f"{name}.{path}": value for name in replaced if name in held for path, value in held_tensors(held[name])}


def _inside(path: str, name: str) -> bool:
    return path.startswith(f"{name}.")


def _changed_message(names: Sequence[str]) -> str:
    return (
        f"{', '.join(names)} changed after the switch, and the compressed graphs still use the old values: "
        "call torch.compiler.reset() to calibrate again with the new weights"
    )


def _release(session: weakref.ref[Session]) -> None:
    found = session()
    if found is not None:
        found.release()
