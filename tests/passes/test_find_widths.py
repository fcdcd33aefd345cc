import dataclasses

import pytest
from architectures import CHANNELS, EVERYTHING, make

import balf_fx
from balf_fx.graph.annotation import graph_record
from balf_fx.passes import FindWidths
from balf_fx.widths.channels import find_channels


def widths_of(name, capture):
    model, batches = make(name)
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity", capture=capture)
    return graph_record(prepared).widths


@pytest.mark.parametrize(
    "name", [name for name in EVERYTHING if "multihead" not in name]
)  # which is not exported whole
def test_other_graphs_of_a_model_have_the_same_widths(name):
    traced, exported = (widths_of(name, capture) for capture in ("symbolic_trace", "export"))
    assert {width.key: set(width.layer_names) for width in traced} == {
        width.key: set(width.layer_names) for width in exported
    }


def test_layers_go_by_their_own_names():
    model, batches = make("inverted residual")
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    width = next(width for width in graph_record(prepared).widths if width.name == "block.4")
    assert width.key == "channels block.4"
    assert width.layers == ("block_0", "block_4")
    assert width.layer_names == ("block.0", "block.4")


@pytest.mark.parametrize("name", CHANNELS)
def test_names_that_recur_are_numbered(name, monkeypatch):
    model, batches = make(name)
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    once = list(find_channels(prepared))
    monkeypatch.setattr("balf_fx.passes.find_widths.find_heads", find_channels)
    monkeypatch.setattr("balf_fx.passes.find_widths._JOINED", 2 * len(once))
    FindWidths()(prepared)
    found = graph_record(prepared).widths
    assert [width.name for width in found] == [w.name for w in once] + [f"{w.name} 2" for w in once]
    assert len({width.key for width in found}) == len(found)
    assert [dataclasses.replace(width, name="", layer_names=()) for width in found] == [
        dataclasses.replace(width, name="") for width in (*once, *once)
    ]
