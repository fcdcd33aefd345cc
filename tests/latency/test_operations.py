"""The operations of a site are checked against its price in FLOPs, which is that of the real modules."""

import dataclasses

import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.graph.annotation import sites
from balf_fx.graph.flops import flop_counter, flops_and_outputs
from balf_fx.latency.operations import Operation
from balf_fx.latency.uses import use_of
from balf_fx.ranks.costs import possible_ranks, rank_flops

LAYERS = {
    "linear": (nn.Linear(20, 14), (5, 20)),
    "linear, 4 dimensions": (nn.Linear(16, 19), (2, 3, 2, 16)),
    "conv1d": (nn.Conv1d(8, 6, 3, stride=2, padding=1), (2, 8, 11)),
    "conv2d, same, dilated": (nn.Conv2d(8, 9, 2, padding="same", dilation=3), (2, 8, 7, 7)),
    "conv2d, groups, strided": (nn.Conv2d(16, 24, 3, stride=2, groups=2, bias=False), (3, 16, 9, 8)),
    "conv2d, unbatched": (nn.Conv2d(8, 12, 3), (8, 6, 6)),
    "conv2d, pointwise": (nn.Conv2d(16, 16, 1), (2, 16, 5, 5)),
    "conv3d, groups": (nn.Conv3d(8, 8, (1, 2, 3), padding=(0, 1, 1), groups=2), (2, 8, 3, 4, 5)),
    "conv_transpose2d": (nn.ConvTranspose2d(12, 10, 3, stride=2, output_padding=1), (2, 12, 4, 5)),
    "conv_transpose1d, groups": (nn.ConvTranspose1d(12, 8, 4, stride=2, groups=2), (2, 12, 6)),
}


def counted(runs):
    """FLOPs of operations, which are run."""
    with torch.no_grad(), flop_counter() as counter:
        for run in runs:
            run.operation.task(run.inputs, run.outputs)()
    return counter.get_total_flops()


def found(layer, shape):
    graph = balf_fx.prepare(nn.Sequential(layer), torch.randn(shape))
    (site, nodes), *_ = sites(graph).items()
    return site, nodes, use_of(graph, site, nodes[0])


@pytest.mark.parametrize("pivots", [None, "rows", "columns", "none"])
@pytest.mark.parametrize("case", LAYERS)
def test_operations_cost_what_the_site_does_at_each_rank(case, pivots):
    site, nodes, own = found(*LAYERS[case])
    site = dataclasses.replace(site, pivots=pivots, move=0)
    flops, elements = flops_and_outputs(nodes)
    assert counted(own.runs(site, None)) == flops
    for rank in possible_ranks(site):
        assert counted(own.runs(site, rank)) == rank_flops(site, rank, flops, elements)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), ((3, 5), (2, 1), (0, 2))])
def test_operations_of_divided_kernels(kernel, stride, padding):
    site, nodes, own = found(nn.Conv2d(8, 9, kernel, stride, padding), (2, 8, 7, 6))
    assert "separable" in site.divisions
    assert ("pointwise_first" in site.divisions) is (kernel == 3)
    for division in site.divisions:
        thin = dataclasses.replace(site, divided=division)
        for rank in possible_ranks(thin):
            assert counted(own.runs(thin, rank)) == rank_flops(thin, rank, *flops_and_outputs(nodes))


@pytest.mark.parametrize("pivots", [None, "none"])
@pytest.mark.parametrize("ranks", [(2, 3, 1), (None, 2, 4), (3, None, None)])
def test_operations_of_parts(ranks, pivots):
    site, nodes, own = found(nn.Linear(16, 36), (5, 16))
    site = dataclasses.replace(site, parts=3, pivots=pivots, move=0)
    flops, elements = flops_and_outputs(nodes)
    assert counted(own.runs(site, ranks)) == rank_flops(site, ranks, flops, elements)


def test_values_move_where_a_form_moves_them():
    site, _, own = found(*LAYERS["conv2d, groups, strided"])  # several groups: rows are the only form

    def moved(pivots):
        runs = own.runs(dataclasses.replace(site, pivots=pivots, move=0), 5)
        return [(kind, run.inputs, run.outputs) for run in runs if (kind := run.operation.kind) in ("cat", "gather")]

    assert moved(None) == []
    assert moved("rows") == [("cat", 10, 14)]
    assert moved("none") == [("cat", 10, 14), ("gather", 24, 24)]


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs", "shape"),
    [("cat", 3, 5, (2, 8, 4)), ("gather", 6, 6, (2, 6, 4)), ("add", 3, 3, (2, 3, 4))],
)
def test_moves_have_the_positions_of_their_values(kind, inputs, outputs, shape):
    operation = Operation(kind, (2, 4), torch.float32, torch.device("cpu"))
    assert operation.task(inputs, outputs)().shape == shape


def test_values_have_the_layout_of_the_model():
    operation = Operation("add", (2, 4, 5), torch.bfloat16, torch.device("cpu"), channels_last=True)
    value = operation.task(6, 6)()
    assert value.dtype is torch.bfloat16
    assert value.is_contiguous(memory_format=torch.channels_last)
    assert not value.is_contiguous()


@pytest.mark.parametrize("case", ["conv2d", "linear"])
def test_inductor_gives_images_to_convolutions_features_last(case):
    layer, shape = {"conv2d": (nn.Conv2d(8, 6, 3), (2, 8, 5, 5)), "linear": (nn.Linear(8, 6), (4, 8))}[case]
    graph = balf_fx.prepare(nn.Sequential(layer), torch.randn(shape))
    (site, nodes), *_ = sites(graph).items()
    for compiled in (False, True):
        own = use_of(graph, site, nodes[0], compiled)
        assert own.channels_last is (compiled and case == "conv2d")
        operation = own.layers(site)[0]
        assert operation.channels_last is own.channels_last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pivots", [None, "rows", "columns", "none"])
def test_inductor_fuses_the_biases_of_linear_factors(pivots, dtype):
    graph = balf_fx.prepare(nn.Sequential(nn.Linear(16, 16)), torch.randn(4, 16)).to(dtype)
    (site, nodes), *_ = sites(graph).items()
    site = dataclasses.replace(site, pivots=pivots)
    for compiled in (False, True):
        own = use_of(graph, site, nodes[0], compiled)
        (dense,) = own.runs(site, None)
        thin = [run.operation for run in own.runs(site, 4) if run.operation.kind == "linear"]
        assert dense.operation.bias
        assert dense.operation.task(16, 16)()[0, 0] == 17
        assert len(thin) == 2
        apart = compiled and pivots is not None and dtype is torch.float32
        for each in thin:
            assert each.bias is not apart
            assert each.task(16, 16)()[0, 0] == (16 if apart else 17)
            assert (each.key == dense.operation.key) is not apart
