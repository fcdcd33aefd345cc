"""What large models would cost follows from what the engine counts for smaller ones."""

import pytest
import torch

import balf_fx
from balf_fx.engine.blockwise import _sizes
from balf_fx.graph.blocks import weight_bytes


@pytest.fixture
def large(load_benchmark):
    pytest.importorskip("transformers")
    return load_benchmark("large")


@pytest.mark.parametrize("key_value_heads", [4, 1])
def test_statistics_and_weights_are_those_that_the_engine_counts(large, key_value_heads):
    shape = large.Shape(width=16, hidden=40, layers=2, heads=4, key_value_heads=key_value_heads, words=50)
    model = large.build(shape, None, torch.device("cpu"))
    prepared = balf_fx.prepare(model, {"input_ids": torch.zeros(2, 5, dtype=torch.int64)})
    counted, weights = sum(_sizes(prepared).values()), sum(weight_bytes(prepared).values())
    assert counted - weights == shape.statistics
    norms = 2 * (2 * shape.layers + 1) * shape.width
    assert sum(parameter.nbytes for parameter in model.parameters()) == shape.weights + norms


def test_a_measured_model_costs_on_paper_what_it_has_cost(large):
    stages = {"capturing": 2.0, "calibrating": 3.0, "scoring": 5.0, "trying allocations": 1.0, "compressing": 7.0}
    rows = large.on_paper({"shape": "1B", "stages": stages, "seconds": 18.0})
    hours = {row["shape"]: row["hours"] for row in rows}
    assert hours["1B"] == pytest.approx(18 / 3600)
    assert hours["100M"] < hours["1B"] < hours["7B"] < hours["70B"]
    ratio = large.SHAPES["7B"].operations("scoring") / large.SHAPES["1B"].operations("scoring")
    only = large.on_paper({"shape": "1B", "stages": {"scoring": 3600.0}, "seconds": 3600.0})
    assert only[2]["hours"] == pytest.approx(ratio)


@pytest.mark.parametrize(("name", "billions"), [("100M", 0.1), ("1B", 1.1), ("7B", 6.74), ("70B", 69.0)])
def test_shapes_are_those_of_the_models(large, name, billions):
    assert large.SHAPES[name].weights / 2e9 == pytest.approx(billions, rel=0.02)
