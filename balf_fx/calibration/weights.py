"""How much each position of a call counts: padding does not count at all.

Weights are tensors [N, ...] of numbers of at least 0: [N, L] for the tokens of N sequences, [N] for whole samples. They
come from the user, or from a mask [N, L] among the model's arguments, in which 0 is padding. Masks of other shapes,
such as the additive ones of [N, 1, L, L], are not read.

Values that depend on an input whose name begins with "decoder_" have the mask `decoder_attention_mask`, those that
depend on inputs of "encoder_" alone `encoder_attention_mask`, and the others `attention_mask`. Values that depend on no
input with its positions, as in a vision tower, have none. Parts of a model that read no mask have that of another part
(`engine.weighing`).

Weights apply to every value that has their positions: [N, L, ...], or flattened, [N L, ...]. In a value of N samples
with other positions, such as what a pooling layer or a strided convolution returns, all positions of a sample have the
largest weight of the sample. All positions of other values count, and so do the rows of experts, which routers bring
into another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from balf_fx.errors import CalibrationError
from balf_fx.graph.masks import mask_inputs

WeightsOf = Callable[[Any], Tensor]
"""`weights(batch)` returns the weights [N, ...] of the positions of a batch."""


class Weights:
    """The weights of positions in one call of a model.

    Args:
        candidates: tensors [N, ...], the first of which that fits a value applies to it.

    Attributes:
        asked: whether the weights of a value were asked for so far.
        fits: whether a value had the positions of a candidate so far.
    """

    def __init__(self, *candidates: Tensor) -> None:
        self.candidates = candidates
        self.asked = self.fits = False

    def at(self, leading: Sequence[int]) -> Tensor | None:
        """The weights of a value's positions.

        Args:
            leading: the dimensions of the value's positions, samples first.

        Returns:
            [n] float64, n the product of `leading`; None if each is 1.
        """
        found = next((fit for each in self.candidates if (fit := _fitted(each, leading)) is not None), None)
        self.asked, self.fits = True, self.fits or found is not None
        if found is None and self.candidates:
            found = _of_samples(self.candidates[0], leading)
        return None if found is None or bool((found == 1).all()) else found.to(torch.float64)

    def of(self, output: Tensor, rows: bool = False) -> Tensor | None:
        """The weights of a model's output, on its device: of its elements, or of its rows, along the last dimension."""
        found = self.at(output.shape[:-1] if rows else output.shape)
        return None if found is None else found.to(output.device)


def _fitted(weights: Tensor, leading: Sequence[int]) -> Tensor | None:
    """The weights of positions [*leading], flattened; None if they have other positions than the weights."""
    samples, own, positions = len(weights), tuple(weights.shape[1:]), math.prod(leading)
    if not leading or not weights.numel() or not positions:
        return None
    # 1. [N, *own, ...], or the only dimensions that are the same, as in images of [N, C, *own].
    places = [at for at in range(1, len(leading) - len(own) + 1) if tuple(leading[at : at + len(own)]) == own]
    if leading[0] == samples and places and (places[0] == 1 or len(places) == 1):
        before, after = places[0] - 1, len(leading) - places[0] - len(own)
        return weights.reshape(samples, *[1] * before, *own, *[1] * after).expand(*leading).flatten()
    # 2. Flattened, [N, L, ...] for [N, H, W] or [N L, ...] for [N, L].
    for count in range(1, len(leading) + 1):
        if math.prod(leading[:count]) == weights.numel() and leading[0] in (samples, weights.numel()):
            return weights.flatten().repeat_interleave(positions // weights.numel())
    # 3. Positions first, [L, N, ...].
    if len(own) == 1 and tuple(leading[:2]) == (*own, samples):
        return weights.mT.flatten().repeat_interleave(positions // weights.numel())
    # 4. Windows of samples, [N k, ...].
    if not own and leading[0] % samples == 0:
        return weights.repeat_interleave(positions // samples)
    return None


def _of_samples(weights: Tensor, leading: Sequence[int]) -> Tensor | None:
    """The largest weight of each sample for all positions [*leading] of it, flattened; None for another N."""
    if not leading or leading[0] != len(weights) or not weights.numel():
        return None
    return weights.flatten(1).amax(1).repeat_interleave(math.prod(leading) // len(weights))


def counted(values: Sequence[Tensor], weights: Tensor | None, rows: bool = False) -> tuple[list[Tensor], Tensor | None]:
    """What counts of some values of one shape, and its weights; both as they are if there are no weights.

    Args:
        weights: [n], of the elements or of the rows along the last dimension.
        rows: whether they are those of rows.

    Returns:
        The m elements [m] or rows [m, F] whose weight is not 0, and their weights [m]. What lies elsewhere, NaN
        perhaps, is left out.
    """
    if weights is None:
        return list(values), None
    kept = weights > 0
    return [(value.flatten(0, -2) if rows else value.flatten())[kept] for value in values], weights[kept]


@dataclass(frozen=True)
class CallWeights:
    """The weights of one call of a program.

    Attributes:
        parts: {name of a mask: the weights of values with its positions} for each part.
        outputs: the weights of the model's outputs.
        given: whether the user gave them.
    """

    parts: Sequence[Mapping[str, Weights]]
    outputs: Weights | None = None
    given: bool = False

    @property
    def misfit(self) -> bool:
        """Whether values in the parts asked for weights, but none of them has had their positions so far."""
        known = [weights for named in self.parts for weights in named.values()]
        return any(weights.asked for weights in known) and not any(weights.fits for weights in known)


def read_mask(value: Any) -> Tensor | None:
    """A mask [N, L] as weights of 0 and 1; None for anything else.

    Numbers other than 0 count as 1, as for tokens with global attention, except in masks of floating point. These are
    only read if they hold zeros and ones alone, and a one, since additive masks are of floating point, too.
    """
    if not isinstance(value, Tensor) or value.dim() != 2 or value.is_complex():
        return None
    counted = value != 0
    if value.is_floating_point() and not (bool(counted.any()) and bool((value[counted] == 1).all())):
        return None
    return counted.to(torch.float64)


def read_masks(graph_module: fx.GraphModule, values: Mapping[str, Any]) -> dict[str, Weights]:
    """The masks among the values of a graph's placeholders by name."""
    found = {name: read_mask(values.get(str(node.target))) for name, node in mask_inputs(graph_module).items()}
    return {name: Weights(mask) for name, mask in found.items() if mask is not None}


class PositionWeights(nn.Module):
    """Passes the weights of a call's positions to the observers of a graph.

    A call returns the weights given for it or, without them, those that the mask holds.

    Args:
        name: the name of the mask.
    """

    _is_impure = True  # tells FX that dead-code elimination must keep the call

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._given: Mapping[str, Weights] | None = None

    @contextmanager
    def given(self, weights: Mapping[str, Weights]) -> Iterator[None]:
        """Use these weights by name of a mask, and no mask, for the calls in the context."""
        self._given = weights
        try:
            yield
        finally:
            self._given = None

    def forward(self, mask: Any = None) -> Weights | None:
        if self._given is not None:
            return self._given.get(self.name)
        found = read_mask(mask)
        return None if found is None else Weights(found)


def check_fit(given: Tensor | None, weights: CallWeights, index: int) -> None:
    """Check that the user's weights of a batch are those of some positions, once it has run.

    Raises:
        CalibrationError: they are not.
    """
    if given is not None and weights.misfit:
        raise CalibrationError(
            f"weights(batch) returned {list(given.shape)} for batch {index}, but no layer has these positions: return "
            "[N], one weight for each sample, or [N, L], one for each position"
        )


@contextmanager
def weighing(graph_modules: Sequence[nn.Module], weights: CallWeights) -> Iterator[None]:
    """Give the observers of a program the weights of the calls in the context."""
    with ExitStack() as stack:
        for graph_module, named in zip(graph_modules, weights.parts, strict=True):
            for module in graph_module.modules():
                if isinstance(module, PositionWeights):
                    stack.enter_context(module.given(named))
        yield
