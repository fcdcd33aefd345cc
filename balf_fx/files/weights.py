"""Weights of a model on the meta device, mapped from safetensors files: they take memory where they are read alone.

A safetensors file starts with the length of its header, a little-endian number of 8 bytes. The header is JSON with the
dtype, the shape and the place of each tensor; the bytes of the tensors follow. In a folder of several files,
`*.safetensors.index.json` says which one has each tensor. (https://huggingface.co/docs/safetensors)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from balf_fx.calibration.pages import Pages
from balf_fx.capture.models import copy_model
from balf_fx.errors import FileError, ModelError
from balf_fx.graph.parameters import put

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def with_weights(model: nn.Module, path: str | os.PathLike[str] | None) -> tuple[nn.Module, Pages | None]:
    """A copy of a model with its weights from files, and the files, whose weights copies share as long as they live.

    Args:
        model: its parameters are on the meta device; in the copy, they have the dtypes of the files. Buffers that are
            in no file must be elsewhere.
        path: a safetensors file, or a folder of such files; None for the model as it is.

    Raises:
        FileError: a file is missing or damaged, or lacks a tensor of the model.
        ModelError: a tensor has another shape in the model, or has values already.
    """
    if path is None:
        return model, None
    model, pages = copy_model(model), Pages()
    tie = getattr(model, "tie_weights", None)  # of transformers: files have one of two that accelerate makes apart
    if callable(tie):
        tie()
    given = read_tensors(Path(path), pages)
    found: dict[int, Tensor] = {}  # tensors that several names share remain shared
    for held in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in list(held):
            if name in given and id(tensor) not in found:
                found[id(tensor)] = _fitting(name, tensor, given[name])
    _check_complete(model, found, path)
    for held in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in list(held):
            if id(tensor) in found:
                put(model, name, found[id(tensor)])
    return model, pages


def _fitting(name: str, tensor: Tensor, value: Tensor) -> Tensor:
    """The value as a parameter or a buffer in place of a tensor of the model."""
    if value.shape != tensor.shape:
        raise ModelError(f"{name} has shape {tuple(tensor.shape)} in the model, {tuple(value.shape)} in safetensors=")
    if not isinstance(tensor, nn.Parameter):
        return value
    if tensor.device.type != "meta":
        raise ModelError(
            f"{name} has values already, on {tensor.device}: safetensors= is for a model on the meta device, made "
            'within torch.device("meta")'
        )
    return nn.Parameter(value, requires_grad=tensor.requires_grad)


def _check_complete(model: nn.Module, found: Mapping[int, Tensor], path: str | os.PathLike[str]) -> None:
    """Check that everything that is on the meta device has a value."""
    missing = [name for name, each in model.named_parameters() if id(each) not in found and each.is_meta]
    if missing:
        raise FileError(f"{path} has no {', '.join(missing[:5])}: is it a checkpoint of this architecture?")
    missing = [name for name, each in model.named_buffers() if id(each) not in found and each.is_meta]
    if missing:
        raise ModelError(
            f"{path} has no {', '.join(missing[:5])}, which the model computes when it is made: make it with buffers "
            "outside of the meta device, as accelerate.init_empty_weights() does"
        )


def read_tensors(path: Path, pages: Pages) -> dict[str, Tensor]:
    """The tensors of a file or a folder by name, mapped.

    Raises:
        FileError: there is no such file, or it is damaged.
    """
    found: dict[str, Tensor] = {}
    for file in _files(path):
        found |= dict(_read(file, pages))
    return found


def _files(path: Path) -> list[Path]:
    """The files at a path: those that an index names, or all of a folder without an index."""
    if not path.is_dir():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        return _files_of(indices[0])
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileError(f"{path} has no safetensors files")
    return files


def _files_of(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = json.loads(index.read_bytes())["weight_map"].values()
        return [index.parent / name for name in sorted(set(names))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{index} is not an index of safetensors files") from error


def _read(path: Path, pages: Pages) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= path.stat().st_size - 8:
                raise FileError(f"{path} is truncated or not a safetensors file")
            header = json.loads(file.read(length))
            values = pages.map(file)[8 + length :]
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                own, dtype = values[start:stop], _DTYPES[entry["dtype"]]
                if own.data_ptr() % dtype.itemsize:  # tensors are aligned by custom only, not by the format
                    own = own.clone()
                yield name, own.view(dtype).reshape(entry["shape"])
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} is truncated or not a safetensors file: {error}") from error
