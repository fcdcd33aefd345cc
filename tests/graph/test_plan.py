import copy
import dataclasses
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import balf_fx
from balf_fx.errors import OptionError, PassError, PlanError
from balf_fx.graph.fingerprint import Fingerprint
from balf_fx.graph.plan import Plan


def names_and_shapes(graph_module):
    return {name: value.shape for name, value in graph_module.state_dict().items()}


@pytest.fixture
def small(bottleneck, images):
    return balf_fx.compile(bottleneck, images, flops=0.5, progress=False)


def test_a_plan_tells_ranks_widths_and_versions(small):
    plan, report = Plan.of(small), balf_fx.report(small)
    assert plan.ranks == {row.name: row.rank for row in report.sites}
    assert plan.versions["torch"] == torch.__version__
    assert [width.size for width in plan.widths] == [row.features_after for row in report.widths]
    for width in plan.widths:
        assert list(width.kept) == sorted(set(width.kept))
        assert len(width.kept) == width.size
    replaced = {layer.name for layer in plan.layers}
    assert {row.name for row in report.sites if row.rank is not None} <= replaced
    for layer in plan.layers:
        assert isinstance(small.get_submodule(layer.name), nn.Sequential) == (layer.rank is not None)


def test_plans_survive_json_copies_and_pickles(small):
    plan = Plan.of(small)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.of(copy.deepcopy(small)) == plan
    assert Plan.of(pickle.loads(pickle.dumps(small))) == plan


def test_a_plan_is_followed_by_a_model_with_the_same_architecture(small, bottleneck, images):
    plan = Plan.from_json(Plan.of(small).to_json())
    again = balf_fx.compile(bottleneck, images, allocation=plan, progress=False)
    assert names_and_shapes(again) == names_and_shapes(small)
    for batch in images:
        torch.testing.assert_close(again(batch), small(batch))
    other = copy.deepcopy(bottleneck)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    assert names_and_shapes(balf_fx.compile(other, images, allocation=plan, progress=False)) == names_and_shapes(small)


def test_a_followed_plan_costs_what_it_says(small, bottleneck, images):
    plan = Plan.of(small)
    report = balf_fx.report(balf_fx.compile(bottleneck, images, allocation=plan, progress=False))
    counted = sum(parameter.numel() for parameter in small.parameters())
    assert report.params_after == counted == plan.params_after
    assert {row.name: row.rank for row in report.sites} == plan.ranks


def test_a_plan_that_does_not_fit_is_refused(small, bottleneck, conv_net, images):
    plan = Plan.of(small)
    with pytest.raises(PlanError, match="another model"):
        balf_fx.compile(conv_net, images, allocation=plan, progress=False)
    with pytest.raises(PlanError, match=r"for which there are no statistics here.*factors='sensitivity'"):
        balf_fx.compile(bottleneck, images, allocation=plan, effort="fast", progress=False)
    with pytest.raises(OptionError, match="cannot be combined with a budget: drop flops"):
        balf_fx.compile(bottleneck, images, allocation=plan, flops=0.5, progress=False)


@pytest.mark.parametrize("rank", [0, -1, 33, [4, 4], [None]])
def test_ranks_that_a_layer_cannot_have_are_refused(small, bottleneck, images, rank):
    data = Plan.of(small).to_dict()
    (choice,) = (choice for choice in data["allocation"]["choices"] if choice["site"]["name"] == "project")
    choice["chosen"]["rank"] = rank
    with pytest.raises(PlanError, match="for 'project', which is 32 x 64 x 1"):
        balf_fx.compile(bottleneck, images, allocation=Plan.from_dict(data), progress=False)


@pytest.mark.parametrize("size", [0, 65])
def test_sizes_that_a_width_cannot_have_are_refused(small, bottleneck, images, size):
    data = Plan.of(small).to_dict()
    data["widths"][0]["size"] = size
    with pytest.raises(PlanError, match=f"leaves {size} of 64 channels"):
        balf_fx.compile(bottleneck, images, allocation=Plan.from_dict(data), progress=False)


def test_a_file_that_is_no_text_is_no_plan(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(PlanError, match="not a plan of balf_fx"):
        balf_fx.plan(path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("flops",), "x"),
        (("allocation", "target"), "x"),
        (("allocation", "primal"), None),
        (("allocation", "choices", 0, "chosen", "flops"), None),
        (("widths", 0, "size"), 1.5),
    ],
    ids=str,
)
def test_values_of_other_types_are_damage(small, path, value):
    data = edited = json.loads(Plan.of(small).to_json())
    for key in path[:-1]:
        edited = edited[key]
    edited[path[-1]] = value
    with pytest.raises(PlanError, match=f"incomplete or damaged: TypeError {path[-1]} cannot be"):
        Plan.from_dict(data)


def test_what_is_no_plan_is_refused(small, conv_net):
    whole = Plan.of(small).to_dict()
    with pytest.raises(PlanError, match="no format"):
        Plan.from_dict({})
    with pytest.raises(PlanError, match="not a plan of balf_fx"):
        Plan.from_json("{")
    with pytest.raises(PlanError, match="format 99"):
        Plan.from_dict({**whole, "format": 99})
    for key in set(whole) - {"format"}:
        with pytest.raises(PlanError, match="incomplete or damaged"):
            Plan.from_dict({name: value for name, value in whole.items() if name != key})
    for damaged in (None, 3, [3], {"a": 1}):
        with pytest.raises(PlanError, match="incomplete or damaged"):
            Plan.from_dict({**whole, "layers": [damaged]})
    with pytest.raises(PassError, match="no plan"):
        Plan.of(conv_net)


def test_the_plan_is_readable(small):
    data = json.loads(Plan.of(small).to_json())
    assert list(data) == ["format", *(field.name for field in dataclasses.fields(Plan))]
    assert data["origin"]["arguments"]["positional"]["tuple"][0]["dtype"] == "float32"


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 100), st.floats(1e-3, 1e3))
def test_fingerprints_tell_weights_apart(rows, columns, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(rows, columns, generator=generator)
    one = Fingerprint.of(weight, None)
    assert one.matches(Fingerprint.of(weight.double() * (1 + 1e-7), None))
    assert not one.matches(Fingerprint.of(weight * 1.001, None))
    assert not one.matches(Fingerprint.of(weight, torch.ones(rows)))
    assert rows == columns or not one.matches(Fingerprint.of(weight.mT, None))
