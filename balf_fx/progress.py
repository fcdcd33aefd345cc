"""One progress bar for a computation of several steps.

A `Progress` is a share of the bar. The code that does the work divides it further: `spans` returns one share for each
step, and `track` advances the bar from item to item. The base class shows nothing, so callers need no condition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import length_hint
from typing import Any, TypeVar

from tqdm import tqdm

_T = TypeVar("_T")
_FORMAT = "{desc:<24} {percentage:3.0f} % |{bar}| {elapsed}"


class Progress:
    """A share of some work. This one is silent."""

    def spans(self, weights: Sequence[float], names: Sequence[str] = ()) -> list[Progress]:
        """One share for each step.

        Args:
            weights: how long each step takes, in any unit.
            names: shown during each step; the bar keeps its name if there are none.
        """
        del names
        return [self] * len(weights)

    def track(self, items: Iterable[_T], weights: Sequence[float] = ()) -> Iterator[_T]:
        """Yield the items one by one; the share is done after the last one.

        Args:
            items: any iterable; the bar advances after each item if their number is known.
            weights: how long each item takes, in any unit; equal if there are none.
        """
        known = list(weights) or [1.0] * length_hint(items)
        spans = iter(self.spans(known))
        for item in items:
            yield item
            next(spans, SILENT).done()
        self.done()

    def done(self) -> None:
        """Mark this share as done."""


SILENT = Progress()
"""Shows nothing."""


@dataclass(frozen=True)
class _Span(Progress):
    """The share of a bar from `start` to `stop`, both in [0, 1]."""

    bar: tqdm[Any]
    start: float
    stop: float
    name: str

    def spans(self, weights: Sequence[float], names: Sequence[str] = ()) -> list[Progress]:
        self._show(self.start)
        total = sum(weights) or 1.0
        places = [self.start + (self.stop - self.start) * (done / total) for done in accumulate(weights, initial=0.0)]
        named = names or [self.name] * len(weights)
        return [_Span(self.bar, *place, name) for place, name in zip(pairwise(places), named, strict=True)]

    def done(self) -> None:
        self._show(self.stop)

    def _show(self, place: float) -> None:
        new = self.name != self.bar.desc  # shown at once, however short the step is
        self.bar.set_description_str(self.name, refresh=new)
        self.bar.update(max(100 * place - self.bar.n, 0.0))


@contextmanager
def progress_bar(shown: bool, name: str) -> Iterator[Progress]:
    """Show a bar on stderr during the context, or nothing.

    Args:
        shown: whether to show it.
        name: the bar's text until a step has a name.
    """
    if not shown:
        yield SILENT
        return
    with tqdm(total=100.0, desc=name, bar_format=_FORMAT, leave=False) as bar:
        yield SILENT if bar.disable else _Span(bar, 0.0, 1.0, name)  # a user of tqdm may have disabled all bars
