"""Tells transformers of the method "balf" as soon as something imports transformers.

transformers finds the method of a folder in a registry in memory, so its entry must be there before `from_pretrained`
runs. Importing transformers for it takes seconds and needs it installed; so a finder waits for the import.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

from torch import nn

from balf_fx.graph.plan import Plan

_LOGGER = logging.getLogger(__name__)
_AWAITED = "transformers.quantizers.auto"


def watch() -> None:
    """Register the method now if transformers is imported already, else when it is."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def describe(compressed: nn.Module, plan: Plan) -> None:
    """Let a model of transformers write the plan and checksums into its folder; nothing for other models."""
    transformers: Any = sys.modules.get("transformers")
    if transformers is not None and isinstance(compressed, transformers.PreTrainedModel):
        quantizer = importlib.import_module("balf_fx.huggingface.quantizer")  # only here: it imports transformers
        quantizer.describe(compressed, plan)


def _register() -> None:
    try:
        importlib.import_module("balf_fx.huggingface.quantizer")
    except ImportError as error:  # of an earlier version, which must go on working for other models
        _LOGGER.warning("folders of compressed models cannot be read or written: they need transformers 5 (%s)", error)


class _Finder(MetaPathFinder):
    """Finds only the module that holds the registry, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads the module as its own loader does, and then registers the method."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        _register()
