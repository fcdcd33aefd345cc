"""The method "balf" of transformers: layers are replaced before the weights of a folder are read.

`config.json` holds the plan, with what stands in place of which layers, and a checksum of each tensor; the weights are
plain safetensors. The model that is returned is not a quantized one: it can be trained, cast and saved again. It keeps
its quantizer all the same, since transformers asks that for metadata when it writes a model.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from balf_fx.engine.grafting import rebuild
from balf_fx.engine.rewriting import with_plan
from balf_fx.errors import FileError, PlanError
from balf_fx.files.checksums import checksum
from balf_fx.graph.plan import Plan
from balf_fx.graph.replacements import Recipe
from balf_fx.huggingface.stock import adapt_configuration, missing_biases

METHOD = "balf"


@register_quantization_config(METHOD)
class BalfConfig(QuantizationConfigMixin):
    """The entry of a compressed model in `config.json`.

    transformers copies configurations in `forward`, and walks through the dictionaries in them; Dynamo traces that. So
    copies of the entry are the entry itself, and the plan, the largest part of it, stands in a list.

    Attributes:
        plan: `Plan.to_dict`, as the only item of a list.
        sha256: the checksums of the tensors that were written with it, by name.
    """

    def __init__(
        self, plan: list[Mapping[str, Any]] | None = None, sha256: Mapping[str, str] | None = None, **_: Any
    ) -> None:
        self.quant_method: Any = METHOD
        self.plan = plan
        self.sha256 = dict(sha256 or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> BalfConfig:
        return self  # nothing changes an entry

    def to_dict(self) -> dict[str, Any]:
        """The entry as it is written; its values are not copied."""
        return dict(vars(self))

    @classmethod
    def of(cls, plan: Plan) -> BalfConfig:
        """The entry for a plan, without the spectra of its layers, which only plots need."""
        choices = tuple(dataclasses.replace(choice, spectrum=None) for choice in plan.allocation.choices)
        allocation = dataclasses.replace(plan.allocation, choices=choices)
        return cls([dataclasses.replace(plan, allocation=allocation).to_dict()])


def describe(model: Any, plan: Plan) -> None:
    """Let transformers write the plan and checksums into the model's folder, unless it reads the folder without."""
    config = BalfConfig.of(plan)
    if not adapt_configuration(model, plan):
        model.config.quantization_config = config
    model.hf_quantizer = BalfQuantizer(config)


@register_quantizer(METHOD)
class BalfQuantizer(HfQuantizer):
    """Builds the compressed layers of a folder."""

    requires_calibration = True
    is_compileable = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        recipes, config = _recipes(model, self._plan()), self.quantization_config
        rebuild(model, recipes)
        _check_files(model, recipes, kwargs.get("checkpoint_files") or (), getattr(config, "sha256", {}))
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        del model.quantization_method
        model.is_quantized = False
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._is_quantized = False
        plan = self._plan()
        plan = dataclasses.replace(plan, modules=_recipes(model, plan))
        describe(model, plan)
        return with_plan(model, plan)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Store the checksums in the model's configuration, which transformers writes next."""
        given = _given_tensors()
        held = model.state_dict() if given is None else given
        biases = None if hasattr(model.config, "quantization_config") else missing_biases(model, model.config)
        if biases is not None:  # stock transformers reads the folder: it needs no plan, but some zeros perhaps
            return ({**held, **biases} if biases else given), {}
        config: Any = self.quantization_config
        model.config.quantization_config = BalfConfig(config.plan, _checksums(model, held))
        return given, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _plan(self) -> Plan:
        entry = getattr(self.quantization_config, "plan", None)
        plan = Plan.from_dict(entry[0] if isinstance(entry, list) and entry else entry)
        if plan.modules is None:
            raise PlanError('config.json holds the plan of a graph: compress the model with result="module"')
        return plan


def _recipes(model: Any, plan: Plan) -> dict[str, Recipe]:
    """The recipes by the names that the modules have in a model of any class: with its head, another one, or without.

    Raises:
        PlanError: the model has none of the layers.
    """
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    prefix = f"{model.base_model_prefix}."
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


def _given_tensors() -> dict[str, Tensor] | None:
    """The argument `state_dict` of save_pretrained, which asks a quantizer for tensors without passing on its own.

    Trainer passes one where the weights are distributed over processes.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "save_pretrained":
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("state_dict")


def _checksums(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The checksums of a model's tensors under the names that they may have in files.

    Some classes write their tensors in the form of an earlier version: under other names, or divided.
    """
    held = {
        name: value for name, value in tensors.items() if type(value.data) is Tensor and value.device.type != "meta"
    }
    found = {name: checksum({name: value}) for name, value in held.items()}
    for name, value in revert_weight_conversion(model, dict(held)).items():
        if value is not held.get(name):
            own = checksum({name: value})
            if found.setdefault(name, own) != own:
                del found[name]  # which of the two is written depends on an argument of save_pretrained
    return found


def _check_files(model: Any, recipes: Mapping[str, Recipe], files: Iterable[str], checksums: Mapping[str, str]) -> None:
    """Check that the files hold all tensors of the replaced layers, which transformers would draw at random, unchanged.

    Raises:
        FileError: some are missing or were changed, or a file cannot be read.
    """
    found: Counter[str] = Counter()
    for path in files:
        if str(path).endswith(".safetensors"):
            try:
                with safe_open(path, "pt") as file:
                    names = list(file.keys())
                    changed = [
                        name
                        for name in names
                        if name in checksums and checksum({name: file.get_tensor(name)}) != checksums[name]
                    ]
            except SafetensorError as error:
                raise FileError(f"{path} is truncated or not a safetensors file: {error}") from error
            if changed:
                raise FileError(
                    f"{path} has been changed since it was written: the checksum of {changed[0]} does not match"
                )
            found.update(map(_tail, names))
    paths = {path for path, recipe in recipes.items() if recipe.form != "cache"}
    held = {name: value for name, value in model.state_dict().items() if not paths.isdisjoint(_starts(name))}
    forms = (held, revert_weight_conversion(model, dict(held)))  # names as they are, or those of an earlier version
    missing = [Counter(map(_tail, names)) - found for names in forms]
    if found and all(missing):
        raise FileError(
            f"the folder is not complete: there is no tensor {next(iter(missing[0]))} for some of the layers"
        )


def _starts(name: str) -> Iterator[str]:
    """A name and the paths of all modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _tail(name: str) -> str:
    """The last words of a name; some classes of transformers read files with another start of it."""
    return ".".join(name.split(".")[-3:])
