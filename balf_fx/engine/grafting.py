"""Puts compressed layers back into a copy of the user's model, which then is called as the model is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from balf_fx.calibration.batches import MODEL_ERRORS, Forward, run_batch
from balf_fx.capture.checks import close
from balf_fx.capture.models import copy_model
from balf_fx.errors import CalibrationError, GraftError, PlanError
from balf_fx.graph.annotation import graph_record
from balf_fx.graph.caches import NarrowCache, takes_cache
from balf_fx.graph.curves import Solution
from balf_fx.graph.layers import layers_of
from balf_fx.graph.owners import children_after_norm
from balf_fx.graph.parameters import get_tensor, grouped_bias, grouped_weight, put
from balf_fx.graph.plan import PLAN_ATTRIBUTE, Plan
from balf_fx.graph.replacements import Recipe, blank_parameter, describe, parameter_recipe, replacement, skeleton
from balf_fx.graph.substitute import build

_TIES = ("_tied_weights_keys", "all_tied_weights_keys")


def graft(model: nn.Module, graph_module: fx.GraphModule, plan: Plan) -> tuple[nn.Module, dict[str, Recipe]]:
    """A copy of the model with the layers of its compressed graph, and what was put where, now and earlier.

    Args:
        graph_module: with its records; its layers are used, not copied.
    """
    copied = copy_model(model)
    found = dict(_replacements(copied, graph_module))
    put_all(copied, {path: module for path, (_, module) in found.items()})
    constants = dict(_narrow_constants(copied, graph_module))
    caches = dict(_caches(copied, graph_module, plan))
    _narrow_caches(copied, caches)
    earlier = Plan.of(model).modules if hasattr(model, PLAN_ATTRIBUTE) else None
    return copied, {**(earlier or {}), **{path: recipe for path, (recipe, _) in found.items()}, **constants, **caches}


def rebuild(model: nn.Module, recipes: Mapping[str, Recipe]) -> None:
    """Put modules with arbitrary weights in place of those of the model, one after another.

    Raises:
        PlanError: the model has another architecture.
    """
    for path, recipe in recipes.items():
        if recipe.form == "cache":
            continue
        try:
            if recipe.form == "parameter":
                put(model, path, blank_parameter(recipe, get_tensor(model, path)))
                continue
            old = model.get_submodule(path)
        except AttributeError as error:
            raise PlanError(f"the model has another architecture: there is no {path!r}") from error
        put_all(model, {path: skeleton(recipe, old)})
    _narrow_caches(model, {path: recipe for path, recipe in recipes.items() if recipe.form == "cache"})


def _narrow_constants(model: nn.Module, graph_module: fx.GraphModule) -> Iterator[tuple[str, Recipe]]:
    """Put the parameters that have changed in place of the model's own; the recipes of narrower ones by path."""
    for path in graph_record(graph_module).constants:
        old, new = get_tensor(model, path), get_tensor(graph_module, path)
        put(model, path, new)
        if new.shape != old.shape:  # others are read by their names, like all tensors of the model
            yield path, parameter_recipe(old, new)


def _caches(model: nn.Module, graph_module: fx.GraphModule, plan: Plan) -> Iterator[tuple[str, Recipe]]:
    """The attention whose heads have become narrower, and the features that its cache needs."""
    layouts = graph_record(graph_module).layouts
    sizes: dict[str, dict[str, int]] = defaultdict(dict)
    for width in plan.widths:
        parents = {layouts[name].path.rpartition(".")[0] for name in width.layers if name in layouts}
        if width.kind != "channels" and width.is_narrower and len(parents) == 1:
            sizes[parents.pop()][width.kind] = width.size
    for path, found in sizes.items():
        if path and takes_cache(model.get_submodule(path)):
            yield path, Recipe("cache", ranks=(found.get("queries"), found.get("values")))


def _narrow_caches(model: nn.Module, recipes: Mapping[str, Recipe]) -> None:
    for path, recipe in recipes.items():
        keys, values = recipe.ranks
        model.get_submodule(path).register_forward_pre_hook(NarrowCache(keys, values), with_kwargs=True)


def put_all(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in place of others, under all of their names, and in lists and dictionaries of the model's code."""
    old = {path: model.get_submodule(path) for path in modules}
    new = {id(old[path]): module.train(old[path].training) for path, module in modules.items()}
    for holder in list(model.modules()):
        for held in vars(holder).values():  # registered modules are in a dictionary, too
            if isinstance(held, list | dict):
                for key, value in list(held.items() if isinstance(held, dict) else enumerate(held)):
                    if id(value) in new:
                        held[key] = new[id(value)]
        if isinstance(holder, nn.TransformerEncoderLayer):
            _call_layers(holder)
    _untie(model, set(modules))


def _call_layers(encoder: nn.TransformerEncoderLayer) -> None:
    """Let an encoder layer call the factors in it, not its fast path, which reads the weights of its layers."""
    if not all(type(layer) is nn.Linear for layer in (encoder.linear1, encoder.linear2)):
        encoder.activation_relu_or_gelu = 0  # as for activations that the fast path does not know


def _untie(model: nn.Module, replaced: set[str]) -> None:
    """Let transformers no longer tie the weight of a layer that was replaced, in this model alone."""
    for path, module in model.named_modules():
        own = {name.removeprefix(f"{path}." if path else "") for name in replaced}
        for name in _TIES:
            ties = getattr(module, name, None)
            if isinstance(ties, dict) and any(key.rpartition(".")[0] in own for key in ties):
                setattr(module, name, {key: ties[key] for key in ties if key.rpartition(".")[0] not in own})


def _replacements(model: nn.Module, graph_module: fx.GraphModule) -> Iterator[tuple[str, tuple[Recipe, nn.Module]]]:
    record = graph_record(graph_module)
    done = set()
    for replaced in record.replaced:
        layout = record.layouts[replaced.name]
        done.add(layout.path)
        holder = graph_module.get_submodule(replaced.name)
        yield layout.path, replacement(holder, replaced, layout, model.get_submodule(layout.path))
    names = {layout.path: name for name, layout in record.layouts.items()}
    layers = layers_of(graph_module)
    for norm, path in record.folded.items():
        old = model.get_submodule(norm)
        children = children_after_norm(old)
        left = Recipe("children", children=children) if children else Recipe("identity")
        yield norm, (left, skeleton(left, old))
        if path not in done:
            site, _ = layers[names[path]]
            solution = Solution(None, grouped_weight(graph_module, site), grouped_bias(graph_module, site))
            module = build(graph_module, site, [solution]).module
            yield path, (Recipe("layer", (describe(module),)), module)


def check_same(grafted: nn.Module, graph_module: fx.GraphModule, batch: Any, forward: Forward) -> None:
    """Check that a model computes what the graph does from which its layers came.

    Raises:
        GraftError: it cannot run the batch, or returns something else.
    """
    cure = "; result='graph' returns the graph, and exclude= leaves layers as they are"
    try:
        got = run_batch(grafted, batch, forward, 0)
    except CalibrationError as error:
        raise GraftError(f"the model does not run with the compressed layers: {error}{cure}") from error
    same = _same(run_batch(graph_module, batch, forward, 0), got)
    if not same and not _same_in_doubles(grafted, graph_module, batch, forward):
        raise GraftError(f"the model with the compressed layers computes something else than their graph{cure}")


def _same(wanted: Any, got: Any) -> bool:
    """Whether the tensors among two outputs differ by no more than rounding does."""
    pairs = zip(pytree.tree_leaves(wanted), pytree.tree_leaves(got), strict=False)
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(want.shape == given.shape and close(want, given) for want, given in tensors)


def _same_in_doubles(grafted: nn.Module, graph_module: fx.GraphModule, batch: Any, forward: Forward) -> bool:
    """Whether only rounding differs, which a threshold in a model may amplify; False if float64 cannot tell."""
    exact = pytree.tree_map_only(Tensor, lambda value: value.double() if value.is_floating_point() else value, batch)
    try:
        wanted, got = (run_batch(copy_model(each).double(), exact, forward, 0) for each in (graph_module, grafted))
    except (*MODEL_ERRORS, CalibrationError):
        return False
    return _same(wanted, got)
