"""Batches for the models of transformers that the zoo examines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

Batch = dict[str, Tensor]

LENGTHS = (16, 24)
"""Tokens of a sequence."""


def padded(make: Callable[[int], Batch], side: Literal["left", "right"]) -> Callable[[int], Batch]:
    """Three positions of padding in all but the first sample."""

    def batch(samples: int) -> Batch:
        padded = make(samples)
        for name, mask in padded.items():
            if name.endswith("attention_mask"):
                mask[1:, slice(3) if side == "left" else slice(-3, None)] = 0
        return padded

    return batch


def without_masks(make: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """Tokens alone."""
    return lambda samples: {name: value for name, value in make(samples).items() if not name.endswith("mask")}


def _tokens(samples: int, length: int) -> Batch:
    return {"input_ids": torch.randint(3, 999, (samples, length))}


def _text(samples: int, length: int) -> Batch:
    return {**_tokens(samples, length), "attention_mask": torch.ones(samples, length, dtype=torch.int64)}


def _translation(samples: int, length: int) -> Batch:
    """For an encoder, and fewer tokens for a decoder."""
    decoder = {f"decoder_{name}": value for name, value in _text(samples, length - 4).items()}
    return {**_text(samples, length), **decoder}


def _speech(samples: int, length: int) -> Batch:
    """A spectrogram for an encoder, and tokens for a decoder."""
    return {**_audio(samples), "decoder_input_ids": _tokens(samples, length)["input_ids"]}


def _image(samples: int) -> Batch:
    return {"pixel_values": torch.randn(samples, 3, 64, 64)}


def _caption(samples: int, length: int) -> Batch:
    return {**_text(samples, length), **_image(samples)}


def _dialogue(samples: int, length: int) -> Batch:
    """Sixteen tokens that stand for an image's patches, then text."""
    batch = _caption(samples, length + 16)
    batch["input_ids"][:, 3:19] = 999
    return batch


def _audio(samples: int) -> Batch:
    return {"input_features": torch.randn(samples, 80, 100)}


MASKED: Mapping[str, Callable[[int, int], Batch]] = {
    "text": _text,
    "translation": _translation,
    "caption": _caption,
    "dialogue": _dialogue,
}
"""What makes a batch of a number of samples and of a length, with masks of ones."""

OTHERS: Mapping[str, Callable[[int], Batch]] = {
    "image": _image,
    "audio": _audio,
    "speech": functools.partial(_speech, length=LENGTHS[0]),
    "tokens": functools.partial(_tokens, length=LENGTHS[0]),
    "spectrogram": lambda samples: {"input_values": torch.randn(samples, 64, 32)},
    "wave": lambda samples: {"input_values": torch.randn(samples, 4000)},
}
"""What makes a batch of a number of samples."""
