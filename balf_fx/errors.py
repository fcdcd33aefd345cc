"""Every error balf_fx raises on purpose. Catch `BalfError` for all of them.

A message says what was wrong and what to do about it; where a number would help, the exception carries it too.
"""

from __future__ import annotations


class BalfError(Exception):
    """Base of all errors raised by balf_fx."""


class OptionError(BalfError, ValueError):
    """An option has a value, a type or a combination that means nothing."""


class UnknownSiteError(OptionError):
    """A name or pattern in `include`, `exclude` or a rank mapping matches no site."""


class CalibrationError(BalfError, ValueError):
    """The calibration batches cannot be used: none at all, or one that the model cannot run."""


class NonFiniteError(CalibrationError):
    """NaN or infinity in the activations of a site."""


class NotCalibratedError(BalfError, RuntimeError):
    """Observers are there but have seen no batch."""


class ModelError(BalfError, ValueError):
    """The model is not ready to be compressed: its weights are missing, or it is quantized already."""


class CaptureError(BalfError, RuntimeError):
    """The model cannot be turned into an FX graph that computes the same."""


class TrainingModeError(BalfError, RuntimeError):
    """A layer that computes something else in training mode is in training mode."""


class NoSiteError(BalfError, ValueError):
    """Nothing in the model can be factorized."""


class BudgetError(BalfError, ValueError):
    """The budget is below what factorization can reach.

    Attributes:
        minimum: the smallest reachable budget, as a fraction of the whole model's cost.
    """

    def __init__(self, message: str, minimum: float) -> None:
        super().__init__(message)
        self.minimum = minimum


class WeightsChangedError(BalfError, RuntimeError):
    """A weight that `torch.compile(backend="balf")` has replaced by factors is no longer what the factors stand for."""


class MissingExtraError(BalfError, ImportError):
    """Something optional is not installed; the message names the extra that brings it."""


class PlanError(BalfError, ValueError):
    """A plan cannot be followed: it is damaged, of another version, or made for another model or other weights."""


class FileError(BalfError, ValueError):
    """A file does not hold what balf_fx has written: it is truncated, changed, or something else."""


class PassError(BalfError, RuntimeError):
    """A pass was given a graph that lacks what an earlier pass leaves behind, or broke its own promise."""
