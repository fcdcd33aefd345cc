"""The layers of a compressed model to which adapters of peft are attached.

peft takes the module at the path that a name matches, and knows linear layers and convolutions by their class. In the
place of a compressed layer stands a container of them. It is not a linear layer itself: what looks for linear layers,
such as quantizers and peft's own "all-linear", would then find the same weights twice. So the layers in it are named.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from balf_fx.errors import OptionError
from balf_fx.graph.replacements import Replacement


def target_modules(model: nn.Module, names: str | Iterable[str]) -> list[str]:
    """The layers that compute these modules now, for `target_modules` of `peft.LoraConfig` and its like.

    Args:
        model: a result of `compile(..., result="module")`, as it is or read from a folder.
        names: the modules of the original, as peft takes them in a list: paths or their last words, such as "q_proj".

    Returns:
        For a module that was compressed, the paths of all stock layers in its place, two for a pair of factors; for
        any other its own path.

    Raises:
        OptionError: the model has no module of a name.
    """
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        matching = {path: module for path, module in model.named_modules() if f".{path}".endswith(f".{name}")}
        if not name or not matching:
            raise OptionError(f"the model has no module {name!r}: take the names of layers from model.named_modules()")
        for path, module in matching.items():
            found |= dict.fromkeys(_layers(path, module) if isinstance(module, Replacement) else [path])
    return list(found)


def _layers(path: str, replacement: Replacement) -> list[str]:
    """The paths of the stock layers in a replacement, also of those in lists."""
    return [own for own, module in replacement.named_modules(prefix=path) if not any(module.children())]
