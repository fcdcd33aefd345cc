"""Features of values that are concatenated: layers that hold only some of the features of a width."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def embedded(matrix: Tensor, held: Sequence[int] | None, features: int, outside: float) -> Tensor:
    """A matrix [F, F] over the features that are held, as one over all features: diagonal elsewhere, with `outside`.

    Args:
        held: F of the features; None for all.
        features: the number of all features.
    """
    if held is None:
        return matrix
    places = torch.tensor(held, device=matrix.device)
    whole = outside * torch.eye(features, dtype=matrix.dtype, device=matrix.device)
    whole[places[:, None], places] = matrix
    return whole


def restricted(order: Tensor, sizes: Sequence[int], held: Sequence[int] | None) -> tuple[Tensor, list[int]]:
    """An order of all features, as one of those that are held, and how many of these are kept at some sizes.

    Args:
        order: [features], the features in the order in which they are kept.
        sizes: numbers of features.
        held: the features that are held, in any order; None for all.
    """
    if held is None:
        return order, list(sizes)
    place = {feature: index for index, feature in enumerate(held)}
    kept = [place.get(feature) for feature in order.tolist()]
    counts = [0, *itertools.accumulate(index is not None for index in kept)]
    return torch.tensor([index for index in kept if index is not None], device="cpu"), [counts[size] for size in sizes]


def grouped(order: Tensor, sets: Sequence[Sequence[int]], step: int) -> Tensor:
    """An order in which each set's features are kept in groups of `step`, beginning with the first group of every set.

    So no layer loses all of its features, and at multiples of `step` each layer keeps a multiple of it. Groups have the
    order of their mean places in the old order; what is left of a set comes last.

    Args:
        order: [features], the features in the order in which they are kept.
        sets: the features of each layer, which together are all features.
    """
    place = {feature: index for index, feature in enumerate(order.tolist())}
    found = []
    for features in sets:
        own = sorted(features, key=place.__getitem__)
        for start in range(0, len(own), step):
            group = own[start : start + step]
            turn = 0 if start == 0 else 1 if len(group) == step else 2
            found.append((turn, sum(map(place.__getitem__, group)) / len(group), group))
    return torch.tensor([feature for *_, group in sorted(found) for feature in group], device="cpu")


def same_from(first: Tensor, second: Tensor) -> int:
    """The least size from which on two orders keep the same features."""
    places = torch.argsort(first)[second]
    apart = torch.nonzero(places.cummax(0).values != torch.arange(len(places), device="cpu")).flatten()
    return 0 if len(apart) == 0 else int(apart[-1]) + 2
