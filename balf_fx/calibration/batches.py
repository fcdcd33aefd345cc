"""The forms of a batch, and how the model is called with one.

* A tensor is the only argument; a mapping holds keyword arguments; a tuple or list holds positional arguments.
* Labels. DataLoaders yield `(images, labels)`, and calibration needs no labels. Trailing elements of a tuple are
  dropped if `forward` has no parameter for them, or if they are one-dimensional integer tensors that it does not
  require. In a mapping, `label` and `labels` are dropped if `forward` has no such parameter.
* Anything else needs a function `forward(model, batch)` from the caller.
* Padding. Positions that an argument `attention_mask` [N, L] leaves out do not count, nor do those to which the user's
  function `weights(batch)` gives no weight (`calibration.weights`).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from balf_fx.calibration.describing import describe
from balf_fx.calibration.pages import Pages
from balf_fx.calibration.weights import WeightsOf
from balf_fx.distributed.group import ALONE, Group
from balf_fx.distributed.shares import starts_in_turn
from balf_fx.errors import BalfError, CalibrationError

MODEL_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that a model's Python code raises for unsuitable input; others are not converted to CalibrationError."""


Forward = Callable[[nn.Module, Any], Any]
"""`forward(model, batch)` runs the model on a batch and returns its output."""

Loss = Callable[[Any, Any], Tensor]
"""`loss(output, batch)` returns a scalar to keep small, in place of the loss without labels."""

MEMORY = 2 << 30
"""The bytes of intermediate values in the largest piece of a batch, and those that a pass by itself keeps in memory.

A constant, since pieces have random probes and held-out samples of their own: results would depend on the free memory.
"""


@dataclass(frozen=True)
class Calibration:
    """The data to calibrate on, and how it is run.

    Attributes:
        batches: batches without labels, in any form that `forward` takes.
        forward: runs the model on one of them.
        loss: the user's loss, in place of the one without labels.
        memory: bytes that intermediate values may take.
        seed: the seed of the random probes.
        weigh: the user's weights of a batch's positions; None if masks alone decide.
        weights: what `weigh` returns for each of the batches; empty where it has not been called.
        seen: the number of samples that were calibrated on, if the batches are only some of them.
        group: the processes that calibrate together, each on its own batches.
        turns: where batches are pieces of larger ones, the index of that one for each.
        pages: where the model goes block by block (`engine.blockwise`), the files of what is scored.
    """

    batches: Sequence[Any]
    forward: Forward
    loss: Loss | None = None
    memory: int = MEMORY
    seed: int = 0
    weigh: WeightsOf | None = None
    weights: Sequence[Tensor] = ()
    seen: int | None = None
    group: Group = ALONE
    turns: Sequence[int] = ()
    pages: Pages | None = None

    def samples(self) -> int:
        """The number of samples that are calibrated on, in all processes; a batch that cannot be counted is one."""
        own = sum(map(samples_of, self.batches)) if self.seen is None else self.seen
        return sum(self.group.gathered(own))

    def has_batches(self) -> bool:
        """Whether any process has batches."""
        return any(self.group.gathered(len(self.batches) > 0))

    def numbered(self) -> tuple[list[int], int]:
        """The number of samples before each batch, and in all, where the processes take turns with their batches."""
        found = self.group.gathered((list(map(samples_of, self.batches)), self.in_turn))
        counts = [own for own, _ in found]
        return starts_in_turn(counts, [own for _, own in found])[self.group.rank], sum(map(sum, counts))

    @property
    def in_turn(self) -> list[int]:
        """The turn of each batch, where processes take turns with them."""
        return list(self.turns) or list(range(len(self.batches)))

    def only(self, indices: Sequence[int]) -> Calibration:
        """The same with some of the batches."""
        if len(indices) == len(self.batches):
            return self
        weights = _Some(self.weights, indices) if len(self.weights) else ()
        turns = [self.in_turn[index] for index in indices]
        return replace(self, batches=_Some(self.batches, indices), weights=weights, turns=turns)

    def given(self, index: int, batch: Any) -> Tensor | None:
        """The user's weights of the batch of an index.

        Raises:
            CalibrationError: they are not weights of this batch.
        """
        if len(self.weights):
            return self.weights[index]
        return None if self.weigh is None else checked_weights(self.weigh(batch), batch, index)


def checked_weights(weights: Any, batch: Any, index: int) -> Tensor:
    """The user's weights of a batch.

    Raises:
        CalibrationError: they are not a tensor [N, ...] of finite numbers of at least 0, some above 0 for each sample.
    """
    start = f"weights(batch) must return a tensor [N] or [N, L] of weights of at least 0; for batch {index}, which is "
    start += f"{describe(batch)}, it returned "
    if not isinstance(weights, Tensor) or weights.is_complex() or not weights.dim() or not weights.numel():
        raise CalibrationError(f"{start}{describe(weights)}")
    samples = sample_count(batch)
    if samples and len(weights) != samples:
        raise CalibrationError(f"{start}{describe(weights)}, but the batch has {samples} samples")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise CalibrationError(f"{start}weights that are negative, NaN or infinite")
    empty = (weights.reshape(len(weights), -1) > 0).any(1).logical_not() if weights.dim() > 1 else ~(weights > 0).any(0)
    if bool(empty.any()):
        where = f"for sample {int(empty.nonzero()[0])}" if weights.dim() > 1 else "at all"
        raise CalibrationError(f"{start}no weight above 0 {where}: leave out what is padding alone")
    return weights.detach()


class _Some(Sequence[Any]):
    """Some items of a sequence, loaded when they are read."""

    def __init__(self, items: Sequence[Any], indices: Sequence[int]) -> None:
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._items[self._indices[index]]


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def several(batches: Any) -> Iterable[Any]:
    """Batches as an iterable: a single tensor or mapping is one batch.

    Raises:
        CalibrationError: `batches` is neither a batch nor an iterable of batches.
    """
    if isinstance(batches, Tensor | Mapping):
        return [batches]
    if isinstance(batches, str | bytes) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"calibration batches must be a tensor, a mapping or an iterable of batches, not {type(batches).__name__}"
        )
    return batches


def iterate(batches: Any) -> Iterator[Any]:
    """Batches one by one, as in `several`.

    Batches without samples are left out, and tensors made in inference mode are copied.

    Raises:
        CalibrationError: `batches` is neither a batch nor an iterable of batches.
    """
    return (ordinary(batch) for batch in several(batches) if not is_empty(batch))


@dataclass(frozen=True)
class Stream:
    """Batches that are read once.

    Attributes:
        count: about how many there are; 0 if that is not known.
        keep: the number of samples that are kept for later.
        kept: the first so many samples that have been read, in batches.
        sizes: the number of samples of each batch that has been read.
    """

    batches: Iterable[Any]
    count: int
    keep: int = 0
    kept: list[Any] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:
        left = self.keep
        for batch in self.batches:
            samples = samples_of(batch)
            self.sizes.append(samples)
            if left > 0:
                self.kept.append(batch if samples <= left else some_samples(batch, 0, left))
                left -= samples
            yield batch

    def __length_hint__(self) -> int:
        return self.count


def batch_count(batches: Any) -> int:
    """The number of batches in what a user passes; 0 if it is not known."""
    return 1 if isinstance(batches, Tensor | Mapping) else operator.length_hint(batches)


def is_empty(batch: Any) -> bool:
    """Whether a batch has no samples."""
    counts = [leaf.shape[0] for leaf in _tensors(batch) if leaf.dim() > 0]
    return counts[:1] == [0] and set(counts) <= {0, 1}


def ordinary(values: Any) -> Any:
    """Nested values with an ordinary tensor for each that was made in inference mode and cannot require gradients."""
    if not any(leaf.is_inference() for leaf in _tensors(values)):
        return values
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.clone() if leaf.is_inference() else leaf, values)


def _tensors(batch: Any) -> list[Tensor]:
    batch = dict(batch) if isinstance(batch, Mapping) else batch  # of mappings, pytree only traverses dict
    return [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def forward_for(model: nn.Module, **fixed: Any) -> Forward:
    """Return the default `forward`, which passes a batch according to the signature of `model.forward`.

    Tensors are moved to the model's device if all its parameters are on one device.

    Args:
        fixed: further arguments of every call.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    devices = {parameter.device for parameter in model.parameters()}
    device = devices.pop() if len(devices) == 1 else None

    def forward(module: nn.Module, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            batch = dict(batch)  # of mappings, pytree only traverses dict
        if device is not None:
            batch = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
        if isinstance(batch, dict):
            return module(**{**_without_labels(batch, parameters), **fixed})
        if isinstance(batch, tuple | list):
            return module(*_without_trailing_labels(batch, parameters), **fixed)
        return module(batch, **fixed)

    return forward


def cache_arguments(model: nn.Module) -> dict[str, bool]:
    """The arguments with which a language model of transformers returns no cache, which no graph can return."""
    config: Any = getattr(model, "config", None)
    configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    caches = any(getattr(each, "use_cache", False) for each in configs)
    parameters = inspect.signature(model.forward).parameters
    taken = "use_cache" in parameters or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return {"use_cache": False} if caches and taken else {}


def _without_labels(batch: Mapping[str, Any], parameters: list[inspect.Parameter]) -> dict[str, Any]:
    names = {parameter.name for parameter in parameters}
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    dropped = set() if open_ended else {"label", "labels"} - names
    return {key: value for key, value in batch.items() if key not in dropped}


def _without_trailing_labels(batch: tuple[Any, ...] | list[Any], parameters: list[inspect.Parameter]) -> list[Any]:
    positional = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
    required = sum(parameter.default is inspect.Parameter.empty for parameter in positional)
    open_ended = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    arguments = list(batch) if open_ended else list(batch)[: len(positional)]
    while len(arguments) > max(required, 1) and _looks_like_labels(arguments[-1]):
        arguments.pop()
    return arguments


def _looks_like_labels(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and value.dtype in _INTEGERS


def holds_tensor(value: Any) -> bool:
    """Whether a value, nested or not, contains a tensor."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def samples_of(batch: Any) -> int:
    """The number of samples of a batch; one that cannot be counted is one sample."""
    return max(sample_count(batch), 1)


def sample_count(batch: Any) -> int:
    """The number of samples: the leading dimension that all tensors share; 0 if they differ.

    Tensors without dimensions or with one row, such as positions [1, L], hold for every sample.
    """
    leaves = [leaf for leaf in _tensors(batch) if leaf.dim() > 0]
    rows = {leaf.shape[0] for leaf in leaves if leaf.dim() > 1} or {leaf.shape[0] for leaf in leaves}
    counts = rows - {1} or rows
    alike = len(counts) == 1 and all(leaf.shape[0] in (1, *counts) for leaf in leaves)
    return counts.pop() if alike else 0


def some_samples(batch: Any, start: int, stop: int, step: int = 1) -> Any:
    """A batch of the samples start, start + step and so on, below `stop`."""
    count = sample_count(batch)
    batch = dict(batch) if isinstance(batch, Mapping) else batch  # of mappings, pytree only traverses dict

    def cut(tensor: Tensor) -> Tensor:
        return tensor[start:stop:step] if tensor.dim() > 0 and tensor.shape[0] == count else tensor

    return pytree.tree_map_only(Tensor, cut, batch)


def run_batch(module: nn.Module, batch: Any, forward: Forward, index: int, gradients: bool = False) -> Any:
    """Run one batch, without gradients by default.

    Raises:
        CalibrationError: the model cannot run it; the model's own error is the cause.
    """
    hook = module.register_forward_pre_hook(_with_ordinary_inputs, with_kwargs=True)
    try:
        with torch.set_grad_enabled(gradients), telling(describe(batch), index):
            return forward(module, batch)
    finally:
        hook.remove()


@contextmanager
def telling(words: str, index: int) -> Iterator[None]:
    """Turn errors of the model in the context into a CalibrationError.

    Args:
        words: the batch that is run, as `describe` describes it.
        index: its index.
    """
    try:
        yield
    except BalfError:
        raise
    except MODEL_ERRORS as error:
        raise CalibrationError(
            f"the model cannot run calibration batch {index}, which is {words}: {error}. A batch must be a "
            "tensor, a tuple of positional arguments or a mapping of keyword arguments. To call the model in another "
            "way, pass forward=lambda model, batch: ..."
        ) from error


def _with_ordinary_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return ordinary((args, kwargs))


def graphs_of(program: nn.Module) -> list[fx.GraphModule]:
    """The graph itself, or the graphs of a program."""
    if isinstance(program, fx.GraphModule):
        return [program]
    return [part for part in program.children() if isinstance(part, fx.GraphModule)]
