"""Nested values as JSON and tensors, and back, bit for bit.

Numbers, strings, None, lists, tuples, mappings, tensors, and dataclasses of known classes can be stored. Tensors keep
their device and their strides, since kernels may round in another way for another order in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from balf_fx.distributed.packing import with_strides


class Encoder:
    """Writes values as JSON and gathers their tensors.

    Attributes:
        tensors: the tensors by a number: contiguous, on the CPU, and sharing no memory.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._addresses: set[int] = set()

    def encode(self, value: Any) -> Any:
        """A value as JSON.

        Raises:
            TypeError: there is an object of another kind in it.
        """
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            return {"tensor": self._add(value.detach()), "stride": list(value.stride()), "device": str(value.device)}
        if isinstance(value, tuple):
            return {"tuple": [self.encode(each) for each in value]}
        if isinstance(value, list):
            return [self.encode(each) for each in value]
        if isinstance(value, Mapping):
            return {"mapping": [[self.encode(key), self.encode(each)] for key, each in value.items()]}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {each.name: self.encode(getattr(value, each.name)) for each in dataclasses.fields(value)}
            return {"record": type(value).__name__, "fields": fields}
        raise TypeError(f"{type(value).__name__} cannot be stored in a checkpoint")

    def _add(self, value: Tensor) -> str:
        key, held = str(len(self.tensors)), value.cpu().contiguous()
        storage = held.untyped_storage()
        if storage.data_ptr() in self._addresses or storage.nbytes() != held.nbytes:
            held = held.clone()
        self._addresses.add(held.untyped_storage().data_ptr())
        self.tensors[key] = held
        return key


def decode(written: Any, tensors: Mapping[str, Tensor], classes: Collection[type]) -> Any:
    """The value of what `Encoder.encode` returned.

    Args:
        classes: the dataclasses that may be in it.
    """
    if isinstance(written, list):
        return [decode(each, tensors, classes) for each in written]
    if not isinstance(written, dict):
        return written
    if "tensor" in written:
        return with_strides(tensors[written["tensor"]], written["stride"]).to(written["device"])
    if "tuple" in written:
        return tuple(decode(each, tensors, classes) for each in written["tuple"])
    if "mapping" in written:
        return {decode(key, tensors, classes): decode(each, tensors, classes) for key, each in written["mapping"]}
    known = {each.__name__: each for each in classes}
    return known[written["record"]](
        **{name: decode(each, tensors, classes) for name, each in written["fields"].items()}
    )
