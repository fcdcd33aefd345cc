"""What a field of `Settings` says of its option."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import field
from typing import Any, Literal

Stage = Literal["prepare", "calibrate", "convert"]
"""The stage that an option affects: capture and observers, running the batches, or everything after that."""

Effort = Literal["fast", "balanced", "best"]
"""The effort, and so the time, that compression spends on accuracy."""

Result = Literal["graph", "module"]
"""What a compressed model is: a GraphModule, or a copy of the user's model."""


def option(default: Any, text: str, *stages: Stage, values: Collection[Any] = ()) -> Any:
    """A field of `Settings`.

    Args:
        text: its description, for docstrings and the command line.
        stages: the stages that it affects.
        values: the allowed values; empty if they are checked elsewhere.
    """
    metadata = {"text": text, "stages": stages, "values": tuple(values)}
    return field(default=default, metadata=metadata)
