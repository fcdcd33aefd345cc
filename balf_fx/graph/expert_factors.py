"""The parameters that replace the weight of a layer of experts, and the products with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from balf_fx.graph.curves import Kept, PartRanks, Solution
from balf_fx.graph.experts import ExpertProduct, read_experts
from balf_fx.graph.site import Site


@dataclass(frozen=True)
class ExpertFactors:
    """Two thin factors for each expert, and the whole matrices of the experts that keep theirs.

    Attributes:
        module: holds the parameters "0" and "1", as [E, r, D] and [E, O, r] or transposed as the weight is. Where some
            experts keep their matrices, these are "2", the factors of these experts are zero, and the buffer "slots"
            [E] holds the index of each expert in them, or -1.
    """

    module: nn.Module
    ranks: PartRanks

    @property
    def biased(self) -> tuple[bool, ...]:
        """Products with experts have no bias."""
        return (False,)

    def insert_calls(self, graph: fx.Graph, path: str, node: fx.Node) -> fx.Node:
        """Insert the products at the graph's insertion point; returns the node of the layer's output."""
        product = _product(node)
        fetched = {name: graph.get_attr(f"{path}.{name}") for name in self._tensors()}
        output: fx.Node = _compute(product, graph.create_node, product.input, fetched)
        return output

    def run(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Tensor:
        """The layer's output, given the values of other nodes."""

        def create(op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            args, kwargs = map_arg((args, kwargs), value_of)
            return getattr(args[0], target)(*args[1:], **kwargs) if op == "call_method" else target(*args, **kwargs)

        product = _product(node)
        output: Tensor = _compute(product, create, value_of(product.input), self._tensors())
        return output

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}


def _product(node: fx.Node) -> ExpertProduct:
    product = read_experts(node)
    if product is None:
        raise TypeError(f"{node.name} is not a product with experts")
    return product


def _compute(product: ExpertProduct, create: Callable[..., Any], x: Any, tensors: dict[str, Any]) -> Any:
    y = product.factored(create, x, [tensors["0"], tensors["1"]])
    return y if "2" not in tensors else product.added(create, x, y, tensors["2"], tensors["slots"])


def build_experts(original: Tensor, site: Site, solution: Solution) -> ExpertFactors:
    """The parameters of a solution, with the properties of the original one."""
    if solution.left is None:
        raise TypeError(f"{site.name} has no factors")
    tensors = [solution.right, solution.left]
    module = nn.Module()
    if solution.kept is not None:
        tensors.append(solution.kept.weight)
        slots = torch.full((site.groups,), -1, device=original.device)
        slots[list(solution.kept.experts)] = torch.arange(len(solution.kept.experts), device=original.device)
        module.register_buffer("slots", slots)
    for index, value in enumerate(tensors):
        stored = (value.mT if site.inputs_first else value).to(original.dtype)
        stored = stored.clone(memory_format=torch.contiguous_format)
        module.register_parameter(str(index), nn.Parameter(stored, requires_grad=original.requires_grad))
    return ExpertFactors(module, (solution.left.shape[-1],))


def keeping(solution: Solution, weight: Tensor, experts: Sequence[int]) -> Solution:
    """The solution in which some experts keep their matrices.

    Args:
        weight: [E, O, D].
    """
    if not experts or solution.left is None:
        return solution
    left, right, own = solution.left.clone(), solution.right.clone(), list(experts)
    left[own], right[own] = 0, 0
    return Solution(left, right, solution.bias, Kept(tuple(own), weight[own]))
