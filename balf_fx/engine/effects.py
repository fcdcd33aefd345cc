"""Options that can have no effect beside the others, which `compile` refuses before any work."""

from __future__ import annotations

from collections.abc import Iterator

from balf_fx.engine.settings import Settings
from balf_fx.errors import OptionError


def check_effects(settings: Settings) -> None:
    """Check that each option with another value than its default can have an effect.

    Raises:
        OptionError: one cannot; the message says what it is for.
    """
    for name, purpose in _without_effect(settings):
        raise OptionError(f"{name}= would have no effect: it is for {purpose}. Drop it")


def _without_effect(settings: Settings) -> Iterator[tuple[str, str]]:
    """The options without effect, each with what it is for."""
    usual = Settings()
    if settings.runner is not None and not settings.times:
        yield "runner", "latency="
    if settings.limit is None:
        for name in ("confidence", "minimise"):
            if getattr(settings, name) != getattr(usual, name):
                yield name, "disagreement= or divergence="
    if settings.loss is not None and not (settings.chosen_factors in ("sensitivity", "air") or settings.measures):
        yield "loss", "a budget with gradients or with allocations that are measured, not for these factors"
    if settings.weights is not None and not (settings.calibrates or settings.limit or settings.refit_mode):
        yield "weights", "a budget with statistics of the batches, not for factors='svd' alone"
    if settings.separable and "separable" not in settings.divisions:
        yield "separable", "convolutions under a budget, with factors='activations' or 'sensitivity'"
