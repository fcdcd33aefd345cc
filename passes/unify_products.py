"""Write the products of values in one way, whichever way the model writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from balf_fx.graph.annotation import annotation, carried_meta
from balf_fx.graph.operators import argument_names, arguments, operation
from balf_fx.graph.parameters import constant_nodes
from balf_fx.passes.base import Pass

_OPERANDS = 3  # queries, keys and values
_REST = "..."


@dataclass(frozen=True)
class UnifyProducts(Pass):
    """Give attention its operands by position, and replace each `einsum` of two values by `matmul`.

    An einsum is replaced if it sums over one axis, if each operand has one axis more that the other one lacks, and if
    the graph has been profiled, since einsum broadcasts an axis that it sums over and matmul does not. Einsums with
    weights are layers (`graph.layers`), or products with the matrices of experts, and stay.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        modified = False
        constants = constant_nodes(graph_module)
        for node in list(graph_module.graph.nodes):
            if operation(node) == "scaled_dot_product_attention":
                modified |= _by_position(node)
            elif operation(node) == "einsum":
                product = _Product.read(node)
                if product is not None and constants.isdisjoint(node.all_input_nodes):
                    product.replace(node)
                    modified = True
        return PassResult(graph_module, modified)


def _by_position(node: fx.Node) -> bool:
    """Give a call its first operands by position; returns whether they were not."""
    names, given = argument_names(node.target)[:_OPERANDS], arguments(node)
    if len(node.args) >= len(names) or not given.keys() >= set(names):
        return False
    node.args = tuple(given[name] for name in names)
    node.kwargs = {name: value for name, value in given.items() if name not in names}
    return True


@dataclass(frozen=True)
class _Product:
    """An einsum of two values.

    Attributes:
        values: both, the one whose own axis comes first in the result first.
        terms: the letters of their axes; those of an ellipsis, which comes first or not at all, are left out.
        result: the letters of the result.
        summed: the letter over which it sums.
        rest: whether there is an ellipsis.
    """

    values: tuple[fx.Node, fx.Node]
    terms: tuple[str, str]
    result: str
    summed: str
    rest: bool

    @classmethod
    def read(cls, node: fx.Node) -> _Product | None:
        """The product of a node; None if `matmul` does not compute it."""
        equation, *operands = node.args
        given: Any = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
        left, arrow, result = str(equation).replace(" ", "").partition("->")
        terms = [*left.split(","), result]
        rests = {term.startswith(_REST) for term in terms}
        if not arrow or len(terms) != 3 or len(rests) > 1 or not all(isinstance(value, fx.Node) for value in given):
            return None
        first, second, result = (term.removeprefix(_REST) for term in terms)
        if any(len(set(term)) < len(term) or "." in term for term in (first, second, result)):
            return None
        summed = {*first} & {*second} - {*result}
        row, *columns = [letter for letter in result if (letter in first) != (letter in second)] or [""]
        values = tuple(given)
        if row not in first:
            first, second, values = second, first, values[::-1]
        if len(summed) != 1 or len(columns) != 1 or columns[0] in first or {*first, *second} != {*result, *summed}:
            return None
        found = cls(values, (first, second), result, summed.pop(), rests == {True})
        sizes = {_size(value, term, found.summed) for value, term in zip(values, found.terms, strict=True)}
        return found if len(sizes) == 1 and None not in sizes else None

    def replace(self, node: fx.Node) -> None:
        """Put a product of matrices in a node's place."""
        first, second = self.terms
        batch = "".join(letter for letter in self.result if letter in first and letter in second)
        row, column = (letter for letter in self.result if letter not in batch)
        graph = node.graph
        with graph.inserting_before(node):
            before = len(graph.nodes)
            left = self._permuted(self.values[0], first, batch + row + self.summed)
            right = self._permuted(self.values[1], second, batch + self.summed + column)
            product = graph.call_function(torch.matmul, (left, right))
            new = self._permuted(product, batch + row + column, self.result)
        made = len(graph.nodes) - before
        each = node
        for _ in range(made):
            each = each.prev
            each.meta = carried_meta(node, same_value=each is new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)

    def _permuted(self, value: fx.Node, term: str, order: str) -> fx.Node:
        """A value with its axes in another order."""
        if term == order:
            return value
        if not self.rest:
            return value.graph.call_method("permute", (value, tuple(map(term.index, order))))
        places = [(term.index(letter) - len(term), order.index(letter) - len(order)) for letter in order]
        source, target = zip(*(pair for pair in places if pair[0] != pair[1]), strict=True)
        return value.graph.call_method("movedim", (value, source, target))


def _size(value: fx.Node, term: str, letter: str) -> int | None:
    """The size of the axis of a letter; None if it is not known."""
    shape = annotation(value).shape
    return None if shape is None or len(shape) < len(term) else shape[term.index(letter) - len(term)]
