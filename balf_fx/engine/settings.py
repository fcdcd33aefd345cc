"""All user options in one place.

`compile`, `prepare`, `convert`, the backend of torch.compile and the command line take the fields of `Settings` by
name, with these defaults and these descriptions. An option that is added here is available wherever it applies.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from balf_fx.calibration.batches import Loss
from balf_fx.calibration.weights import WeightsOf
from balf_fx.capture.normal_form import Method as CaptureMethod
from balf_fx.engine import checks
from balf_fx.engine.fields import Effort, Result, option
from balf_fx.engine.memory import KINDS, SHARE, bytes_of, check_memory
from balf_fx.engine.units import share_of
from balf_fx.errors import OptionError
from balf_fx.graph.annotation import Origin
from balf_fx.graph.curves import Divided, Measure, Rank
from balf_fx.graph.plan import Plan
from balf_fx.graph.site import MOVE
from balf_fx.graph.timing import Runner
from balf_fx.passes.align import Align
from balf_fx.passes.allocate import Allocate, Method, allocate_for
from balf_fx.passes.find_pivots import FindPivots
from balf_fx.passes.follow import Follow
from balf_fx.passes.refit import RefitMode
from balf_fx.passes.score import Factors, Score
from balf_fx.progress import SILENT, Progress


@dataclass(frozen=True)
class Settings:
    """The options of one compression; the text of each field describes it."""

    flops: float | None = option(
        None,
        "the fraction of the whole model's FLOPs to keep, in (0, 1], as torch.utils.flop_counter counts them. This, "
        "params or latency is the budget. Without any, only what is free is removed: what changes the weights by no "
        "more than rounding in single precision",
        "convert",
    )
    params: float | None = option(
        None, "the fraction of the whole model's parameters to keep, in (0, 1], in place of flops", "convert"
    )
    latency: float | str | None = option(
        None,
        "the time of one call to keep, in place of flops: a fraction of the original's, in (0, 1], or a time such as "
        '"12ms". It is measured here, on the first calibration batch (`passes.Time`, `engine.timing`), and the report '
        "has the times. Nothing that is slower than the original is used",
        "convert",
    )
    runner: Runner | None = option(
        None,
        'how the model will be run, for latency: "eager", or "inductor" for torch.compile. By default, the one with '
        "which the original is faster",
        "convert",
        values=(None, *get_args(Runner)),
    )
    disagreement: float | None = option(
        None,
        "in place of a budget: the largest share, in (0, 1), of inputs like those of validation on which the model's "
        "prediction, such as the class, may differ from the original's. Budgets are tested on these from 0.95 "
        "downwards (`engine.certify`), and the last one that passes is taken; the report has its bound",
        "convert",
    )
    divergence: float | None = option(
        None,
        "the same for other outputs than classes: the largest mean over samples of |y' - y| / |y|, at most 1 for each "
        "sample, where y and y' are the outputs of the original and of the compressed model",
        "convert",
    )
    validation: Any = option(
        None,
        "batches to test disagreement or divergence on, in any form of calibration batches; they must be others than "
        "those, and independent of each other",
        "convert",
    )
    confidence: float = option(
        0.95, "the probability, in (0, 1), with which the limit of disagreement or divergence is kept", "convert"
    )
    minimise: Measure = option(
        "flops",
        'the cost to minimise under disagreement or divergence: "flops", "params" or "latency"',
        "convert",
        values=get_args(Measure),
    )
    effort: Effort = option(
        "best",
        '"fast" chooses factors by the output error of each layer. "balanced" weights that error by the sensitivity '
        "of the model's output, reduces widths too, and takes the allocation that changes the model's output least on "
        'some of the batches. "best" also refits every layer. They take about 2, 6 and 15 times as long as one run of '
        'the batches through the model; "balanced" and "best" keep all batches in memory or in temporary files',
        "convert",
        values=get_args(Effort),
    )
    factors: Factors | None = option(
        None,
        'what the factors minimise: "activations", the output error over the calibration data; "sensitivity", the '
        'output error weighted by the gradients of a loss without labels (`calibration.gradients`); "air", the output '
        'error with each weight weighted by its influence on the loss (`passes.Refine`); "svd", the error of the '
        "weights. By default, effort decides",
        "prepare",
        "convert",
        values=(None, *get_args(Factors)),
    )
    widths: bool = option(
        True,
        "allow fewer hidden features and fewer features of attention heads where that is better than lower ranks; "
        'with factors="sensitivity" and allocation="budget"',
        "prepare",
        "convert",
        values=(True, False),
    )
    allocation: Method | Mapping[str, Rank] | Plan = option(
        "budget",
        'how the budget is distributed over the sites: "budget" (least total loss), "uniform" (the same share of each '
        'site\'s cost) or "energy" (the same share of each site\'s energy). Or, without a budget, "free", explicit '
        "ranks as {site: rank}, or the Plan of a model of the same architecture, whose ranks and widths are used",
        "convert",
    )
    energy: float | None = option(
        None, 'with allocation="energy" and no budget: the share, in (0, 1], of energy to keep in each site', "convert"
    )
    centred: bool = option(
        True, "add the mean of the dropped part of each output to the bias", "convert", values=(True, False)
    )
    split: bool = option(
        True,
        "allow separate factors for the parts of a fused projection, such as query, key and value, where that loses "
        'less at the same budget; not with factors="air"',
        "convert",
        values=(True, False),
    )
    pivot: bool = option(
        True,
        "write a map of rank r as r of its own rows, or columns, and combinations of them where that is cheaper than "
        "two factors (`ranks.pivots`), and add its bias apart (`passes.SplitBias`): the same for fewer FLOPs",
        "prepare",
        "convert",
        values=(True, False),
    )
    separable: bool | None = option(
        None,
        "let a convolution become k x 1 and 1 x k ones, which lose less at the same FLOPs, but take longer; by default "
        "with latency only. `convert` needs it in `prepare`, too. With False, a convolution may not become 1 x 1 and "
        "k x k ones either, but k x k and 1 x 1 ones alone",
        "prepare",
        "convert",
        values=(True, False, None),
    )
    multiple_of: int | Literal["auto"] = option(
        1,
        "let the rank of each layer, the channels between layers and the features of each head be multiples of this "
        'number, such as 8, 16 or 32, where they are reduced: the hardware takes as long for sizes in between. "auto" '
        "measures for each layer here which multiples are faster (`passes.Align`)",
        "convert",
    )
    fold_batchnorm: bool = option(
        True, "first fold each BatchNorm and layer scale into the layer before it", "prepare", values=(True, False)
    )
    include: Sequence[str] | None = option(
        None, "glob patterns of the layers that may change; the others keep their weights bit for bit", "prepare"
    )
    exclude: Sequence[str] = option(
        (),
        "glob patterns of layers that keep their weights bit for bit: they keep their rank and features, are not "
        "refitted, and no BatchNorm is folded into them",
        "prepare",
    )
    dense: Sequence[str] = option(
        (), "glob patterns of layers that keep their full rank, but may be refitted and made narrower", "prepare"
    )
    strict: bool = option(
        True,
        "raise an error if the budget cannot be reached; False takes the closest reachable model instead",
        "convert",
        values=(True, False),
    )
    capture: CaptureMethod = option(
        "auto",
        'how the graph is captured: "symbolic_trace", "export", or "auto", which tries them in this order '
        "(`capture.normal_form`)",
        "prepare",
        values=get_args(CaptureMethod),
    )
    safetensors: str | os.PathLike[str] | None = option(
        None,
        "a file or a folder of safetensors, as save_pretrained writes it, with the weights of a model that is on the "
        "meta device. They are read where they are used, block by block, and the result's weights stay in files",
        "prepare",
        "convert",
    )
    result: Result = option(
        "graph",
        'what is returned: "graph", a GraphModule that is called with the arguments of the first batch; or "module", a '
        "copy of the model, of its class, in which compressed layers stand under their own names, so that all of its "
        "methods work, such as generate. Layers that cannot go back into it stay as they are",
        "prepare",
        "convert",
        values=get_args(Result),
    )
    refit: bool | RefitMode | None = option(
        None,
        "whether to solve every layer again for the input that it has in the compressed model (`passes.Refit`): True "
        'or "full" solves for the whole layer, "up" for left factors and biases only, which is several times faster '
        'and recovers less. By default, effort="best" refits: `compile` with factors="sensitivity", `convert` if it '
        'has batches. Not with factors="air"',
        "convert",
        values=(None, True, False, *get_args(RefitMode)),
    )
    temperature: bool | None = option(
        None,
        "multiply the logits by the factor that brings the probabilities closest to the original's on some batches, "
        "by default those of language models alone, with True those of classifiers, too; not with loss",
        "convert",
        values=(None, True, False),
    )
    loss: Loss | None = option(
        None,
        'with factors="sensitivity" or "air", a function loss(output, batch) that returns a scalar to keep small, a '
        "mean over the batch's samples, in place of the loss without labels",
        "calibrate",
        "convert",
    )
    weights: WeightsOf | None = option(
        None,
        "a function weights(batch) that returns how much each position of a batch counts, as a tensor of numbers of at "
        "least 0: [N] for N samples, or [N, L] for their positions, such as tokens (`calibration.weights`). By "
        "default, positions that an argument attention_mask [N, L] leaves out do not count, and all others do",
        "calibrate",
        "convert",
    )
    memory: int | float | str = option(
        SHARE,
        'memory beside the model: bytes, such as "2GiB", or a share of the free main memory, such as 0.25. Half '
        "of it is for statistics, which beyond it are computed block by block (`engine.blockwise`), half for values, "
        "which beyond it are kept in temporary files (in TMPDIR), with the same result. A batch that needs more than "
        "half of it, or 2 GiB, is run in pieces if samples do not depend on each other, and a sequence without padding "
        "if the model is causal (`calibration.pieces`). Pieces have random probes and held-out samples of their own",
        "calibrate",
        "convert",
    )
    distributed: bool = option(
        True,
        "where torch.distributed has several processes, compress one model in all of them, each of which passes its "
        "own batches and gets the same model, bit for bit. False compresses in this process alone",
        "calibrate",
        "convert",
        values=(True, False),
    )
    seed: int = option(0, "the seed of the random probes, to which each process adds its rank", "calibrate")
    checkpoint: str | os.PathLike[str] | None = option(
        None,
        "a folder for what is finished: the statistics of `compile`, the allocation, refitted layers, the result. If "
        "the run is killed, the same call goes on from there to the same model; once it is complete, it returns that "
        "model at once. Another model, other options or other data are an error (`engine.resuming`)",
        "convert",
    )
    progress: bool = option(True, "show a progress bar on stderr", "calibrate", "convert", values=(True, False))

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            checks.check_choice(each.name, getattr(self, each.name), each.metadata["values"])
        checks.check_patterns(include=self.include, exclude=self.exclude, dense=self.dense)
        checks.check_seed(self.seed)
        checks.check_limit(self.disagreement, self.divergence, self.confidence, self.validation)
        checks.check_functions(loss=(self.loss, "the output and the batch"), weights=(self.weights, "the batch"))
        checks.check_paths(checkpoint=self.checkpoint, safetensors=self.safetensors)
        checks.check_ranks(self.allocation)
        check_memory(self.memory)
        _ = self.align()
        if self.refit and self.chosen_factors == "air":
            raise OptionError("a refit would replace the factors of factors='air': drop one of them")

    def with_free(self) -> Settings:
        """The settings for what is free if there is no budget: it needs no statistics, since any input shall do.

        Raises:
            OptionError: a refit is asked for without a budget.
        """
        budget = (self.flops, self.params, self.latency, self.energy, self.limit)
        if self.allocation not in ("budget", "free") or any(value is not None for value in budget):
            return self
        if self.refit or self.factors not in (None, "svd"):
            raise OptionError("without a budget, nothing is lost that factors or a refit could recover: give a budget")
        return dataclasses.replace(self, allocation="free", factors="svd", refit=False, widths=False)

    @property
    def limit(self) -> float | None:
        """The largest disagreement or divergence that is allowed; None for a budget."""
        return self.divergence if self.disagreement is None else self.disagreement

    def at(self, share: float) -> Settings:
        """The settings for a budget in place of a limit on disagreement or divergence."""
        budget: dict[str, Any] = {**dict.fromkeys(get_args(Measure)), self.minimise: share}
        budget |= {} if self.divergence is None else {"temperature": False}  # outputs are compared, not probabilities
        return dataclasses.replace(self, disagreement=None, divergence=None, validation=None, strict=True, **budget)

    @property
    def chosen_factors(self) -> Factors:
        """What the factors minimise."""
        usual: Factors = "activations" if self.effort == "fast" else "sensitivity"
        return usual if self.factors is None else self.factors

    @property
    def refit_mode(self) -> RefitMode | None:
        """How layers are solved again; None if they are not."""
        if self.refit is None:
            return "full" if self.effort == "best" and self.chosen_factors == "sensitivity" else None
        return "full" if self.refit is True else self.refit or None

    @property
    def keeps_batches(self) -> bool:
        """Whether the batches are needed after calibration, for measuring or solving."""
        return self.refit_mode is not None or self.chosen_factors == "sensitivity" or self.times

    @property
    def calibrates(self) -> bool:
        """Whether statistics of the batches are needed."""
        return self.chosen_factors != "svd"

    @property
    def measures(self) -> bool:
        """Whether a few allocations are measured on batches, where there are any."""
        allocate = self.allocate()
        chooses = isinstance(allocate, Allocate) and allocate.method == "budget" and allocate.ranks is None
        return chooses and (self.chosen_factors == "sensitivity" or (self.effort == "fast" and self.factors is None))

    @property
    def times(self) -> bool:
        """Whether the budget is a time."""
        return self.latency is not None or (self.limit is not None and self.minimise == "latency")

    @property
    def memory_bytes(self) -> int:
        """The bytes of `memory` for each kind of what shares it; of a share, what is free now."""
        return bytes_of(self.memory) // KINDS

    def score(self, progress: Progress = SILENT) -> Score:
        """Return the scoring pass for these settings."""
        own = self.allocation.divided if isinstance(self.allocation, Plan) else self.divisions
        options = (self.chosen_factors, self.centred, self.split)
        return Score(*options, divisions=own, by_time=self.times, progress=progress)

    @property
    def divisions(self) -> tuple[Divided, ...]:
        """How kernels may be divided between the factors of convolutions."""
        if isinstance(self.allocation, Plan):
            return self.allocation.divisions
        if self.separable is False or self.allocation != "budget" or self.chosen_factors in ("air", "svd"):
            return ()
        return ("pointwise_first", "separable") if self.separable or self.times else ("pointwise_first",)

    def align(self) -> Align:
        """Return the pass that sets the steps of ranks and widths for these settings.

        Raises:
            OptionError: `multiple_of` is neither a whole number of at least 1 nor "auto".
        """
        return Align(self.multiple_of)

    def find_pivots(self) -> FindPivots:
        """Return the pass that finds forms of low-rank maps for these settings; under `params`, moves are free."""
        return FindPivots(self.pivot, MOVE if self.params is None else 0)

    def allocate(self) -> Allocate | Follow:
        """Return the allocating pass for these settings, with any budget if disagreement or divergence is limited.

        Raises:
            OptionError: there is no budget, or more than one.
        """
        latency = None if self.latency is None else share_of(self.latency)
        budget = {"flops": self.flops, "params": self.params, "latency": latency, "energy": self.energy}
        given = [name for name, value in budget.items() if value is not None]
        if self.limit is not None:
            given += [] if isinstance(self.allocation, str) else ["allocation"]
            if given:
                listed = ", ".join(given)
                raise OptionError(f"disagreement= or divergence= takes the place of a budget: drop {listed}")
            return self.at(1.0).allocate()
        if isinstance(self.allocation, Plan):
            if given:
                raise OptionError(f"a plan cannot be combined with a budget: drop {', '.join(given)}")
            return Follow(self.allocation)
        sensitive = self.chosen_factors == "sensitivity"
        return allocate_for(self.allocation, **budget, strict=self.strict, sensitive=sensitive)

    def origin(self, arguments: Mapping[str, Any] | None) -> Origin:
        """How these settings make a graph of a model, given the description of its example call."""
        include = None if self.include is None else tuple(self.include)
        return Origin(arguments, self.fold_batchnorm, include, tuple(self.exclude), tuple(self.dense))
