"""A walk over blocks computes what the graph does, and keeps no more between blocks than it may."""

import contextlib
import weakref

import pytest
import torch
from architectures import make
from torch import nn
from torch.nn import functional as F

from balf_fx.capture.normal_form import capture
from balf_fx.engine import walking
from balf_fx.engine.walking import walk, walk_backward
from balf_fx.graph.blocks import find_blocks, weight_bytes


class Skips(nn.Module):
    """The first value is read by every layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])

    def forward(self, x):
        y = x
        for layer in self.layers:
            y = F.relu(layer(y) + x)
        return {"last": y, "sum": y.sum(-1)}


MODELS = {"skips": lambda: (Skips().eval(), list(torch.randn(5, 3, 6))), "attention": lambda: make("fused", count=4)}


@pytest.fixture
def shelves(monkeypatch):
    """All shelves of a walk."""
    found, plain = [], walking.Shelved

    def shelved(memory):
        found.append(plain(memory))
        return found[-1]

    monkeypatch.setattr(walking, "Shelved", shelved)
    return found


@pytest.mark.parametrize("memory", [0, 2000, 10**9])
@pytest.mark.parametrize("name", MODELS)
def test_all_calls_have_the_outputs_of_the_graph(name, memory, shelves):
    model, batches = MODELS[name]()
    graph_module = capture(model, batches[0])
    blocks, done, most = find_blocks(graph_module, weight_bytes(graph_module), 0), [], []
    (name,) = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]

    def finish(index):
        done.append(blocks[index])
        most.append(sum(shelf.nbytes for shelf in shelves))

    calls = iter([{name: batch} for batch in batches])
    outputs = walk(graph_module, blocks, calls, memory, finish, lambda _: contextlib.nullcontext())
    for output, batch in zip(outputs, batches, strict=True):
        assert done == blocks[:-1]
        with torch.no_grad():
            torch.testing.assert_close(output, model(batch), rtol=0, atol=0)
    assert done == blocks
    assert len(blocks) > 4
    assert max(most) <= memory
    assert (max(most) > 0) == (memory > 0)
    assert most[-1] == 0


def test_what_no_later_block_reads_is_given_up(shelves):
    model, batches = MODELS["skips"]()
    graph_module = capture(model, batches[0])
    blocks = find_blocks(graph_module, weight_bytes(graph_module), 0)
    alive = []

    def finish(_):
        alive.append(len([shelf for shelf in shelves if len(shelf)]))

    calls = [{"x": batch} for batch in batches]
    for _ in walk(graph_module, blocks, calls, 10**9, finish, lambda _: contextlib.nullcontext()):
        pass
    assert max(alive) == 2  # the one with x, and the one before
    assert alive[-1] == 0


def test_outputs_are_computed_one_by_one():
    model, batches = MODELS["skips"]()
    graph_module = capture(model, batches[0])
    blocks, alive = find_blocks(graph_module, weight_bytes(graph_module), 0), []
    calls = [{"x": batch} for batch in batches]
    for output in walk(graph_module, blocks, calls, 10**9, lambda _: None, lambda _: contextlib.nullcontext()):
        alive.append(weakref.ref(output["last"]))
        assert [each() is not None for each in alive] == [False] * (len(alive) - 1) + [True]
        del output
    assert len(alive) == len(batches)


def test_each_call_runs_in_its_context():
    model, batches = make("mlp", count=3)
    graph_module = capture(model, batches[0])
    blocks, seen = find_blocks(graph_module, weight_bytes(graph_module), 0), []

    @contextlib.contextmanager
    def around(index):
        seen.append(index)
        yield

    for _ in walk(graph_module, blocks, ({"x": batch} for batch in batches), 0, lambda _: None, around):
        pass
    assert seen == [0, 1, 2] * len(blocks)


@pytest.mark.parametrize("memory", [0, 2000, 10**9])
@pytest.mark.parametrize("name", MODELS)
def test_back_through_the_blocks_gradients_are_those_of_the_graph(name, memory, shelves):
    model, batches = MODELS[name]()
    graph_module = capture(model, batches[0])
    blocks, most, done = find_blocks(graph_module, weight_bytes(graph_module), 0), [], []
    (name,) = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
    weights = dict(graph_module.named_parameters())
    for weight in weights.values():
        weight.requires_grad_(True)

    def loss(output):
        return sum(leaf.square().sum() for leaf in (output.values() if isinstance(output, dict) else [output]))

    found = [{key: torch.zeros(()) for key in weights} for _ in batches]

    @contextlib.contextmanager
    def around(block, call):
        assert block not in done
        taken = [(weight, lambda gradient, key=key: add(call, key, gradient)) for key, weight in weights.items()]
        yield lambda: taken

    def add(call, key, gradient):
        found[call][key] = found[call][key] + gradient

    def finish(index):
        done.append(blocks[index])
        most.append(sum(shelf.nbytes for shelf in shelves))

    calls = [{name: batch} for batch in batches]
    kept = {}
    for _ in walk(graph_module, blocks, calls, memory, lambda _: None, lambda _: contextlib.nullcontext(), kept):
        pass
    walk_backward(graph_module, blocks, kept, memory, finish, around, lambda _, output: loss(output))
    assert done == blocks[::-1]
    assert max(most) <= memory
    assert most[-1] == 0
    for own, batch in zip(found, batches, strict=True):
        wanted = torch.autograd.grad(loss(graph_module(batch)), list(weights.values()))
        torch.testing.assert_close(list(own.values()), list(wanted))
