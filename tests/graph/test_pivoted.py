"""The modules of maps that are written with their own rows or columns, for every kind of site."""

import copy
import dataclasses

import pytest
import torch
from torch import fx, nn

from balf_fx.graph.annotation import annotation, sites
from balf_fx.graph.curves import Solution
from balf_fx.graph.flops import flop_counter, profile
from balf_fx.graph.parameters import count_parameters
from balf_fx.graph.substitute import build, replace_site
from balf_fx.passes import Annotate
from balf_fx.ranks.costs import rank_flops, rank_params
from balf_fx.ranks.pivots import pivot_rows, written_as_columns, written_as_rows

LAYERS = {
    "linear": (lambda: nn.Linear(30, 26), (4, 30), 20),
    "linear, wide": (lambda: nn.Linear(24, 60, bias=False), (2, 5, 24), 23),
    "linear, narrow": (lambda: nn.Linear(60, 24), (2, 5, 60), 21),
    "conv1d": (lambda: nn.Conv1d(24, 26, 3, padding=1), (2, 24, 9), 23),
    "conv2d": (lambda: nn.Conv2d(8, 48, 3, stride=2, padding=1), (2, 8, 9, 9), 33),
    "conv2d, pointwise, strided": (lambda: nn.Conv2d(32, 40, 1, stride=2), (2, 32, 6, 6), 29),
    "conv2d, groups": (lambda: nn.Conv2d(60, 64, 3, groups=2), (2, 60, 5, 5), 26),
    "conv3d": (lambda: nn.Conv3d(32, 32, (1, 2, 1)), (1, 32, 3, 4, 3), 26),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(24, 32, 2, stride=2), (2, 24, 5, 5), 26),
    "conv_transpose1d, groups": (lambda: nn.ConvTranspose1d(64, 60, 3, groups=2), (2, 64, 7), 25),
}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def annotated(layer, x):
    graph_module = fx.symbolic_trace(nn.Sequential(layer).double().eval())
    profile(graph_module, [x])
    Annotate()(graph_module)
    [(own, nodes)] = sites(graph_module).items()
    return graph_module, own, nodes


def replaced(graph_module, solution):
    copied = copy.deepcopy(graph_module)
    [(own, nodes)] = sites(copied).items()
    replace_site(copied, nodes, own, build(copied, own, solution))
    copied.graph.lint()
    copied.recompile()
    return copied


def counted(model, x):
    with torch.no_grad(), flop_counter() as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_the_pair_at_the_price_that_was_counted(name, biased):
    make, shape, rank = LAYERS[name]
    x = randn(*shape)
    graph_module, own, nodes = annotated(make(), x)
    left, right = (
        randn(own.groups, own.out_features, rank, seed=1),
        randn(own.groups, rank, own.in_features, seed=2),
    )
    pair = Solution(left, right, randn(own.groups, own.out_features, seed=3) if biased else None)
    rows = written_as_rows(pair, torch.stack([pivot_rows(factor) for factor in left]))
    small, plain = replaced(graph_module, (rows,)), replaced(graph_module, (pair,))
    torch.testing.assert_close(small(x), plain(x), rtol=1e-9, atol=1e-9)
    dense = annotation(nodes[0])
    priced = dataclasses.replace(own, pivots="rows", move=0, bias="0.bias" if biased else None)
    assert counted(small, x) == rank_flops(priced, rank, dense.flops, graph_module(x).numel())
    assert count_parameters(small) == rank_params(priced, rank, biased)
    assert counted(small, x) < counted(plain, x)
    layers = [module for module in small.modules() if not list(module.children())]
    assert {type(layer).__module__.split(".")[:2][1] for layer in layers} == {"nn"}


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: nn.Linear(40, 30), (3, 40)), (lambda: nn.Conv2d(40, 30, 1), (2, 40, 5, 5))]
)
def test_columns_are_the_pair_at_the_price_that_was_counted(make, shape, ordered):
    x = randn(*shape)
    graph_module, own, nodes = annotated(make(), x)
    left, right = randn(1, 30, 22, seed=1), randn(1, 22, 40, seed=2)
    pair = Solution(left, right, randn(1, 30, seed=3))
    order = pivot_rows(right[0].mT)
    seen = x
    if ordered:
        columns = written_as_columns(pair, order[None])
    else:  # the graph has the features in this order
        columns = written_as_columns(dataclasses.replace(pair, right=right[..., order]), None)
        seen = x.index_select(1, order)
    small, plain = replaced(graph_module, (columns,)), replaced(graph_module, (pair,))
    torch.testing.assert_close(small(seen), plain(x), rtol=1e-9, atol=1e-9)
    priced = dataclasses.replace(own, pivots="columns", move=0)
    assert counted(small, seen) == rank_flops(priced, 22, annotation(nodes[0]).flops, plain(x).numel())
    assert count_parameters(small) == rank_params(priced, 22, True) == 22 * (70 - 22) + 30


def test_few_pivots_of_a_convolution_take_more_time_than_they_save():
    _, conv, _ = annotated(nn.Conv2d(96, 48, 1), randn(1, 96, 4, 4))
    _, linear, _ = annotated(nn.Linear(96, 48), randn(4, 96))
    conv, linear = (dataclasses.replace(own, pivots="columns") for own in (conv, linear))
    assert [conv.form(rank) for rank in (1, 31, 32, 48)] == ["pair", "pair", "columns", "columns"]
    assert linear.form(1) == dataclasses.replace(conv, move=0).form(1) == "columns"


@pytest.mark.parametrize("ranks", [(9, 11, 14), (9, None, 14), (None, None, 3)])
def test_parts_have_pivots_of_their_own(ranks):
    x = randn(4, 20)
    graph_module, own, nodes = annotated(nn.Linear(20, 45), x)
    pairs, written = [], []
    for index, rank in enumerate(ranks):
        bias = randn(1, 15, seed=index)
        if rank is None:
            pairs.append(Solution(None, randn(1, 15, 20, seed=index), bias))
            written.append(pairs[-1])
            continue
        pairs.append(Solution(randn(1, 15, rank, seed=index), randn(1, rank, 20, seed=index + 9), bias))
        written.append(written_as_rows(pairs[-1], pivot_rows(pairs[-1].left[0])[None]))
    small, plain = replaced(graph_module, tuple(written)), replaced(graph_module, tuple(pairs))
    torch.testing.assert_close(small(x), plain(x), rtol=1e-9, atol=1e-9)
    priced = dataclasses.replace(own, pivots="rows", move=0, parts=3)
    assert counted(small, x) == rank_flops(priced, ranks, annotation(nodes[0]).flops, plain(x).numel())
    assert count_parameters(small) == rank_params(priced, ranks, True)


@pytest.mark.parametrize("heads", [[[4, 5, 6, 7], [8, 9, 10, 11]], [[0, 1, 2], [9, 10, 11]], [list(range(12))]])
def test_identity_blocks_are_left_out(heads):
    x = randn(2, 3, 16)
    graph_module, _, _ = annotated(nn.Linear(16, 12), x)
    rows = torch.tensor(heads)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    weight, bias = randn(12, 16, seed=1), randn(1, 12, seed=2)
    size = rows.shape[1]
    for head in heads:
        weight[torch.tensor(head)[:, None], order[:size]] = torch.eye(size, dtype=torch.float64)
    whole = Solution(None, weight[None], bias)
    blocks = dataclasses.replace(whole, form="blocks", order=order[None], blocks=(rows,))
    small, plain = replaced(graph_module, (blocks,)), replaced(graph_module, (whole,))
    torch.testing.assert_close(small(x), plain(x), rtol=1e-12, atol=1e-12)
    assert count_parameters(plain) - count_parameters(small) == len(heads) * size**2
    assert counted(plain, x) - counted(small, x) == 2 * 6 * len(heads) * size**2
