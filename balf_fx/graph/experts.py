"""Reads products with one matrix for each expert, y = W_e x, and computes them with two thin factors.

The weight is a parameter [E, O, D] or [E, D, O]. Either every expert runs on rows of its own or on all rows (`bmm`,
`baddbmm`, `matmul`, `einsum`), or one expert is selected for each row (`weight[ids]`), or rows are sorted by expert and
the end of each expert's rows is given (`grouped_mm`).

Dimensions are named by letters as in `graph.expert_rows`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.nn import functional as F

from balf_fx.graph.annotation import annotation
from balf_fx.graph.expert_rows import ExpertRows, expert_ids
from balf_fx.graph.operators import operation

_ROWS = "rst"
_SAME = ("contiguous", "clone", "detach", "to", "float", "type_as")
_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
_MOVES = ("transpose", "permute", "unsqueeze")
_LINKS = (*_SAME, *_MOVES, "getitem", "index", "index_select")
_PRODUCTS = ("bmm", "baddbmm", "matmul", "einsum", *_GROUPED)


Create = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Any]
"""Inserts a call into a graph, from op, target, args and kwargs; or computes its value."""


@dataclass(frozen=True)
class ExpertProduct:
    """A product with the matrices of experts.

    Attributes:
        node: the product.
        source: the node that reads the parameter.
        links: the nodes from there to the product, which transpose or select matrices.
        weight, input: the two operands of the product.
        assignment: the ids or ends, see `ExpertRows`; None if there are none.
        inputs_first: whether the parameter is [E, D, O].
    """

    node: fx.Node
    source: fx.Node
    links: tuple[fx.Node, ...]
    weight: fx.Node
    input: fx.Node
    assignment: fx.Node | None
    rows: ExpertRows
    inputs_first: bool

    @property
    def loads(self) -> tuple[int, ...]:
        """The number of rows of each expert on the example batch; empty if rows are not assigned to experts."""
        return next((found for each in (self.node, *self.links) if (found := annotation(each).loads)), ())

    def factored(self, create: Create, x: Any, factors: Sequence[Any]) -> Any:
        """The output with two factors in place of the weight, stored as the weight is.

        Args:
            x: the input.
            factors: with r in place of O, then with r in place of D.
        """
        first, second = (self._linked(create, {self.source: factor}) for factor in factors)
        if operation(self.node) == "baddbmm":
            given = {self.input: x, self.weight: first}
            thin = create("call_function", torch.bmm, tuple(map(given.get, _operands("baddbmm", self.node))), {})
        else:
            thin = _again(create, self.node, {self.input: x, self.weight: first})
        if operation(self.node) != "einsum":
            return _again(create, self.node, {self.input: thin, self.weight: second})
        given = {self.input: thin, self.weight: second}
        operands = map_arg(self.node.args[1:], lambda source: given.get(source, source))
        return create("call_function", self.node.target, (_second_equation(self), *operands), {})

    def added(self, create: Create, x: Any, y: Any, weight: Any, slots: Any) -> Any:
        """The output y with the products of some experts added; only their rows are computed.

        Args:
            weight: the matrices of these experts, stored as the weight is.
            slots: [E], the index of each expert in them, or -1.
        """

        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            return create("call_function", function, args, kwargs)

        if self.rows.by == "ids":
            own = call(operator.getitem, slots, self.assignment)
            chosen = call(torch.flatten, call(torch.nonzero, call(torch.ge, own, 0)))
            assignment = call(torch.index_select, own, 0, chosen)
        else:
            sizes = call(torch.diff, call(F.pad, self.assignment, (1, 0)))
            known = call(torch.ge, slots, 0)
            chosen = call(torch.flatten, call(torch.nonzero, call(torch.repeat_interleave, known, sizes)))
            assignment = call(torch.cumsum, call(torch.masked_select, sizes, known), 0, dtype=torch.int32)
        given = {} if self.assignment is None else {self.assignment: assignment}
        selected = call(torch.index_select, x, self.rows.read.index("r"), chosen)
        linked = self._linked(create, {**given, self.source: weight})
        product = _again(create, self.node, {**given, self.input: selected, self.weight: linked})
        return call(torch.index_add, y, self.rows.written.index("r"), chosen, product)

    def _linked(self, create: Create, given: Mapping[fx.Node, Any]) -> Any:
        """What the links make of a weight."""
        values = dict(given)
        for link in self.links:
            values[link] = _again(create, link, values)
        return values[self.weight]


def _again(create: Create, node: fx.Node, given: Mapping[fx.Node, Any]) -> Any:
    """The node's call with other values in place of some nodes."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: given.get(source, source))
    return create(node.op, node.target, args, kwargs)


def _second_equation(product: ExpertProduct) -> str:
    """The equation of the second factor, which reads the output of the first."""
    left, _, result = str(product.node.args[0]).replace(" ", "").partition("->")
    terms = left.split(",")
    place = _operands("einsum", product.node).index(product.weight)
    outputs, inputs = (product.rows.written.index("o"), product.rows.read.index("d"))
    terms[1 - place] = result.replace(result[outputs], terms[1 - place][inputs])
    return f"{','.join(terms)}->{result}"


_Weight = tuple[fx.Node, tuple[fx.Node, ...], str, fx.Node | None]
"""The node that reads a parameter, the links from it, the letters of the result, with "a" and "b" for the dimensions of
the matrices, and the ids."""


def _weight_letters(operand: Any) -> _Weight | None:
    """An operand as the matrices of experts, or None."""
    if not isinstance(operand, fx.Node):
        return None
    if operand.op == "get_attr":
        shape = annotation(operand).shape
        return (operand, (), "eab", None) if shape is not None and len(shape) == 3 else None
    if operand.op not in ("call_function", "call_method") or not operand.args or not _may_link(operand):
        return None
    before = _weight_letters(operand.args[0])
    if before is None:
        return None
    source, links, letters, ids = before
    selected = _selection(operand)
    if selected is not None:
        shape = annotation(selected).shape
        if ids is not None or letters[0] != "e" or shape is None or not 0 < len(shape) <= len(_ROWS):
            return None
        return source, (*links, operand), _ROWS[: len(shape)] + letters[1:], selected
    moved = _moved(operand, letters)
    only = all(node is operand.args[0] for node in operand.all_input_nodes)
    return None if moved is None or not only else (source, (*links, operand), moved, ids)


def _may_link(node: fx.Node) -> bool:
    """Whether a node transposes or selects; what other nodes read is not followed."""
    return node.target is getattr or operation(node) in _LINKS


def _selection(node: fx.Node) -> fx.Node | None:
    """The ids by which a node selects along the first dimension, or None."""
    name, rest = operation(node), node.args[1:]
    if name == "index_select":
        return rest[1] if len(rest) == 2 and rest[0] == 0 and isinstance(rest[1], fx.Node) else None
    if name not in ("getitem", "index") or len(rest) != 1:
        return None
    index = rest[0][0] if isinstance(rest[0], tuple | list) and len(rest[0]) == 1 else rest[0]
    return index if isinstance(index, fx.Node) and annotation(index).shape is not None else None


def _moved(node: fx.Node, letters: str) -> str | None:
    """The letters after a node that moves dimensions; None if it does anything else."""
    name, order = operation(node), list(letters)
    rest: Sequence[Any] = node.args[1:]
    if name in _SAME:
        return letters
    if node.target is getattr:
        order[-2:] = order[:-3:-1]
        return "".join(order) if rest == ("mT",) else None
    numbers = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    if not all(isinstance(number, int) for number in numbers) or node.kwargs:
        return None
    if name == "transpose" and len(numbers) == 2:
        one, other = numbers
        order[one], order[other] = order[other], order[one]
        return "".join(order)
    if name == "permute" and len(numbers) == len(order):
        return "".join(order[number] for number in numbers)
    if name == "unsqueeze" and len(numbers) == 1:
        order.insert(numbers[0] % (len(order) + 1), ".")
        return "".join(order)
    return None


def read_experts(node: fx.Node) -> ExpertProduct | None:
    """The node as a product with the matrices of experts; None if it is none, or shapes were not recorded."""
    name = operation(node)
    if name not in _PRODUCTS:
        return None
    operands = _operands(name, node)
    found = [weight for weight in map(_weight_letters, operands) if weight is not None]
    if len(operands) != 2 or len(found) != 1:
        return None
    place = next(index for index, operand in enumerate(operands) if _weight_letters(operand) is not None)
    value, (source, links, letters, ids) = operands[1 - place], found[0]
    shape = annotation(value).shape if isinstance(value, fx.Node) else None
    if shape is None or not isinstance(value, fx.Node):
        return None
    ends = None
    if name in _GROUPED:
        ends = node.kwargs.get("offs", node.args[2] if len(node.args) > 2 else None)
        fits = len(letters) == 3 and letters[0] == "e" and len(shape) == 2 and place == 1
        dimensions = ("rd", letters[1:], "ro") if fits and isinstance(ends, fx.Node) and _plain(node) else None
    elif name == "einsum":
        dimensions = _einsum(str(node.args[0]), place, letters)
    else:
        dimensions = _matmul(shape, (source, ids), letters, place == 0)
    if dimensions is None:
        return None
    read, matrix, written = dimensions
    experts, *sizes = annotation(source).shape or (0,)
    if name == "baddbmm" and sizes["ab".index(matrix[0])] > sizes["ab".index(matrix[1])]:
        return None  # statistics of its few outputs would include what it adds
    assigned = "".join(letter for letter in letters if letter in _ROWS) or ("r" if ends is not None else "e")
    by: Literal["ids", "ends"] | None = "ids" if ids is not None else "ends" if ends is not None else None
    rows = ExpertRows(experts, by, assigned, read, written)
    weight: fx.Node = operands[place]
    assignment: Any = ids if ids is not None else ends
    return ExpertProduct(node, source, links, weight, value, assignment, rows, inputs_first=matrix[0] == "a")


@dataclass(frozen=True)
class Assigned:
    """The node that assigns rows to experts, as ids or as ends."""

    node: fx.Node
    experts: int
    by_ids: bool

    def loads(self, assignment: Tensor, rows: int) -> tuple[int, ...]:
        """The number of rows that each expert gets."""
        counts = torch.bincount(expert_ids(assignment, rows, self.experts, self.by_ids), minlength=self.experts)
        return tuple(counts[: self.experts].tolist())


def read_assignment(node: fx.Node) -> Assigned | None:
    """What a node reads to assign rows to experts: one that selects matrices, or a grouped product; else None."""
    selected = _selection(node)
    if selected is not None and isinstance(node.args[0], fx.Node):
        before = _weight_letters(node.args[0])
        shape = () if before is None else annotation(before[0]).shape or ()
        return Assigned(selected, shape[0], by_ids=True) if shape else None
    product = read_experts(node)
    if product is None or product.rows.by != "ends" or product.assignment is None:
        return None
    return Assigned(product.assignment, product.rows.experts, by_ids=False)


def _plain(node: fx.Node) -> bool:
    """Whether a grouped product has neither a bias nor another dtype than its operands."""
    rest = (*node.args[3:], *(value for name, value in node.kwargs.items() if name != "offs"))
    return all(argument is None for argument in rest)


def _operands(name: str, node: fx.Node) -> list[Any]:
    """The two operands of a product."""
    if name == "einsum":
        rest = node.args[1:]
        return list(rest[0]) if len(rest) == 1 and isinstance(rest[0], tuple | list) else list(rest)
    return list(node.args[1:3] if name == "baddbmm" else node.args[:2])


_Dimensions = tuple[str, str, str]
"""The letters of the input, which of the weight's "a" and "b" is contracted and which kept, and those of the output."""


def _matmul(
    shape: Sequence[int], weight: tuple[fx.Node, fx.Node | None], letters: str, weight_first: bool
) -> _Dimensions | None:
    """A product of [..., n, D] and [..., D, O], or of [..., O, D] and [..., D, n] if the weight is first."""
    if len(shape) < 2 or {"a", "b"} != set(letters[-2:]):
        return None
    sizes = _sizes(*weight)
    read, written = "", ""
    free = iter("ABCFGH")
    batch = max(len(shape), len(letters)) - 2
    for position in range(-batch - 2, -2):
        letter = letters[position] if -position <= len(letters) else ""
        size = shape[position] if -position <= len(shape) else None
        if letter in ("", "."):
            letter = next(free, "") if size is not None else letter
            read, written = read + (letter if size is not None else ""), written + letter
            continue
        if size is not None:
            read += letter if size == sizes[letter] else "."
            if size not in (1, sizes[letter]):
                return None
        written += letter
    if weight_first:
        return read + "dN", letters[:-3:-1], written + "oN"
    return read + "Nd", letters[-2:], written + "No"


def _sizes(source: fx.Node, ids: fx.Node | None) -> dict[str, int]:
    """The sizes of the dimensions of experts and rows."""
    found = {"e": (annotation(source).shape or (0,))[0]}
    rows = () if ids is None else annotation(ids).shape or ()
    return {**found, **dict(zip(_ROWS, rows, strict=False))}


def _einsum(equation: str, place: int, letters: str) -> _Dimensions | None:
    """An equation whose output has the experts or rows of the weight and one dimension of its matrices."""
    sides = equation.replace(" ", "").split("->")
    terms = sides[0].split(",")
    if len(sides) != 2 or len(terms) != 2 or "." in equation or len(terms[place]) != len(letters):
        return None
    own, other, result = terms[place], terms[1 - place], sides[1]
    if any(len(set(term)) != len(term) for term in (own, other, result)):
        return None
    names = dict(zip(own, letters, strict=True))
    matrix = [letter for letter in own if names[letter] in ("a", "b")]
    contracted = [letter for letter in matrix if letter in other and letter not in result]
    kept = [letter for letter in matrix if letter in result and letter not in other]
    if len(contracted) != 1 or len(kept) != 1 or "." in letters:
        return None
    if not (set(own) - set(contracted) <= set(result) and set(other) - set(contracted) <= set(result)):
        return None
    free = iter("ABCFGHIJKLMN")
    new = {**names, **{letter: next(free) for letter in sorted(set(other + result) - set(own))}}
    new |= {contracted[0]: "d", kept[0]: "o"}
    which = names[contracted[0]] + names[kept[0]]
    return "".join(new[letter] for letter in other), which, "".join(new[letter] for letter in result)


def product_weights(node: fx.Node) -> list[fx.Node]:
    """The operands of a product that may hold the matrices of experts, before they are transposed or selected."""
    name, found = operation(node), []
    for operand in _operands(name, node) if name in _PRODUCTS else ():
        while isinstance(operand, fx.Node) and operation(operand) in _LINKS and operand.args:
            operand = operand.args[0]
        found += [operand] if isinstance(operand, fx.Node) else []
    return found


def leads_to_experts(node: fx.Node) -> bool:
    """Whether a node only transposes or selects the matrices of experts for products with them."""
    used = bool(node.users) and _weight_letters(node) is not None
    return used and all(_is_product_with(user, node) for user in node.users)


def _is_product_with(user: fx.Node, weight: fx.Node) -> bool:
    product = read_experts(user)
    return leads_to_experts(user) if product is None else product.weight is weight
