"""Compressed models in files: tensors as safetensors, and the plan as JSON in the same file.

Nothing is pickled, and no code from a file is run: the graph is rebuilt from the model's own code (`files.restore`). A
file is first written under another name and then replaces the old one in one step.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from balf_fx.errors import FileError
from balf_fx.files.checksums import checksum
from balf_fx.files.restore import Stored
from balf_fx.graph.plan import Plan

_INDEX, _CONFIG = "model.safetensors.index.json", "config.json"
_PLAN, _ORDERS, _CHECKSUM = "balf_fx.plan", "balf_fx.orders", "balf_fx.sha256"


def write(found: Stored, path: str | os.PathLike[str], shard: int | None = None) -> None:
    """Write a compressed model to a file; an existing file is replaced once everything is written.

    Args:
        shard: the bytes of tensors in each of several files, except for one that is larger; these are written one after
            another to a new folder, with an index.

    Raises:
        FileError: a tensor cannot be stored by safetensors, such as a quantized weight; or the folder around it is
            missing, or there is a folder at the path.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileError(f"{path} cannot be written: there is no folder {path.parent}. Make it first")
    if shard is None:
        _write(found, path)
    else:
        _write_folder(found, path, shard)


def _write(found: Stored, path: Path) -> None:
    if path.is_dir():
        raise FileError(f"{path} is a folder: pass the name of a file, or shard= for a new folder of several files")
    tensors = {name: _plain(name, value) for name, value in found.tensors.items()}
    text = found.plan.to_json(indent=None)
    orders = {name: order for name, value in found.tensors.items() if (order := _order(value)) != sorted(order)}
    metadata = {_PLAN: text, _ORDERS: json.dumps(orders), _CHECKSUM: checksum(tensors, text)}
    with tempfile.TemporaryDirectory(prefix=".balf_fx-", dir=path.parent) as folder:
        written = Path(folder) / path.name
        written.touch()
        mode = written.stat().st_mode
        save_file(tensors, written, metadata)
        written.chmod(mode)  # the mode of new files; safetensors writes files that only their owner can read
        with written.open("rb") as file:
            os.fsync(file.fileno())
        written.replace(path)


def _write_folder(found: Stored, path: Path, size: int) -> None:
    if path.exists():
        raise FileError(f"{path} exists already: pass the path of a new folder")
    shards = _shards(found.tensors, size)
    names = [f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    with tempfile.TemporaryDirectory(prefix=".balf_fx-", dir=path.parent) as outer:
        folder = Path(outer) / path.name
        folder.mkdir()
        for name, shard in zip(names, shards, strict=True):
            _write(Stored(found.plan, {key: found.tensors[key] for key in shard}), folder / name)
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in found.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / _INDEX).write_text(json.dumps(index, indent=1))
        folder.rename(path)


def _shards(tensors: Mapping[str, Tensor], size: int) -> list[list[str]]:
    """The names of the tensors of each file."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > size:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    return shards


def read(path: str | os.PathLike[str]) -> Stored:
    """The plan and the tensors in a file, or in a folder of several.

    Raises:
        FileError: a file is missing, cannot be read or is damaged, or the files of a folder do not belong together.
        PlanError: the plan is of another format.
    """
    path = Path(path)
    if not path.is_dir():
        return _read(path)
    try:
        places = json.loads((path / _INDEX).read_bytes())["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} has no {_INDEX} that balf_fx.save has written: {error}") from error
    parts = {name: _read(path / name) for name in names}
    plans = {part.plan.to_json() for part in parts.values()}
    held = {key: name for name, part in parts.items() for key in part.tensors}
    if len(plans) != 1 or held != places:
        raise FileError(f"the files in {path} are not those of one model: some have been replaced")
    tensors = {key: tensor for part in parts.values() for key, tensor in part.tensors.items()}
    return Stored(parts[names[0]].plan, tensors)


def _read(path: Path) -> Stored:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    except SafetensorError as error:
        raise FileError(f"{path} is truncated or not a safetensors file: {error}") from error
    if _PLAN not in metadata or _CHECKSUM not in metadata:
        raise FileError(f"{path} contains tensors but no plan: was it written by balf_fx.save?")
    if checksum(tensors, metadata[_PLAN]) != metadata[_CHECKSUM]:
        raise FileError(f"{path} has been changed since it was written: its checksum does not match")
    orders = json.loads(metadata.get(_ORDERS, "{}"))
    tensors.update({name: _in_order(tensors[name], order) for name, order in orders.items()})
    return Stored(Plan.from_json(metadata[_PLAN]), tensors)


def read_plan(path: Path) -> Plan:
    """The plan in a file or folder from `write`, in the folder of a model of transformers, or in a .json file.

    Raises:
        FileError, PlanError: as `read`.
    """
    if (path / _CONFIG).is_file():
        return _configured(path / _CONFIG)
    if path.suffix != ".json":
        return read(path).plan
    try:
        return Plan.from_json(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error}") from error


def _configured(path: Path) -> Plan:
    """The plan in the configuration of a model of transformers (`huggingface.quantizer`)."""
    try:
        (entry,) = json.loads(path.read_bytes())["quantization_config"]["plan"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"{path} has no plan of balf_fx, since the model is not compressed, or since transformers reads it without "
            f"one ({type(error).__name__} {error})"
        ) from error
    return Plan.from_dict(entry)


def _plain(name: str, value: Tensor) -> Tensor:
    """A tensor as safetensors needs it: contiguous, on the CPU, and sharing no memory."""
    if type(value.data) is not Tensor or value.layout is not torch.strided or value.is_quantized:
        kind = type(value.data).__name__ if type(value.data) is not Tensor else value.layout
        raise FileError(f"{name} is a {kind}, not a plain tensor: save the model before it is quantized")
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _order(value: Tensor) -> list[int]:
    """The dimensions of a tensor as they lie in memory, the outermost first: [0, 2, 3, 1] for channels_last.

    safetensors stores contiguous tensors, but kernels for another order in memory may round in another way.
    """
    strides = value.stride()
    return sorted(range(value.dim()), key=lambda dimension: -strides[dimension])


def _in_order(value: Tensor, order: list[int]) -> Tensor:
    """The same tensor with its dimensions in this order in memory."""
    strides = [math.prod(value.shape[inner] for inner in order[order.index(dim) + 1 :]) for dim in range(value.dim())]
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device="cpu").copy_(value)
