"""The image and video models of torchvision and timm that the zoo examines."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from zoo_subject import LARGEST, Case, Skip, Subject, count_parameters, too_large

SIZES = (64, 56, 96, 128, 160)
"""Image sizes to try before a model's own; 56 is for patches of 14."""


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a model is selected: it matches one of the patterns, or there are none."""
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def torchvision_cases(patterns: Sequence[str]) -> Iterator[Case | Skip]:
    """All classification, segmentation and video models that are not too large."""
    from torchvision import models

    left_out = {
        "quantized": (models.quantization, "has integer weights"),
        "detection": (models.detection, "returns a varying number of boxes"),
        "optical flow": (models.optical_flow, "iterates over pairs of large images"),
    }
    reasons = {name: f"{kind}: {why}" for kind, (m, why) in left_out.items() for name in models.list_models(module=m)}
    for name in models.list_models():
        if name in reasons:
            yield Skip("torchvision", name, reasons[name])
        elif matches(name, patterns):
            count = count_parameters(lambda name=name: _torchvision_model(name, {}))
            yield Case("torchvision", name) if count <= LARGEST else Skip("torchvision", name, too_large(count))


def timm_cases(patterns: Sequence[str], known: Collection[str] = ()) -> Iterator[Case | Skip]:
    """The smallest member of each family: of the models of one module whose names begin with the same letters.

    Selecting it builds the whole family, so that families of which a member is known are left out here.
    """
    import timm

    families = defaultdict(list)
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            families[module, re.match("[a-z]+", name).group()].append(name)
    for names in families.values():
        if any(matches(name, patterns) for name in names) and not any(name in known for name in names):
            yield _smallest(names)


def _smallest(names: Sequence[str]) -> Case | Skip:
    counts = {name: count_parameters(lambda name=name: _timm_model(name, {})) for name in names}
    name = min(names, key=counts.__getitem__)
    if counts[name] <= LARGEST:
        return Case("timm", name)
    options = {"depth": 2}
    try:
        count = count_parameters(lambda: _timm_model(name, options))
    except TypeError:  # it has no such argument
        return Skip("timm", name, too_large(counts[name]))
    return Case("timm", name, tuple(options.items())) if count <= LARGEST else Skip("timm", name, too_large(count))


def _torchvision_model(name: str, options: Mapping[str, Any]) -> nn.Module:
    from torchvision import models

    if name in models.list_models(module=models.segmentation):
        options = {"weights_backbone": None, **options}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, **options}
    return models.get_model(name, weights=None, **options)


def torchvision_subject(name: str, options: Mapping[str, Any]) -> Subject:
    """A model with random weights, for the smallest images and the shortest videos that it runs on."""
    from torchvision import models

    attempts: list[tuple[dict[str, Any], tuple[int, ...]]] = []
    video = name in models.list_models(module=models.video)
    for size, frames in itertools.product((*SIZES, 224), (8, 16) if video else (0,)):
        fixed: dict[str, Any] = {}
        if name.startswith("vit_"):
            fixed = {"image_size": size}
        elif name.startswith("maxvit_"):
            fixed = {"input_size": (size, size)}
        attempts.append(({**options, **fixed}, (3, frames, size, size) if video else (3, size, size)))
    return _first_that_runs(lambda options: _torchvision_model(name, options), attempts)


def _timm_model(name: str, options: Mapping[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def timm_subject(name: str, options: Mapping[str, Any]) -> Subject:
    """A model with random weights, for the smallest images that it runs on."""
    import timm

    config = timm.get_pretrained_cfg(name)
    channels, *native = config.input_size if config is not None else (3, 224, 224)
    attempts: list[tuple[dict[str, Any], tuple[int, ...]]] = []
    for size in SIZES:
        attempts.append(({**options}, (channels, size, size)))
        attempts.append(({**options, "img_size": size}, (channels, size, size)))
    attempts.append(({**options}, (channels, *native)))
    return _first_that_runs(lambda options: _timm_model(name, options), attempts)


def _first_that_runs(
    make: Callable[[Mapping[str, Any]], nn.Module], attempts: Sequence[tuple[Mapping[str, Any], tuple[int, ...]]]
) -> Subject:
    """The model with the first options and input shape that work, else with the last ones."""
    options, shape = next((attempt for attempt in attempts[:-1] if _runs(make, *attempt)), attempts[-1])
    return Subject(make(options), lambda samples: torch.randn(samples, *shape))


def _runs(make: Callable[[Mapping[str, Any]], nn.Module], options: Mapping[str, Any], shape: Sequence[int]) -> bool:
    def attempt(device: str) -> None:
        with torch.device(device), torch.no_grad():
            make(options).eval()(torch.zeros(2, *shape))

    try:
        try:
            attempt("meta")
        except NotImplementedError:  # it computes its widths with tensors
            attempt("cpu")
    except Exception:  # noqa: BLE001 - architectures refuse sizes and options in every possible way
        return False
    return True
