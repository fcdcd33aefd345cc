import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

import balf_fx
from balf_fx.graph.annotation import META_KEY, annotation, graph_record, sites
from balf_fx.graph.curves import Spectrum
from balf_fx.graph.flops import flop_counter, profile
from balf_fx.graph.parameters import count_parameters
from balf_fx.graph.site import Site
from balf_fx.ranks.costs import energy_curve, largest_part_rank, parts_candidate, rank_curve, rank_flops, rank_params
from balf_fx.ranks.spectra import in_parts, spectrum_from_weight

PROPERTY = settings(max_examples=50, derandomize=True)
widths = st.integers(1, 24)

LAYERS = {
    "linear": (nn.Linear(10, 7), (5, 10)),
    "linear, no bias, 1 dimension": (nn.Linear(6, 9, bias=False), (6,)),
    "linear, 3 dimensions": (nn.Linear(6, 9), (2, 5, 6)),
    "linear, 4 dimensions": (nn.Linear(6, 9), (2, 3, 2, 6)),
    "conv1d, strided": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 11)),
    "conv2d": (nn.Conv2d(3, 6, (3, 2), padding=1), (2, 3, 7, 6)),
    "conv2d, groups, strided, no bias": (nn.Conv2d(6, 8, 3, stride=2, groups=2, bias=False), (3, 6, 9, 8)),
    "conv2d, same, dilated": (nn.Conv2d(4, 5, 2, padding="same", dilation=3), (2, 4, 7, 7)),
    "conv2d, unbatched": (nn.Conv2d(4, 6, 3), (4, 6, 6)),
    "conv2d, pointwise": (nn.Conv2d(8, 6, 1, stride=2), (2, 8, 5, 5)),
    "conv3d, groups": (nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1), groups=2), (2, 4, 3, 4, 5)),
}


class Mixed(nn.Module):
    """Sites, a functional site and operations that no budget can touch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.weight = nn.Parameter(torch.randn(12, 8))
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.depthwise(torch.relu(self.norm(self.conv(x))))
        tokens = F.linear(x.flatten(2).mT, self.weight)
        return self.head((tokens @ tokens.mT).softmax(-1) @ tokens)


MIXED_INPUT = (2, 3, 6, 6)
MIXED_FLOPS = 2 * 2 * (36 * 8 * 27 + 16 * 8 * 9 + 16 * 12 * 8 + 2 * 16 * 16 * 12 + 16 * 12 * 10)


def counted_flops(model, *inputs):
    with torch.no_grad(), flop_counter() as counter:
        model(*inputs)
    return counter.get_total_flops()


def calibrated(model, x):
    prepared = balf_fx.prepare(model.eval(), x)
    balf_fx.calibrate(prepared, [x], progress=False)
    return prepared


def a_site(outputs, inputs, groups=1, bias="fc.bias"):
    return Site("fc", "linear", "fc.weight", bias, groups, outputs, inputs)


def a_spectrum(site):
    generator = torch.Generator().manual_seed(0)
    shape = (site.groups, site.out_features, site.in_features)
    return spectrum_from_weight(torch.randn(shape, dtype=torch.float64, generator=generator))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("case", LAYERS)
def test_predicted_costs_are_those_of_the_factors_really_built(case, centred):
    layer, shape = LAYERS[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(layer)
    prepared = calibrated(model, x)
    balf_fx.convert(prepared, allocation={}, centred=centred, progress=False)
    [(site, (node,))] = sites(prepared).items()
    curve = annotation(node).curve
    assert (curve.dense.flops, curve.dense.params) == (counted_flops(model, x), count_parameters(model))
    for rank in {1, max(site.break_even // 2, 1), site.break_even}:
        built = balf_fx.convert(prepared, allocation={"0": rank}, centred=centred, progress=False)
        candidate = curve.candidates[rank - 1]
        has_bias = centred or layer.bias is not None
        assert candidate.rank == rank
        assert candidate.flops == rank_flops(site, rank, curve.dense.flops, built(x).numel()) == counted_flops(built, x)
        assert candidate.params == rank_params(site, rank, has_bias) == count_parameters(built)


def test_costs_of_a_whole_model_after_compression_are_as_reported():
    model, x = Mixed().eval(), torch.randn(MIXED_INPUT)
    prepared = calibrated(model, x)
    for ranks in ({}, {"conv": 2}, {"weight": 3, "head": 4}, {"conv": 5, "weight": 1, "head": 1}):
        built = balf_fx.convert(prepared, allocation=ranks, progress=False)
        report = balf_fx.report(built)
        assert report.flops_before == counted_flops(model, x) == MIXED_FLOPS
        assert report.flops_after == counted_flops(built, x)
        assert report.params_before == count_parameters(model)
        assert report.params_after == count_parameters(built)


def test_profile_counts_what_the_flop_counter_counts_and_every_node_its_share():
    model, x = Mixed().eval(), torch.randn(MIXED_INPUT)
    graph_module = fx.symbolic_trace(model)
    output = profile(graph_module, [x])
    total = graph_record(graph_module).flops
    marks = {node.name: annotation(node) for node in graph_module.graph.nodes}
    assert total == counted_flops(model, x) == MIXED_FLOPS
    assert sum(mark.flops for mark in marks.values()) == total
    assert marks["conv"].flops == 2 * 2 * 36 * 8 * 27
    assert marks["matmul"].flops == 2 * 2 * 16 * 16 * 12
    assert marks["relu"].flops == marks["norm"].flops == 0
    assert (len(marks["conv"].shape), len(marks["linear"].shape)) == (4, 3)
    torch.testing.assert_close(output, model(x))


def test_profile_counts_the_last_inputs_and_keeps_what_else_is_known_of_a_node():
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4)))
    for node in graph_module.graph.nodes:
        node.meta["other"] = node.name
    profile(graph_module, [torch.randn(2, 3)])
    profile(graph_module, [torch.randn(5, 3)])
    assert [annotation(node).flops for node in graph_module.graph.nodes] == [0, 2 * 5 * 3 * 4, 0]
    assert graph_record(graph_module).flops == 2 * 5 * 3 * 4
    assert all(set(node.meta) >= {"other", META_KEY} for node in graph_module.graph.nodes)


@PROPERTY
@given(widths, widths)
def test_break_even_is_the_largest_rank_cheaper_than_dense(outputs, inputs):
    cheaper = [rank for rank in range(1, outputs * inputs + 1) if rank * (outputs + inputs) < outputs * inputs]
    assert a_site(outputs, inputs).break_even == max(cheaper, default=0) < min(outputs, inputs)


@PROPERTY
@given(widths, widths, st.integers(1, 3), st.integers(0, 10**6), st.booleans())
def test_rank_curve_trades_distortion_for_cost(outputs, inputs, groups, positions, bias):
    site = a_site(outputs, inputs, groups, "fc.bias" if bias else None)
    spectrum = a_spectrum(site)
    curve = rank_curve(site, spectrum, 2 * positions * groups * outputs * inputs, positions * groups * outputs)
    *ranked, dense = curve.candidates
    assert [c.rank for c in ranked] == list(range(1, site.break_even + 1))
    assert dense is curve.dense
    assert (dense.rank, dense.distortion) == (None, 0.0)
    assert curve.energy == pytest.approx(float(spectrum.energies.sum()))
    for c in ranked:
        assert c.flops == 2 * positions * groups * c.rank * (outputs + inputs)
        assert c.params == groups * (c.rank * (outputs + inputs) + bias * outputs)
        assert c.distortion == pytest.approx(float(spectrum.energies[:, c.rank :].sum()))
    for left, right in zip(curve.candidates, curve.candidates[1:], strict=False):
        assert (left.cost("flops") < right.cost("flops")) if positions else left.flops == right.flops == 0
        assert left.cost("params") < right.cost("params")
        assert left.distortion > right.distortion


@PROPERTY
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 2))
def test_energy_curves_run_from_nothing_to_all_in_a_few_steps(outputs, inputs, groups):
    site = a_site(outputs, inputs, groups)
    spectrum = a_spectrum(site)
    found = energy_curve(site, rank_curve(site, spectrum, 1, 1))
    assert (found.ranks[0], found.ranks[-1]) == (0, min(outputs, inputs))
    assert list(found.ranks) == sorted(set(found.ranks))
    assert len(found.ranks) == min(64, min(outputs, inputs) + 1)
    for rank, kept in zip(found.ranks, found.kept, strict=True):
        assert kept == pytest.approx(float(spectrum.energies[:, :rank].sum() / spectrum.energies.sum()), abs=1e-5)


def test_energy_curves_of_sites_without_energy_keep_all():
    site = a_site(8, 8)
    silent = dataclasses.replace(a_spectrum(site), energies=torch.zeros(1, 8, dtype=torch.float64))
    assert set(energy_curve(site, rank_curve(site, silent, 1, 1)).kept) == {1.0}


@PROPERTY
@given(st.integers(1, 4), st.integers(1, 8), st.sampled_from([2, 3]), st.booleans(), st.integers(0, 3))
def test_no_ranks_of_the_parts_beat_those_on_the_curve(outputs, inputs, count, bias, seed):
    site = dataclasses.replace(a_site(outputs * count, inputs, bias="fc.bias" if bias else None), parts=count)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, outputs * count, inputs, dtype=torch.float64, generator=generator)
    parts = spectrum_from_weight(in_parts(weight, count))
    dense_flops, elements = 2 * 5 * outputs * count * inputs, 5 * outputs * count
    curve = rank_curve(site, spectrum_from_weight(weight), dense_flops, elements, parts)
    split = [c for c in curve.candidates if isinstance(c.rank, tuple)]
    assert split == sorted(split, key=lambda c: c.flops)
    for c in split:
        again = parts_candidate(site, parts, c.rank, dense_flops, elements)
        assert (again.rank, again.flops, again.params) == (c.rank, c.flops, c.params)
        assert again.distortion == pytest.approx(c.distortion, abs=1e-9)
    choices = [None, *range(1, min(outputs, inputs) + 1)]
    for ranks in itertools.product(choices, repeat=count):
        if any(ranks):
            other = parts_candidate(site, parts, ranks, dense_flops, elements)
            if other.flops < curve.dense.flops:
                best = min((c.distortion for c in curve.candidates if c.flops <= other.flops), default=math.inf)
                assert best <= other.distortion + 1e-9


def test_moving_the_mean_into_a_missing_bias_costs_a_bias():
    site = a_site(8, 6, bias=None)
    spectrum = a_spectrum(site)
    centred = Spectrum(spectrum.energies, spectrum.left, torch.ones(1, 8, dtype=torch.float64))
    pairs = zip(rank_curve(site, spectrum, 96, 8).candidates, rank_curve(site, centred, 96, 8).candidates, strict=True)
    *extra, dense = [with_mean.params - without.params for without, with_mean in pairs]
    assert set(extra) == {8}
    assert dense == 0


def test_a_kept_weight_costs_more_only_beside_factors():
    kept = Site("layer", "linear", "layer.weight", None, 1, 12, 8, keeps_weight=True)
    assert rank_params(kept, None, False) == 12 * 8
    assert rank_params(kept, 2, False) == 12 * 8 + 2 * (12 + 8)


@pytest.mark.parametrize(("outputs", "inputs", "largest"), [(24, 4, 3), (24, 40, 8), (24, 8, 7)])
def test_a_part_has_no_rank_at_which_it_would_be_cheaper_dense(outputs, inputs, largest):
    site = Site("layer", "linear", "layer.weight", None, 1, outputs, inputs, parts=3)
    assert largest_part_rank(site) == largest
