"""Recipes describe the modules that replace layers: what they build holds the same tensors and computes the same."""

import dataclasses
import json

import pytest
import torch
from architectures import make
from torch import nn

import balf_fx
from balf_fx.errors import PlanError
from balf_fx.graph.replacements import Recipe, Replacement, describe, skeleton


@pytest.mark.parametrize("name", ["fused", "convs", "grouped", "inverted residual"])
def test_recipes_survive_json_and_build_what_they_describe(name):
    model, batches = make(name)
    small = balf_fx.compile(model, batches, flops=0.6, effort="balanced", progress=False, result="module")
    for path, recipe in balf_fx.plan(small).modules.items():
        again = Recipe.from_dict(json.loads(json.dumps(dataclasses.asdict(recipe))))
        assert dataclasses.asdict(again) == dataclasses.asdict(recipe)
        module = small.get_submodule(path)
        built = skeleton(again, model.get_submodule(path))
        assert type(built) is type(module)
        built.load_state_dict(module.state_dict())
        assert str(built) == str(module)


def test_places_and_zeros_by_hand():
    """y = x[reads] W^T, with its two values at places 3 and 1 of four."""
    layer = nn.Linear(2, 2, bias=False)
    recipe = Recipe("dense", (describe(layer),), values=2, outputs=4, reads=2, places=True)
    module = Replacement(recipe, [layer], torch.tensor([2, 0]), torch.tensor([2, 1, 2, 0]))
    x = torch.randn(5, 3)
    value = x[:, [2, 0]] @ layer.weight.T
    zero = torch.zeros(5)
    torch.testing.assert_close(module(x), torch.stack([zero, value[:, 1], zero, value[:, 0]], 1))


def test_layers_of_other_classes_are_refused():
    recipe = Recipe("layer", ({**describe(nn.Linear(2, 2)), "class": "Bilinear"},))
    with pytest.raises(PlanError, match="no layer of class 'Bilinear'"):
        skeleton(recipe, nn.Linear(2, 2))
