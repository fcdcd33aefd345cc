"""Models for the command line: by name from a library, from a folder, or from a user's function."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from balf_fx.calibration.batches import MODEL_ERRORS
from balf_fx.cli.data import Preprocessing
from balf_fx.errors import MissingExtraError, ModelError, OptionError

SPECIFICATION = "torchvision:NAME, timm:NAME, hf:FOLDER_OR_NAME or MODULE:FACTORY"


def load_model(specification: str, weights: Path | None = None, pretrained: bool = False) -> nn.Module:
    """Load a model in evaluation mode.

    Args:
        specification: "torchvision:resnet18", "timm:vit_tiny_patch16_224", "hf:" followed by an argument of
            transformers' `from_pretrained`, or "module:factory", a function without arguments in the user's module.
        weights: a state dict as .safetensors or written by `torch.save`.
        pretrained: whether torchvision or timm download pretrained weights; transformers always does.

    Raises:
        OptionError: there is no such source or name.
        ModelError: the model cannot be built, or the weights do not fit it.
        MissingExtraError: the library is not installed.
    """
    source, separator, name = specification.partition(":")
    if not (source and separator and name):
        raise OptionError(f"a model must be given as {SPECIFICATION}, not {specification!r}")
    if pretrained and weights is not None:
        raise OptionError("weights come either from a file or from the library: drop one of them")
    if source == "hf":
        model = _from_transformers(name, with_weights=weights is None)
    elif source in _LIBRARIES:
        model = _LIBRARIES[source](name, pretrained)
    elif pretrained:
        raise OptionError(f"only torchvision and timm have pretrained weights: {specification} must load its own")
    else:
        model = _from_factory(source, name)
    if weights is not None:
        _load_weights(model, weights)
    return model.eval()


def needs_weights(specification: str) -> bool:
    """Whether the source returns a model with random weights by default."""
    return specification.partition(":")[0] in _LIBRARIES


def default_preprocessing(specification: str, model: nn.Module) -> Preprocessing:
    """The preprocessing of the model's library; that of ImageNet without resizing if the library has none."""
    source, _, name = specification.partition(":")
    if source == "timm":
        return _timm_preprocessing(model)
    if source == "torchvision":
        return _torchvision_preprocessing(name)
    if source == "hf":
        return _transformers_preprocessing(name, model)
    return Preprocessing()


def library(name: str, extra: str) -> Any:
    """A library that an extra installs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f'this model needs {name}: pip install "balf-fx[{extra}]"') from error


def _from_torchvision(name: str, pretrained: bool) -> nn.Module:
    models = library("torchvision", "cli").models
    try:
        model: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None)
    except ValueError as error:
        raise OptionError(f"torchvision: {error}; torchvision.models.list_models() lists them") from error
    except OSError as error:
        raise ModelError(
            f"torchvision cannot download the weights of {name}: {error}. Pass a file as --weights"
        ) from error
    return model


def _from_timm(name: str, pretrained: bool) -> nn.Module:
    timm = library("timm", "cli")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
    except (RuntimeError, ValueError) as error:
        raise OptionError(f"timm: {error}; timm.list_models() lists them") from error
    except OSError as error:
        raise ModelError(f"timm cannot download the weights of {name}: {error}. Pass a file as --weights") from error
    return model


_LIBRARIES: dict[str, Callable[[str, bool], nn.Module]] = {"torchvision": _from_torchvision, "timm": _from_timm}


def _from_transformers(name: str, with_weights: bool) -> nn.Module:
    """Load the class that the configuration names, whose head is the one that the weights were trained with."""
    transformers = library("transformers", "llm")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        names = config.architectures or []
        classes = [getattr(transformers, each) for each in names if hasattr(transformers, each)]
        if with_weights:
            model: nn.Module = (classes[0] if classes else transformers.AutoModel).from_pretrained(name)
        else:
            model = classes[0](config) if classes else transformers.AutoModel.from_config(config)
    except (OSError, ValueError) as error:
        raise ModelError(f"transformers cannot load {name}: {error}") from error
    return model


def _from_factory(module: str, name: str) -> nn.Module:
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, OSError) as error:
        raise OptionError(f"cannot import {module}:{name}: {error}. A model must be {SPECIFICATION}") from error
    try:
        model = found()
    except (*MODEL_ERRORS, OSError, ImportError) as error:
        raise ModelError(f"{module}:{name}() failed, {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{module}:{name}() returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _load_weights(model: nn.Module, path: Path) -> None:
    state = _read_weights(path)
    torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")  # of nn.DataParallel
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{path} does not fit the model: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict, also one that a training script stored under "state_dict" among other entries."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise ModelError(f"cannot read weights from {path}: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path} contains no state dict: save one with torch.save(model.state_dict(), path)")
    return state


def _timm_preprocessing(model: nn.Module) -> Preprocessing:
    found = library("timm", "cli").data.resolve_model_data_config(model)
    size = found["input_size"][-1]
    return Preprocessing(
        size, int(size / found["crop_pct"]), tuple(found["mean"]), tuple(found["std"]), found["interpolation"]
    )


def _torchvision_preprocessing(name: str) -> Preprocessing:
    found = library("torchvision", "cli").models.get_model_weights(name).DEFAULT.transforms()
    if not all(hasattr(found, key) for key in ("crop_size", "resize_size", "mean", "std", "interpolation")):
        return Preprocessing()  # segmentation and video have others
    (size,), (resize,) = found.crop_size, found.resize_size
    return Preprocessing(size, resize, tuple(found.mean), tuple(found.std), found.interpolation.value)


def _transformers_preprocessing(name: str, model: nn.Module) -> Preprocessing:
    transformers = library("transformers", "llm")
    size = getattr(model.config, "image_size", None)
    try:
        found = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):  # the folder has none
        return Preprocessing(size, size)
    mean, std = (getattr(found, key, None) or getattr(Preprocessing, key[6:]) for key in ("image_mean", "image_std"))
    return Preprocessing(size, size, tuple(mean), tuple(std))
