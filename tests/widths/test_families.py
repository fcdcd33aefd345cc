"""Every way in which models write gated blocks and attention: its widths are found, and narrowing is exact."""

import copy
import pickle

import pytest
import torch
from architectures import count_flops, count_params, rewritten
from families import FAMILIES, GATED, HIDDEN, PARALLEL, QUERIES_AND_VALUES, RESHAPED, VALUES, Gated, make_redundant
from torch.nn import functional as F

import balf_fx
from balf_fx.graph.annotation import graph_record
from balf_fx.passes import Score

BOTH = pytest.mark.parametrize("capture", ["symbolic_trace", "export"])


def kinds(name):
    if name in VALUES:
        return {"values"}
    if name in PARALLEL:
        return {"channels", "values"}
    if name in QUERIES_AND_VALUES:
        return {"queries", "values"}
    return {"channels"}


def prepared_redundant(name, capture):
    build, shape = FAMILIES[name]
    model = build().double().eval().requires_grad_(False)
    example = torch.randn(4, *shape, dtype=torch.float64)
    prepared = balf_fx.prepare(model, example, factors="sensitivity", capture=capture)
    sizes = make_redundant(prepared)
    Score("svd")(prepared)
    return prepared, sizes, shape


@BOTH
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_redundant_may_go(name, capture):
    """Alone and together, for other numbers of samples."""
    prepared, sizes, shape = prepared_redundant(name, capture)
    assert {width.kind for width in graph_record(prepared).widths} == kinds(name)
    whole = rewritten(prepared, {})
    for chosen in [*({key: size} for key, size in sizes.items()), sizes]:
        narrow = rewritten(prepared, chosen)
        assert count_params(narrow) < count_params(whole)
        for count in (1, 3):
            fresh = torch.randn(count, *shape, dtype=torch.float64)
            torch.testing.assert_close(narrow(fresh), whole(fresh), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*GATED, *RESHAPED])
def test_hidden_features(name):
    prepared, _, _ = prepared_redundant(name, "symbolic_trace")
    (width,) = graph_record(prepared).widths
    assert width.features == HIDDEN
    assert len(width.consumers) == 1
    if name in GATED:
        assert width.producers == width.producers[:1] * 2
        assert sorted((*width.rows[0], *width.rows[1])) == list(range(2 * HIDDEN))


@pytest.mark.parametrize("name", ["interleaved", "expanded", "unlike parts", "parallel", "Conv1D"])
def test_the_budget_is_what_is_counted(name):
    build, shape = FAMILIES[name]
    model = build().eval()
    batches = list(torch.randn(2, 48, *shape))
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches, progress=False)
    for measure in ("flops", "params"):
        narrow = balf_fx.convert(prepared, batches=batches, progress=False, **{measure: 0.6})
        report = balf_fx.report(narrow)
        assert report.flops_after == count_flops(narrow, batches[0])
        assert report.params_after == count_params(narrow)
        assert narrow(batches[0][:3]).shape == (3, 10)
        for other in (copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
            assert torch.equal(other(batches[1]), narrow(batches[1]))


@pytest.mark.parametrize("name", ["pairs", "group by group", "parallel", "Conv1D attention"])
def test_a_saved_model_is_loaded_with_its_sizes(name, tmp_path):
    build, shape = FAMILIES[name]
    model = build().eval()
    batches = list(torch.randn(2, 48, *shape))
    small = balf_fx.compile(model, batches, params=0.6, effort="balanced", progress=False)
    balf_fx.save(small, tmp_path / "small.safetensors")
    loaded = balf_fx.load(tmp_path / "small.safetensors", build().eval())
    assert torch.equal(loaded(batches[0][:5]), small(batches[0][:5]))


def halves(x):
    return x[..., :HIDDEN], x[..., HIDDEN:]


REFUSED = {
    "norm of the product": lambda x: F.rms_norm(halves(x)[0] * halves(x)[1], (HIDDEN,)),
    "norm of a half": lambda x: F.layer_norm(halves(x)[0], (HIDDEN,)) * halves(x)[1],
    "norm of both halves": lambda x: F.glu(F.layer_norm(x, (2 * HIDDEN,))),
    "softmax of the gate": lambda x: halves(x)[0].softmax(-1) * halves(x)[1],
    "variance of the product": lambda x: (halves(x)[0] * halves(x)[1]) / halves(x)[0].pow(2).mean(-1, keepdim=True),
    "one half reversed": lambda x: halves(x)[0] * halves(x)[1].flip(-1),
    "overlapping parts": lambda x: x[..., :HIDDEN] * x[..., HIDDEN - 1 : -1],
    "a part that something else reads": lambda x: halves(x)[0] * halves(x)[1] * x[..., :2].sum(-1, keepdim=True),
    "two ways to part": lambda x: F.glu(x) * x[..., ::2],
    "a part transposed": lambda x: halves(x)[0] * halves(x)[1].reshape(-1, 4, 4).mT.reshape(-1, HIDDEN),
}


@BOTH
@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_the_features_is_refused(name, capture):
    model = Gated(REFUSED[name]).eval()
    prepared = balf_fx.prepare(model, torch.randn(4, 12), factors="sensitivity", capture=capture)
    assert graph_record(prepared).widths == ()
