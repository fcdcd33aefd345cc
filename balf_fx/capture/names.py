"""Names that a GraphModule can have: it reserves some, and generated code reads every attribute by its name."""

from __future__ import annotations

import keyword
from typing import Any

from torch import fx, nn

_RESERVED = frozenset(dir(fx.GraphModule)) | {"meta", "training"}


def legal_path(path: str) -> str:
    """The path in a GraphModule for this path in a model, with `_` after the words that are not allowed."""
    return ".".join(_legal(word, first=not index) for index, word in enumerate(path.split(".")))


def _legal(word: str, first: bool) -> str:
    return f"{word}_" if keyword.iskeyword(word) or (first and word in _RESERVED) else word


def illegal_name(model: nn.Module) -> str | None:
    """The first name in a model that a GraphModule cannot have, or None."""
    paths = [path for path, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())]
    return next((path for path in paths if path and legal_path(path) != path), None)


def rename_illegal(root: nn.Module, graph: fx.Graph) -> None:
    """Rename the modules, parameters and buffers of a traced model that a GraphModule cannot have, and their readers.

    Args:
        root: its forward is not called any more.
    """
    renamed = {}
    for path, module in root.named_modules():
        renamed[id(module)] = _rename(module, first=not path)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = _new_path(root, str(node.target), renamed)


def _rename(module: nn.Module, first: bool) -> dict[str, str]:
    """Rename the children of a module; returns the new name of each that has one."""
    registries: list[dict[str, Any]] = [module._modules, module._parameters, module._buffers]
    taken = {name for registry in registries for name in registry}
    found = {}
    for name in sorted(taken):
        new = _legal(name, first)
        while new != name and new in taken:
            new += "_"
        if new != name:
            found[name] = new
            taken.add(new)
    for registry in registries if found else ():
        entries = list(registry.items())
        registry.clear()
        registry.update({found.get(name, name): value for name, value in entries})
    return found


def _new_path(root: nn.Module, path: str, renamed: dict[int, dict[str, str]]) -> str:
    words = []
    module: Any = root
    for word in path.split("."):
        words.append(renamed.get(id(module), {}).get(word, word))
        module = getattr(module, "_modules", {}).get(words[-1])
    return ".".join(words)
