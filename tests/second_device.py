"""A pretended second device: values are on the CPU, but operations refuse to mix them with tensors that are not on it.

Whoever asks a tensor for its device gets `DEVICE`, and whoever makes a tensor there gets one that is marked. Marks
belong to storages, so that views and parameters have them, too. As on a GPU, tensors without dimensions and indices may
be on the CPU, random numbers need a generator of the device, and NumPy needs a copy on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("xpu", 0)

_ATEN = torch.ops.aten
_MOVING = {_ATEN.copy_.default, _ATEN._to_copy.default}
_INDEXING = {_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default, _ATEN._index_put_impl_.default}


class MixedDevicesError(RuntimeError):
    """An operation got tensors of both devices."""


class Marks:
    """The storages on the second device. A weak reference keeps the address of a storage from being used again."""

    device, rounds = DEVICE, False

    def __init__(self) -> None:
        self._held: dict[int, StorageWeakRef] = {}

    def has(self, tensor: Tensor) -> bool:
        return tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._held

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._held.setdefault(storage._cdata, StorageWeakRef(storage))


class Real:
    """In place of marks, a device that is really there and rounds in its own way."""

    rounds = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def has(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device.type


class _Operations(TorchDispatchMode):
    """Refuses to mix devices, and marks what is computed from marked tensors.

    Attributes:
        place: whether new tensors go to the second device; None where nobody has said so.
    """

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks
        self.place: bool | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        second = any(map(self.marks.has, given))
        if second and func not in _MOVING:
            checked = _tensors((args[0], args[2:])) if func in _INDEXING else given
            written = _tensors(
                [value for value, spec in zip(args, func._schema.arguments, strict=False) if spec.is_write]
            )
            others = [each for each in checked if each.dim() > 0]
            if not all(map(self.marks.has, [*others, *written])):
                raise MixedDevicesError(f"{func} got tensors on {DEVICE} and on the CPU")
        made = func(*args, **kwargs)
        place = second if self.place is None else self.place
        if place and func is not _ATEN.copy_.default:
            if kwargs.get("generator") is not None:
                raise MixedDevicesError(f"{func} got a generator of the CPU for a tensor on {DEVICE}")
            for each in _tensors(made):
                self.marks.add(each)
        return made


class _Functions(TorchFunctionMode):
    """Answers for the device of tensors, and makes and moves tensors there."""

    def __init__(self, marks: Marks, operations: _Operations) -> None:
        super().__init__()
        self.marks = marks
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = args[0] if args and isinstance(args[0], Tensor) else None
        second = own is not None and self.marks.has(own)
        if func == Tensor.device.__get__:  # a new object each time
            return DEVICE if second else func(*args)
        if func in (Tensor.numpy, Tensor.__array__) and second:
            raise MixedDevicesError(f"NumPy cannot read a tensor on {DEVICE}")
        asked = self._asked(func, args, kwargs)
        if asked is not None:
            args, kwargs = pytree.tree_map(_on_cpu, (args, kwargs))
        elif second:
            asked = True  # functions of several operations make tensors where their first argument is
        with self._placing(asked):
            made = func(*args, **kwargs)
            if own is not None and func in _TRANSFERS and self.marks.has(made) is (not asked):
                made = _ATEN._to_copy.default(made)
        if func is Tensor.__deepcopy__ and second:  # copies a storage by itself
            self.marks.add(made)
        return made

    def _asked(self, func: Callable[..., Any], args: Any, kwargs: Any) -> bool | None:
        """Whether a call asks for the second device; None if it names none."""
        if func is Tensor.cpu:
            return False
        named = kwargs.get("device")
        if func is Tensor.to and named is None and len(args) > 1:
            if isinstance(args[1], Tensor):
                return self.marks.has(args[1])
            named = args[1] if isinstance(args[1], torch.device | str) else None
        return None if named is None else torch.device(named).type == DEVICE.type

    @contextmanager
    def _placing(self, second: bool | None) -> Iterator[None]:
        before, self.operations.place = self.operations.place, second
        try:
            yield
        finally:
            self.operations.place = before


_TRANSFERS = (Tensor.to, Tensor.cpu, torch.as_tensor)


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in a value, also in its lists and dictionaries: what operations take and return."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, tuple | list):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def _on_cpu(value: Any) -> Any:
    """The argument of a call that the CPU serves in place of the second device."""
    if isinstance(value, torch.device) and value.type == DEVICE.type:
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.split(":")[0] == DEVICE.type else value


@contextmanager
def second_device() -> Iterator[Marks]:
    """Pretend that there is a second device."""
    marks = Marks()
    operations = _Operations(marks)
    with operations, _Functions(marks, operations):
        yield marks
