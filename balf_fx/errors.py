"""The errors that balf_fx raises. Catch `BalfError` for all of them.

A message says what is wrong and what to do about it. Numbers that a caller may need are attributes of the exception.
"""

from __future__ import annotations


class BalfError(Exception):
    """Base of all errors raised by balf_fx."""


class OptionError(BalfError, ValueError):
    """An option has a wrong value or type, or cannot be combined with another one."""


class UnknownSiteError(OptionError):
    """A name or pattern in `include`, `exclude`, `dense` or a rank mapping matches no layer."""


class CalibrationError(BalfError, ValueError):
    """The calibration batches cannot be used: there are none, or the model cannot run one of them."""


class NonFiniteError(CalibrationError):
    """The activations of a site contain NaN or infinity."""


class NotCalibratedError(BalfError, RuntimeError):
    """Calibration is missing or not finished: observers are missing or have observed no batch."""


class ModelError(BalfError, ValueError):
    """The model is not ready to be compressed: weights are missing, not finite or not plain, or it is quantized."""


class CaptureError(BalfError, RuntimeError):
    """The model cannot be turned into an FX graph that computes the same."""


class GraftError(BalfError, RuntimeError):
    """The compressed layers cannot go back into the model: it would not compute what their graph computes."""


class TrainingModeError(BalfError, RuntimeError):
    """A layer whose output differs in training mode is in training mode."""


class NoSiteError(BalfError, ValueError):
    """Nothing in the model can be factorized."""


class BudgetError(BalfError, ValueError):
    """The budget is below what compression can reach.

    Attributes:
        minimum: the smallest reachable budget, as a fraction of the whole model's cost.
    """

    def __init__(self, message: str, minimum: float) -> None:
        super().__init__(message)
        self.minimum = minimum


class WeightsChangedError(BalfError, RuntimeError):
    """A weight that `torch.compile(backend="balf")` has replaced or folded was changed afterwards."""


class MissingExtraError(BalfError, ImportError):
    """An optional dependency is not installed; the message names the extra that installs it."""


class PlanError(BalfError, ValueError):
    """A plan cannot be used: it is damaged, of another version, or made for another model or other weights."""


class FileError(BalfError, ValueError):
    """A file cannot be written, or cannot be read as one of balf_fx's: it is truncated, changed or of another kind."""


class ProcessError(BalfError, RuntimeError):
    """Another process that compresses the same model has failed, has ended, or does something else."""


class CheckpointError(FileError):
    """A checkpoint belongs to another run, is damaged, or cannot be written, as on a full disk."""


class PassError(BalfError, RuntimeError):
    """A pass was given a graph that lacks the result of an earlier pass, or violated its own postcondition."""
