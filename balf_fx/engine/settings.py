"""Every option that a user has, in one place.

`compile`, `prepare`, `convert`, the backend of torch.compile and the command line take the fields of `Settings` by
name, with these defaults and these words. An option that is added here is there at every door.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, TypeVar, get_args

from balf_fx.calibration.batches import MEMORY, Loss
from balf_fx.capture.normal_form import Method as CaptureMethod
from balf_fx.errors import OptionError
from balf_fx.graph.curves import Rank
from balf_fx.graph.plan import Plan
from balf_fx.passes.allocate import Allocate, Method, allocate_for
from balf_fx.passes.follow import Follow
from balf_fx.passes.refit import RefitMode
from balf_fx.passes.score import Factors, Score
from balf_fx.progress import SILENT, Progress

Effort = Literal["fast", "balanced", "best"]
"""What compression spends on accuracy."""

Stage = Literal["prepare", "calibrate", "convert"]
"""What an option is for: capture and observers, running the batches, or everything after that."""

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_WRAPPER = textwrap.TextWrapper(120, initial_indent=" " * 8, subsequent_indent=" " * 12)
_F = TypeVar("_F", bound=Callable[..., Any])


def option(default: Any, text: str, *stages: Stage, values: Collection[Any] = ()) -> Any:
    """A field of `Settings`.

    Args:
        text: what it means, for docstrings and the command line.
        stages: what it is for.
        values: those that it can have; none: it is checked elsewhere.
    """
    metadata = {"text": text, "stages": stages, "values": tuple(values)}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What a user asks for; the text of each field says what it means."""

    flops: float | None = option(
        None,
        "the fraction of the whole model's FLOPs to keep, in (0, 1], as torch.utils.flop_counter counts them. This or "
        "params is the budget",
        "convert",
    )
    params: float | None = option(
        None, "the fraction of the whole model's parameters to keep, in (0, 1], in place of flops", "convert"
    )
    effort: Effort = option(
        "best",
        '"fast": factors by the output error, one-shot. "balanced": factors and widths by the output error to which '
        'the model\'s answer is sensitive, and the allocation that changes the answer least on some batches. "best": '
        "a refit of every layer as well. They take about 2, 7 and 22 times as long as the batches through the model; "
        "the latter two keep all batches",
        "prepare",
        "convert",
        values=get_args(Effort),
    )
    factors: Factors | None = option(
        None,
        'None for what the effort means; "activations" for the least output error over the calibration data; '
        '"sensitivity" for the least output error weighted by the gradients of a label-free loss '
        '(`calibration.gradients`); "air" for an output error in which every weight counts by its influence on the '
        'loss (`passes.Refine`); "svd" for the weights alone',
        "prepare",
        "convert",
        values=(None, *get_args(Factors)),
    )
    widths: bool = option(
        True,
        "let hidden features, and those of attention heads, become fewer where that is better than lower ranks; with "
        'factors="sensitivity" and allocation="budget"',
        "prepare",
        "convert",
        values=(True, False),
    )
    allocation: Method | Mapping[str, Rank] | Plan = option(
        "budget",
        'how the budget is spread over the sites: "budget" (least total loss of energy), "uniform" (the same share of '
        "each site's cost) or \"energy\" (the same share of each site's energy); or, without a budget, explicit "
        "{site: rank}, or the Plan of a model of the same architecture: its ranks and widths, not its values",
        "convert",
    )
    energy: float | None = option(
        None, 'with allocation="energy", the share of energy to keep in each site, in place of a budget', "convert"
    )
    centred: bool = option(True, "move the mean of what is dropped into the bias", "convert", values=(True, False))
    split: bool = option(
        True,
        "let the parts of fused projections, as of query, key and value, have factors of their own where that loses "
        'less at the same budget; not with factors="air"',
        "convert",
        values=(True, False),
    )
    fold_batchnorm: bool = option(
        True, "fold BatchNorm into the layer before it first", "prepare", values=(True, False)
    )
    include: Sequence[str] | None = option(
        None, "glob patterns of the layers that may change; the others keep their weights bit for bit", "prepare"
    )
    exclude: Sequence[str] = option(
        (),
        "glob patterns of layers that keep their weights bit for bit: no lower rank, no fewer features, no refit, no "
        "BatchNorm folded into them",
        "prepare",
    )
    dense: Sequence[str] = option(
        (), "glob patterns of layers that keep their full rank, but may be refitted and become narrower", "prepare"
    )
    strict: bool = option(
        True,
        "a budget below what is reachable is an error; False takes the closest reachable model instead",
        "convert",
        values=(True, False),
    )
    capture: CaptureMethod = option(
        "auto",
        '"symbolic_trace", "export", or "auto", which tries them in this order (`capture.normal_form`)',
        "prepare",
        values=get_args(CaptureMethod),
    )
    refit: bool | RefitMode | None = option(
        None,
        'None for what the effort means, with factors="sensitivity"; else whether to solve every layer again, on the '
        'input that it gets in the compressed model (`passes.Refit`): True or "full" for all of it; "up" for the left '
        'factors and biases, which is several times faster and recovers less; not with factors="air"',
        "convert",
        values=(None, True, False, *get_args(RefitMode)),
    )
    loss: Loss | None = option(
        None,
        'with factors="sensitivity" or "air", loss(output, batch): a scalar that is to stay small, in place of the '
        "label-free one",
        "calibrate",
        "convert",
    )
    memory: int | str = option(
        MEMORY,
        'bytes that intermediate values may take, 2147483648 or "2G". A batch that needs more runs in pieces, if the '
        "model treats its samples one by one; beyond it, values wait in temporary files (in TMPDIR)",
        "calibrate",
        "convert",
    )
    seed: int = option(0, "of the random probes", "calibrate")
    progress: bool = option(True, "show a progress bar on stderr", "calibrate", "convert", values=(True, False))

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            values, given = each.metadata["values"], getattr(self, each.name)
            if values and not any(given is value or (isinstance(given, str) and given == value) for value in values):
                raise OptionError(f"{each.name} is {', '.join(map(repr, values))}, not {given!r}")
        for name in ("include", "exclude", "dense"):
            _check_patterns(name, getattr(self, name))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise OptionError(f"seed is a whole number, not {self.seed!r}")
        if self.loss is not None and not callable(self.loss):
            raise OptionError(f"loss is a function of the output and the batch, not {self.loss!r}")
        _ = self.memory_bytes
        if self.refit and self.chosen_factors == "air":
            raise OptionError("refit would undo what factors='air' is for: drop one of them")

    @property
    def chosen_factors(self) -> Factors:
        """What the factors minimise."""
        if self.factors is not None:
            return self.factors
        return "activations" if self.effort == "fast" else "sensitivity"

    @property
    def refit_mode(self) -> RefitMode | None:
        """How layers are solved again; None for not at all."""
        if self.refit is None:
            return "full" if self.effort == "best" and self.chosen_factors == "sensitivity" else None
        return "full" if self.refit is True else self.refit or None

    @property
    def keeps_batches(self) -> bool:
        """Whether something is measured or solved on the batches after calibration."""
        return self.refit_mode is not None or self.chosen_factors == "sensitivity"

    @property
    def memory_bytes(self) -> int:
        """`memory` as a number.

        Raises:
            OptionError: it is not a number of bytes.
        """
        if isinstance(self.memory, int) and not isinstance(self.memory, bool) and self.memory >= 0:
            return self.memory
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", str(self.memory).lower())
        if not isinstance(self.memory, str) or found is None:
            raise OptionError(f"memory is a number of bytes, 2147483648 or '2G', not {self.memory!r}")
        return int(float(found[1]) * _UNITS[found[2]])

    def score(self, progress: Progress = SILENT) -> Score:
        """The pass that these settings mean."""
        return Score(self.chosen_factors, self.centred, self.split, progress=progress)

    def allocate(self) -> Allocate | Follow:
        """The pass that these settings mean.

        Raises:
            OptionError: there is no budget, or too much of one.
        """
        budget = {"flops": self.flops, "params": self.params, "energy": self.energy}
        if isinstance(self.allocation, Plan):
            given = [name for name, value in budget.items() if value is not None]
            if given:
                raise OptionError(f"a plan leaves nothing to a budget: drop {', '.join(given)}")
            return Follow(self.allocation)
        sensitive = self.chosen_factors == "sensitivity"
        return allocate_for(self.allocation, **budget, strict=self.strict, sensitive=sensitive)


def _check_patterns(name: str, patterns: Any) -> None:
    if patterns is None and name == "include":
        return
    listed = not isinstance(patterns, str) and isinstance(patterns, Sequence)
    if not listed or not all(isinstance(pattern, str) for pattern in patterns):
        raise OptionError(f"{name} is a list of patterns, ['head', 'blocks.*'], not {patterns!r}")


def options_of(*stages: Stage) -> dict[str, dataclasses.Field[Any]]:
    """The options for some of the stages, by name; no stage: all."""
    found = dataclasses.fields(Settings)
    return {each.name: each for each in found if not stages or set(stages) & set(each.metadata["stages"])}


def settings_from(given: Mapping[str, Any], *stages: Stage) -> Settings:
    """The settings that a user wrote.

    Args:
        stages: for which options are taken; none: all.

    Raises:
        OptionError: an option does not exist, belongs elsewhere, or has no meaning; lists those that there are.
    """
    names = options_of(*stages)
    unknown = sorted(set(given) - set(names))
    if unknown:
        listed = ", ".join(names)
        raise OptionError(f"there is no option {', '.join(map(repr, unknown))} here; the options are: {listed}")
    return Settings(**given)


def takes_settings(*stages: Stage, **defaults: Any) -> Callable[[_F], _F]:
    """Show the options in place of a function's `**options`: in its signature, and where its docstring has {options}.

    Args:
        stages: as in `settings_from`.
        defaults: of options whose default is another one here.
    """

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        found = {name: each for name, each in options_of(*stages).items() if name not in signature.parameters}
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name, None if each.default is MISSING else each.default),
                annotation=each.type,
            )
            for name, each in found.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        if function.__doc__ is not None:
            wrapped = (_WRAPPER.fill(f"{name}: {each.metadata['text']}.") for name, each in found.items())
            function.__doc__ = function.__doc__.replace("        {options}", "\n".join(wrapped))
        return function

    return decorate
