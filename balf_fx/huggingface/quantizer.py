"""The method "balf" of transformers: layers are replaced before the weights of a folder are read.

`config.json` holds the plan, with what stands in place of which layers; the weights are plain safetensors. The model
that is returned is not a quantized one: it can be trained, cast and saved again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from balf_fx.engine.grafting import rebuild
from balf_fx.engine.rewriting import with_plan
from balf_fx.errors import FileError, PlanError
from balf_fx.graph.plan import Plan
from balf_fx.graph.replacements import Recipe

METHOD = "balf"


@register_quantization_config(METHOD)
class BalfConfig(QuantizationConfigMixin):
    """The entry of a compressed model in `config.json`.

    Attributes:
        plan: `Plan.to_dict`.
    """

    def __init__(self, plan: Mapping[str, Any] | None = None, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.plan = plan

    @classmethod
    def of(cls, plan: Plan) -> BalfConfig:
        """The entry for a plan, without the spectra of its layers, which only plots need."""
        choices = tuple(dataclasses.replace(choice, spectrum=None) for choice in plan.allocation.choices)
        allocation = dataclasses.replace(plan.allocation, choices=choices)
        return cls(dataclasses.replace(plan, allocation=allocation).to_dict())


@register_quantizer(METHOD)
class BalfQuantizer(HfQuantizer):
    """Builds the compressed layers of a folder."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        recipes = _recipes(model, self._plan())
        rebuild(model, recipes)
        _check_files(model, recipes, kwargs.get("checkpoint_files") or ())
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name in ("hf_quantizer", "quantization_method"):
            delattr(model, name)
        model.is_quantized = False
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._is_quantized = False
        plan = self._plan()
        plan = dataclasses.replace(plan, modules=_recipes(model, plan))
        model.config.quantization_config = BalfConfig.of(plan)
        return with_plan(model, plan)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _plan(self) -> Plan:
        plan = Plan.from_dict(getattr(self.quantization_config, "plan", None))
        if plan.modules is None:
            raise PlanError('config.json holds the plan of a graph: compress the model with result="module"')
        return plan


def _recipes(model: Any, plan: Plan) -> dict[str, Recipe]:
    """The recipes by the names that the modules have in a model of any class: with its head, another one, or without.

    Raises:
        PlanError: the model has none of the layers.
    """
    names, prefix = {name for name, _ in model.named_modules()}, f"{model.base_model_prefix}."
    found = {}
    for path, recipe in (plan.modules or {}).items():
        for name in (path, path.removeprefix(prefix), prefix + path):
            if name in names:
                found[name] = recipe
                break
    if plan.modules and not found:
        raise PlanError(
            f"{type(model).__name__} has none of the layers of the plan, such as {next(iter(plan.modules))}"
        )
    return found


def _check_files(model: Any, recipes: Mapping[str, Recipe], files: Iterable[str]) -> None:
    """Check that the files hold all tensors of the replaced layers, which transformers would draw at random.

    Raises:
        FileError: some are missing, or a file cannot be read.
    """
    found: Counter[str] = Counter()
    for path in files:
        if str(path).endswith(".safetensors"):
            try:
                with safe_open(path, "pt") as file:
                    found.update(map(_tail, file.keys()))
            except SafetensorError as error:
                raise FileError(f"{path} is truncated or not a safetensors file: {error}") from error
    names = (
        f"{path}.{name}"
        for path, recipe in recipes.items()
        if recipe.form != "cache"
        for name in model.get_submodule(path).state_dict()
    )
    missing = Counter(map(_tail, names)) - found
    if found and missing:
        raise FileError(f"the folder is not complete: there is no tensor {next(iter(missing))} for some of the layers")


def _tail(name: str) -> str:
    """The last words of a name; some classes of transformers read files with another start of it."""
    return ".".join(name.split(".")[-3:])
