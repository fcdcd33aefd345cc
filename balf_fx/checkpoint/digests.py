"""Digests of tensors, of nested values and of functions, bit for bit, and the same in each process."""

from __future__ import annotations

import array
import ctypes
import dataclasses
import functools
import hashlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Feed = Callable[[Any], object]
"""Takes the next bytes of what is digested."""


def bytes_in(tensor: Tensor) -> Any:
    """A view of the bytes of a contiguous tensor on the CPU that is not empty; it does not keep the tensor alive."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def digest_of(value: Any) -> str:
    """The digest of nested values: numbers and strings by value, tensors and arrays by dtype, shape and bytes.

    Functions count with their code, defaults and what they enclose, but not with the globals that they read; modules
    and other objects that are called with their code, tensors and plain attributes. Of the rest, only the type counts.
    """
    digest = hashlib.blake2b(digest_size=16)
    _feed(value, digest.update)
    return digest.hexdigest()


def _feed(value: Any, feed: Feed, within: tuple[int, ...] = ()) -> None:
    """Feed a value; `within` has the functions that it is a part of, since a function may enclose itself."""
    if isinstance(value, Tensor):
        _feed_tensor(value.detach(), feed)
        return
    name, parts = ("again", []) if id(value) in within else _parts(value)
    feed(name.encode())
    for part in parts:
        if isinstance(part, _Bytes):
            feed(part)
        else:
            _feed(part, feed, (*within, id(value)) if callable(value) else within)


class _Bytes(bytes):
    """Bytes of a value, which are fed as they are."""


def _parts(value: Any) -> tuple[str, list[Any]]:
    """What kind of value it is, and what it consists of."""
    name = type(value).__name__
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return f"{name} {value!r}", []
    if isinstance(value, Mapping):
        return f"mapping {len(value)}", [each for pair in value.items() for each in pair]
    if isinstance(value, list | tuple):
        return f"sequence {len(value)}", list(value)
    if isinstance(value, set | frozenset):
        return f"set {len(value)}", sorted(map(digest_of, value))  # their order differs from process to process
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return name, [getattr(value, field.name) for field in dataclasses.fields(value)]
    known = _parts_of_array(value) or _parts_of_function(value)
    return known or (f"{name} {getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}", [])


def _parts_of_array(value: Any) -> tuple[str, list[Any]] | None:
    """The parts of an array of numpy, an image of pillow or another buffer; None if it is none."""
    described = getattr(value, "__array_interface__", None)
    if isinstance(described, Mapping):
        name = f"array {described['typestr']} {described['shape']}"
        objects = str(described["typestr"]).startswith("|O")  # its bytes are addresses
        return name, list(value.flat) if objects else [_Bytes(value.tobytes())]
    if isinstance(value, bytearray | memoryview | array.array):
        view = memoryview(value)
        return f"buffer {view.format} {view.shape}", [_Bytes(view.tobytes())]
    return None


def _parts_of_function(value: Any) -> tuple[str, list[Any]] | None:
    """The parts of a function, of its code, or of an object that may be called as one; None if it is none."""
    if isinstance(value, types.FunctionType):
        enclosed = [_content(cell) for cell in value.__closure__ or ()]
        return "function", [value.__code__, value.__defaults__, value.__kwdefaults__, enclosed]
    if isinstance(value, types.CodeType):
        names = [value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars]
        return "code", [value.co_code, *names, value.co_consts]
    if isinstance(value, types.MethodType):
        return "method", [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return "partial", [value.func, value.args, value.keywords]
    if callable(value) and hasattr(value, "__dict__") and not isinstance(value, type):
        run = type(value).forward if isinstance(value, nn.Module) else type(value).__call__
        plain = {
            name: each for name, each in vars(value).items() if isinstance(each, bool | int | float | str | Tensor)
        }
        return type(value).__name__, [run, plain, *(_held(value) if isinstance(value, nn.Module) else [])]
    return None


def _content(cell: types.CellType) -> Any:
    """What a function encloses; None if it is not there yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _held(module: nn.Module) -> list[Any]:
    """The parameters, buffers and modules of a module itself, by name."""
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return [*tensors, *module.named_children()]


def _feed_tensor(tensor: Tensor, feed: Feed) -> None:
    feed(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if hasattr(tensor, "__tensor_flatten__"):  # a quantized weight, for instance
        names, context = tensor.__tensor_flatten__()
        _feed([*(getattr(tensor, name) for name in names), str(context)], feed)
    elif tensor.numel() and not tensor.is_meta:
        held = (tensor if tensor.layout is torch.strided else tensor.to_dense()).cpu().contiguous()
        feed(bytes_in(held))
