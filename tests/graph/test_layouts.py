"""Pointwise convolutions that are computed with the features last, among operations that depend on memory."""

import pytest
import torch
from torch import fx, nn

import balf_fx
from balf_fx.graph.flops import profile
from balf_fx.graph.layouts import allow_any_layout, depends_on_layout


class Viewed(nn.Module):
    """A view of what a pointwise convolution returns, and the value itself."""

    def __init__(self, method="view"):
        super().__init__()
        self.up, self.down = nn.Conv2d(24, 96, 1), nn.Conv2d(96, 24, 1)
        self.head = nn.Linear(24 * 36, 10)
        self.method = method

    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        flat = y.view(y.shape[0], -1) if self.method == "view" else torch.flatten(y, 1)
        return self.head(flat), torch.sigmoid(y)


class ViewedInPlace(Viewed):
    """Changes a value through a view of it."""

    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        y.view(y.shape[0], -1).mul_(0.5)
        return self.head(y.flatten(1))


def batches():
    return list(torch.randn(3, 16, 24, 6, 6, generator=torch.Generator().manual_seed(0)))


def compiled(model, **options):
    return balf_fx.compile(model.eval(), batches(), progress=False, **{"params": 0.7, "effort": "fast", **options})


@pytest.mark.usefixtures("any_pivots")
@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("method", ["view", "flatten"])
def test_views_and_outputs_are_as_without_pivots(method, capture):
    model = Viewed(method)
    options = {"params": None, "allocation": {"down": 18}, "capture": capture}
    small, pairs = compiled(model, **options), compiled(model, **options, pivot=False)
    assert {layer.name: layer.form for layer in balf_fx.plan(small).layers} == {"down": "columns", "up": "pair"}
    for got, want in zip(small(batches()[0]), pairs(batches()[0]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert got.is_contiguous()
    assert small(torch.randn(5, 24, 6, 6))[1].shape == (5, 24, 6, 6)


def test_the_same_function_in_both_orders_of_memory():
    model = Viewed().double()
    values = [batch.double() for batch in batches()]
    small = balf_fx.compile(model.eval(), values, params=0.7, effort="fast", progress=False)
    followed = balf_fx.compile(model, values, allocation=balf_fx.plan(small), effort="fast", progress=False)
    last = small(values[0].contiguous(memory_format=torch.channels_last))
    for got, want in zip(last, followed(values[0]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_a_value_that_is_changed_through_a_view_keeps_its_convolution(capture):
    model = ViewedInPlace()
    small = compiled(model, capture=capture)
    exact = compiled(model, params=1.0, capture=capture)
    torch.testing.assert_close(exact(batches()[0]), model(batches()[0]), rtol=1e-4, atol=1e-5)
    assert small(batches()[0]).shape == (16, 10)


def test_a_saved_model_is_loaded_with_its_layout(tmp_path):
    model = Viewed().eval()
    small = compiled(model)
    balf_fx.save(small, tmp_path / "small.safetensors")
    loaded = balf_fx.load(tmp_path / "small.safetensors", model)
    for got, want in zip(loaded(batches()[0]), small(batches()[0]), strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()


def test_a_module_returns_what_its_graph_does():
    model = Viewed().eval()
    graph, module = compiled(model), compiled(model, result="module")
    assert isinstance(module, Viewed)
    assert module(batches()[0])[1].is_contiguous()
    assert {layer.form for layer in balf_fx.plan(graph).layers} == {layer.form for layer in balf_fx.plan(module).layers}


def traced(function, *inputs):
    graph_module = fx.symbolic_trace(function)
    profile(graph_module, list(inputs))
    return graph_module


def test_what_changes_a_view_in_place_depends_on_the_layout():
    x = torch.randn(2, 3, 4)
    assert depends_on_layout(traced(lambda x: x.relu().view(2, 12).add_(1), x))
    assert depends_on_layout(traced(lambda x: x.relu().view(2, 12)[:, 0].add_(1), x))
    assert not depends_on_layout(traced(lambda x: x.relu().add_(1).view(2, 12), x))
    assert not depends_on_layout(traced(lambda x: x.relu().view(2, 12) + 1, x))


def test_views_become_reshapes_and_types_stay():
    graph_module = traced(
        lambda x: (x.transpose(1, 2).relu(), x.view(torch.int32), x.view(2, 12)), torch.randn(2, 3, 4)
    )
    allow_any_layout(graph_module)
    graph_module.recompile()
    value = torch.randn(2, 4, 3).transpose(1, 2)
    transposed, bits, flat = graph_module(value)
    assert bits.dtype is torch.int32
    assert torch.equal(flat, value.reshape(2, 12))
    assert transposed.is_contiguous()


@pytest.mark.usefixtures("any_pivots")
def test_operations_that_read_strides_get_the_usual_order():
    class Complex(Viewed):
        def forward(self, x):
            y = self.down(torch.relu(self.up(x)))
            pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)))
            return self.head(pairs.abs().repeat(1, 1, 1, 2).flatten(1)), y.view(torch.int32)

    small = compiled(Complex())
    assert "columns" in {layer.form for layer in balf_fx.plan(small).layers}
    small(batches()[0])
