"""Text for the command line: a file, as sequences of tokens of a model's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from balf_fx.cli.models import library
from balf_fx.errors import CalibrationError, OptionError

_START = "hf:"


@dataclass(frozen=True)
class Text:
    """One stream of tokens, cut into sequences [samples, length] of equal length; what is left over is dropped."""

    tokens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, indices: Sequence[int], size: int) -> list[dict[str, Tensor]]:
        """Some of the sequences, in batches of keyword arguments."""
        return [{"input_ids": part} for part in torch.split(self.tokens[list(indices)], size)]


def open_text(path: Path, specification: str, model: nn.Module, length: int) -> Text:
    """Read a text file.

    Args:
        specification: the model's, "hf:" followed by its folder or name.
        length: the number of tokens of a sequence; fewer if the model has no positions for them.

    Raises:
        OptionError: the model has no tokenizer.
        CalibrationError: the text cannot be read, or is shorter than one sequence.
    """
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    length = min(length, most) if isinstance(most, int) else length
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read the text {path}: {error}") from error
    tokens = torch.tensor(open_tokenizer(specification)(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(tokens) < length:
        raise CalibrationError(f"{path} has {len(tokens)} tokens, fewer than one sequence of {length}")
    return Text(tokens[: len(tokens) // length * length].reshape(-1, length))


def open_tokenizer(specification: str) -> Any:
    """The tokenizer of a model of transformers.

    Raises:
        OptionError: the model is another one, or has none.
    """
    if not specification.startswith(_START):
        raise OptionError(f"only models of transformers, {_START}FOLDER_OR_NAME, read --text: pass --data")
    name = specification.removeprefix(_START)
    try:
        return library("transformers", "llm").AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(f"there is no tokenizer in {name}: {error}") from error
