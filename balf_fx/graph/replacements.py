"""Modules that take the place of one layer in the user's model: the layers of `graph.substitute`, with their calls.

A recipe describes such a module as plain data, so that files and configurations can name it without code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from balf_fx.errors import PlanError
from balf_fx.graph.annotation import Layout, Replaced
from balf_fx.graph.curves import PartRanks
from balf_fx.graph.pivoted import ORDER, ROWS

_CLASSES = {
    each.__name__: each
    for each in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
}
_LINEAR = ("in_features", "out_features")
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_TRANSPOSED = ("output_padding",)

Written = Literal[
    "layer", "identity", "children", "cache", "parameter", "dense", "pair", "parts", "rows", "columns", "blocks"
]
"""How a map is written: as one stock layer in the old one's place, not at all, or by a `Replacement`. For a "cache",
attention stays, and what it is given to store its keys and values in becomes narrower (`graph.caches`). A "parameter"
has one entry for each of some features, and becomes narrower with them; its module stays."""

Described = Mapping[str, Any]
"""A stock layer as its class and arguments."""


@dataclass(frozen=True)
class Recipe:
    """How a module of the user's model is replaced.

    Attributes:
        form: how the map is written.
        layers: the stock layers; an item that is a tuple holds those of the parts of a fused layer.
        ranks: the rank of each part, None for a dense one; empty where there are no parts. For a cache, the features of
            keys and of values, None for all.
        heads: for blocks, the number of heads and r for each set.
        axis: the axis of the features, counted from the end.
        values, outputs: the number of features that the layers return, and that the model expects; the others are zero.
            For a parameter, `outputs` is its length along `axis`.
        reads: the number of features that are read, where these are selected; None where all are, in their order.
        places: whether the outputs are brought into the original's places.
        answers: attributes of the original module, which the replacement has too, for code that reads them.
        children: the children of a norm that run without it.
    """

    form: Written
    layers: tuple[Described | tuple[Described, ...], ...] = ()
    ranks: PartRanks = ()
    heads: tuple[tuple[int, int], ...] = ()
    axis: int = -1
    values: int = 0
    outputs: int = 0
    reads: int | None = None
    places: bool = False
    answers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    children: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `dataclasses.asdict`, also after JSON."""
        layers = tuple(tuple(each) if isinstance(each, list | tuple) else each for each in data["layers"])
        heads = tuple((int(count), int(size)) for count, size in data["heads"])
        return cls(
            **{
                **data,
                "layers": layers,
                "ranks": tuple(data["ranks"]),
                "heads": heads,
                "children": tuple(data["children"]),
            }
        )


class Replacement(nn.Sequential):
    """Stock layers that compute the map of one layer, or a map of low rank in its place.

    It has the layer's sizes as attributes, for code that reads them. `weight` and `bias` are those of the factor that
    computes the outputs, of the right dtype and device.
    """

    reads: Tensor | None
    places: Tensor | None

    def __init__(
        self, recipe: Recipe, layers: Iterable[nn.Module], reads: Tensor | None = None, places: Tensor | None = None
    ) -> None:
        super().__init__(*layers)
        self.recipe = recipe
        self.register_buffer("reads", reads)
        self.register_buffer("places", places)

    def forward(self, input: Tensor) -> Tensor:
        recipe = self.recipe
        value = input if self.reads is None else input.index_select(recipe.axis, self.reads)
        if recipe.form == "rows":
            output = self._rows(value)
        elif recipe.form == "columns":
            output = self._columns(value)
        elif recipe.form == "blocks":
            output = self._blocks(value)
        elif recipe.form == "parts":
            output = self._parts(value)
        else:
            output = value
            for layer in self:
                output = layer(output)
        if self.places is None:
            return output
        if recipe.values < recipe.outputs:  # the last place holds the zero of all that is left out
            output = F.pad(output, (*(0, 0) * (-1 - recipe.axis), 0, 1))
        return output.index_select(recipe.axis, self.places)

    def _rows(self, value: Tensor) -> Tensor:
        pivots = self[0](value)
        if not self.recipe.ranks:
            return torch.cat([pivots, self[1](pivots)], self.recipe.axis)
        return torch.cat(self._by_part(value, pivots, with_pivots=True), self.recipe.axis)

    def _parts(self, value: Tensor) -> Tensor:
        return torch.cat(self._by_part(value, self[0](value), with_pivots=False), -1)

    def _by_part(self, value: Tensor, thin: Tensor, with_pivots: bool) -> list[Tensor]:
        ranks = self.recipe.ranks
        pieces = iter(torch.split_with_sizes(thin, [rank for rank in ranks if rank is not None], self.recipe.axis))
        layers: Any = self[1]
        found: list[Tensor] = []
        for layer, rank in zip(layers, ranks, strict=True):
            own = value if rank is None else next(pieces)
            found += [own] if with_pivots and rank is not None else []
            found.append(layer(own))
        return found

    def _columns(self, value: Tensor) -> Tensor:
        (others, rank), axis = features(self[0]), self.recipe.axis
        pivots, rest = torch.split_with_sizes(value if axis == -1 else value.movedim(axis, -1), [rank, others], -1)
        output: Tensor = self[1](torch.sub(self[0](rest), pivots, alpha=-1))
        return output if axis == -1 else output.movedim(-1, axis).contiguous()  # the model may view it

    def _blocks(self, value: Tensor) -> Tensor:
        heads = self.recipe.heads
        others = len(self) - len(heads)
        found = [self[index](value) for index in range(others)]
        for index, (count, size) in enumerate(heads, start=others):
            pivots, rest = torch.split_with_sizes(value, [size, features(self[index])[0]], -1)
            found.append(torch.sub(self[index](rest), pivots.tile((count,)) if count > 1 else pivots, alpha=-1))
        return torch.cat(found, -1)

    @property
    def weight(self) -> Tensor:
        """The weight of the layer that makes the outputs: its dtype and device are the layer's, its shape is not."""
        weight: Tensor = self._last.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer that makes the outputs."""
        bias: Tensor | None = self._last.bias
        return bias

    @property
    def _last(self) -> Any:
        last = list(self.children())[-1]
        return last[-1] if isinstance(last, nn.ModuleList) else last

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            recipe = self.__dict__.get("recipe")
            if recipe is not None and name in recipe.answers:
                return recipe.answers[name]
            raise

    def extra_repr(self) -> str:  # peft shows it when it refuses the container
        return f"{self.recipe.form}; peft: balf_fx.huggingface.adapters.target_modules names these layers"


def replacement(holder: nn.Module, replaced: Replaced, layout: Layout, original: nn.Module) -> tuple[Recipe, nn.Module]:
    """The module that takes a layer's place, from the layer's substitute in a graph.

    Args:
        holder: the module at the layer's path in the graph, whose layers are used, not copied.
        replaced: the graph's record of it.
        original: the module in the user's model.
    """
    device = next(holder.parameters()).device
    order, rows = (getattr(holder, name, None) for name in (ORDER, ROWS))
    layers = list(holder.children())
    form: Written
    if replaced.rank is None and replaced.form != "blocks":
        form, layers = "dense", [holder]
    elif replaced.form == "pair":
        form = "parts" if isinstance(replaced.rank, tuple) else "pair"
    else:
        form = "pair" if replaced.form == "separable" or replaced.form == "pointwise_first" else replaced.form
    read = torch.arange(layout.inputs, device="cpu") if layout.reads is None else layout.reads.cpu()
    if form in ("columns", "blocks") and order is not None:
        read = read[order.cpu()]
        if form == "blocks" and _rest_first(layers, len(read)):
            layers[0] = _with_columns(layers[0], order)
    made = _outputs(order if form == "rows" else rows, layers, form)
    places = torch.full((layout.outputs,), len(made), device="cpu")
    places[torch.arange(layout.outputs, device="cpu") if layout.writes is None else layout.writes.cpu()] = made
    reads = None if torch.equal(read, torch.arange(layout.inputs, device="cpu")) else read.to(device)
    gathers = len(made) != layout.outputs or not torch.equal(places, torch.arange(layout.outputs, device="cpu"))
    if form == "dense" and reads is None and not gathers:
        return Recipe("layer", (describe(holder),)), holder
    recipe = Recipe(
        form=form,
        layers=tuple(map(_described, layers)),
        ranks=replaced.rank if isinstance(replaced.rank, tuple) else (),
        heads=_heads(layers, len(read)) if form == "blocks" else (),
        axis=layout.axis,
        values=len(made),
        outputs=layout.outputs,
        reads=None if reads is None else len(reads),
        places=gathers,
        answers=answers_of(original),
    )
    return recipe, Replacement(recipe, layers, reads, places.to(device) if gathers else None)


def parameter_recipe(old: Tensor, new: Tensor) -> Recipe:
    """The recipe of a parameter that became narrower along at most one axis."""
    axes = [axis for axis in range(-old.dim(), 0) if old.shape[axis] != new.shape[axis]]
    axis = axes[0] if axes else -1
    return Recipe("parameter", axis=axis, outputs=new.shape[axis])


def blank_parameter(recipe: Recipe, old: Tensor) -> nn.Parameter:
    """The parameter of a recipe with arbitrary values.

    Raises:
        PlanError: the model's own parameter has fewer features.
    """
    if recipe.axis < -old.dim() or recipe.outputs > old.shape[recipe.axis]:
        raise PlanError(f"the model has another architecture: a parameter has the shape {tuple(old.shape)}")
    return nn.Parameter(old.detach().narrow(recipe.axis, 0, recipe.outputs).clone(), old.requires_grad)


def skeleton(recipe: Recipe, old: nn.Module) -> nn.Module:
    """The module of a recipe with parameters of the right shapes and arbitrary values.

    Args:
        old: the module whose place it takes; its parameters have their dtype, device and requires_grad.

    Raises:
        PlanError: a layer is of no class that balf_fx writes.
    """
    if recipe.form == "identity":
        return nn.Identity()
    if recipe.form == "children":
        return nn.Sequential(*map(old.get_submodule, recipe.children))
    like = next(old.parameters())
    layers = [
        nn.ModuleList([_build(each, like) for each in layer]) if isinstance(layer, tuple) else _build(layer, like)
        for layer in recipe.layers
    ]
    for layer in layers:
        layer.requires_grad_(like.requires_grad)
    if recipe.form == "layer":
        return layers[0]
    zeros = partial(torch.zeros, dtype=torch.int64, device=like.device)
    reads = None if recipe.reads is None else zeros(recipe.reads)
    return Replacement(recipe, layers, reads, zeros(recipe.outputs) if recipe.places else None)


def describe(layer: nn.Module) -> Described:
    """A stock layer as its class and arguments."""
    kind = type(layer).__name__
    names = _LINEAR if kind == "Linear" else (*_CONV, *(_TRANSPOSED if "Transpose" in kind else ()))
    values = {name: getattr(layer, name) for name in names}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"class": kind, **plain, "bias": getattr(layer, "bias", None) is not None}


def answers_of(layer: nn.Module) -> dict[str, Any]:
    """What code may ask a layer for, as plain data."""
    found = {name: getattr(layer, name) for name in (*_LINEAR, *_CONV, "nf", "nx") if hasattr(layer, name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def features(layer: nn.Module) -> tuple[int, int]:
    """The numbers of inputs and outputs of a stock layer."""
    sizes: Any = layer
    if hasattr(layer, "in_features"):
        return sizes.in_features, sizes.out_features
    return sizes.in_channels, sizes.out_channels


def _described(layer: nn.Module) -> Described | tuple[Described, ...]:
    return tuple(map(describe, layer)) if isinstance(layer, nn.ModuleList) else describe(layer)


def _build(description: Described, like: Tensor) -> nn.Module:
    arguments = dict(description)
    kind = _CLASSES.get(str(arguments.pop("class", None)))
    if kind is None:
        raise PlanError(f"there is no layer of class {description.get('class')!r}: the plan was changed, or is newer")
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    make: Callable[..., nn.Module] = skip_init  # an initialisation would only draw random numbers
    return make(kind, **plain, dtype=like.dtype, device=like.device)


def _outputs(order: Tensor | None, layers: Sequence[nn.Module], form: Written) -> Tensor:
    """The places [O] of the new outputs among the values that the layers return."""
    if order is not None:
        return order.cpu()
    returned = layers if form in ("rows", "blocks") else layers[-1:]
    flat = [each for layer in returned for each in (layer if isinstance(layer, nn.ModuleList) else [layer])]
    return torch.arange(sum(features(layer)[1] for layer in flat), device="cpu")


def _rest_first(layers: Sequence[nn.Module], inputs: int) -> bool:
    """Whether the first layer of blocks computes all other outputs, and so reads all inputs."""
    return features(layers[0])[0] == inputs


def _heads(layers: Sequence[nn.Module], inputs: int) -> tuple[tuple[int, int], ...]:
    """The number of heads and r of each set: the layer of a set reads all inputs but r."""
    sizes = [(inputs - read, made) for read, made in map(features, layers) if read < inputs]
    return tuple((made // size, size) for size, made in sizes)


def _with_columns(layer: nn.Module, order: Tensor) -> nn.Module:
    """A linear layer for its inputs in another order."""
    new = _build(describe(layer), next(layer.parameters()))
    state = {name: value[:, order] if name == "weight" else value for name, value in layer.state_dict().items()}
    new.load_state_dict(state)
    return new.requires_grad_(next(layer.parameters()).requires_grad)
