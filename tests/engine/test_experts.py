"""Mixtures of experts through the whole compiler."""

import copy
import io
import pickle

import pytest
import torch
from expert_models import EXPERTS, INPUTS, OUTPUTS, Loop, Mixture, Selected
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.errors import OptionError
from balf_fx.graph.flops import count_flops
from balf_fx.graph.site import Reason

GROUPED = [False, *([True] if hasattr(F, "grouped_mm") else [])]


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return list(torch.randn(6, 8, 6, 16))


@pytest.fixture(params=GROUPED, ids=lambda grouped: "grouped" if grouped else "selected")
def mixture(request):
    torch.manual_seed(0)
    return Mixture(grouped=request.param).eval()


@pytest.fixture
def unequal(mixture):
    """A mixture whose last expert is never chosen."""
    return without_last(mixture)


def without_last(mixture):
    with torch.no_grad():
        mixture.router.bias[-1] = -1000.0
    return mixture


@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("measure", ["flops", "params"])
def test_the_budget_holds_and_is_what_is_counted(mixture, batches, measure, effort):
    before = copy.deepcopy(mixture.state_dict())
    small = balf_fx.compile(mixture, batches, **{measure: 0.6}, effort=effort, progress=False)
    report = balf_fx.report(small)
    assert report.flops_before == count_flops(mixture, batches[0])
    assert report.flops_after == count_flops(small, batches[0])
    assert report.params_after == parameters(small)
    assert (report.flops_kept if measure == "flops" else report.params_kept) <= 0.6
    rows = {row.name: row for row in report.sites}
    assert (rows["up"].kind, rows["up"].shape) == ("experts", "32 x 24 x 4")
    assert (rows["down"].kind, rows["down"].shape) == ("experts", "24 x 32 x 4")
    assert "experts" in str(report)
    assert any(row.rank is not None for row in (rows["up"], rows["down"]))
    assert all(torch.equal(value, before[name]) for name, value in mixture.state_dict().items())


def test_a_budget_of_one_changes_nothing(mixture, batches):
    whole = balf_fx.compile(mixture, batches, flops=1.0, progress=False)
    assert torch.equal(whole(batches[0]), mixture(batches[0]))
    assert parameters(whole) == parameters(mixture)


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_an_unobserved_expert_keeps_its_weights_bit_for_bit(unequal, batches, effort):
    ranks = {"up": 8, "down": 8}
    small = balf_fx.compile(unequal, batches, allocation=ranks, effort=effort, progress=False)
    assert torch.equal(small.get_parameter("up.2"), unequal.up[-1:])
    assert torch.equal(small.get_parameter("down.2"), unequal.down[-1:])
    assert balf_fx.plan(small).layers[0].kept == (3,)
    report = balf_fx.report(small)
    assert report.params_after == parameters(small)
    assert report.flops_after == count_flops(small, batches[0])
    with torch.no_grad():  # now it is chosen for all rows, as one of two experts
        for model in (small, unequal):
            model.router.bias[-1] = 1000.0
            model.router.bias[:-1] -= torch.tensor([500.0, 0.0, 0.0])
            model.router.weight.zero_()
    chosen = unequal.router(unequal.stem(batches[0])).topk(2, -1)[1]
    assert (chosen[..., 0] == 3).all()
    torch.testing.assert_close(small(batches[0]), unequal(batches[0]), rtol=0.1, atol=0.1)


def test_the_router_stays_dense(mixture, batches):
    report = balf_fx.report(balf_fx.compile(mixture, batches, flops=0.5, effort="balanced", progress=False))
    (row,) = [row for row in report.refused if row.name == "router"]
    assert row.reason == Reason.ROUTER.value
    assert row.flops > 0


@pytest.mark.parametrize("unobserved", [False, True])
def test_copies_of_the_result_are_the_same(mixture, batches, unobserved, tmp_path):
    model = without_last(mixture) if unobserved else mixture
    small = balf_fx.compile(model, batches, allocation={"up": 8, "down": 12}, effort="fast", progress=False)
    wanted = small(batches[0])
    balf_fx.save(small, tmp_path / "small.safetensors")
    loaded = balf_fx.load(tmp_path / "small.safetensors", copy.deepcopy(model))
    saved = io.BytesIO()
    torch.save(small.state_dict(), saved)
    saved.seek(0)
    loaded.load_state_dict(torch.load(saved))
    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), loaded):
        assert torch.equal(copied(batches[0]), wanted)
        assert parameters(copied) == parameters(small)
    again = balf_fx.compile(model, batches, allocation=balf_fx.plan(small), effort="fast", progress=False)
    assert torch.equal(again(batches[0]), wanted)


def half(mixture, batches):
    """In bfloat16, the only type for which PyTorch compiles grouped products."""
    return (mixture.bfloat16(), [batch.bfloat16() for batch in batches]) if mixture.grouped else (mixture, batches)


@pytest.mark.parametrize("unobserved", [False, True])
def test_the_result_compiles(mixture, batches, unobserved):
    model, batches = half(without_last(mixture) if unobserved else mixture, batches)
    small = balf_fx.compile(model, batches, allocation={"up": 8, "down": 8}, effort="fast", progress=False)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(small, backend="eager")(batches[0]), small(batches[0]))
    torch.compiler.reset()


@pytest.mark.parametrize("options", [{"factors": "svd"}, balf_fx.AIR, balf_fx.BALF], ids=["svd", "AIR", "BALF"])
def test_other_factors_take_experts(unequal, batches, options):
    small = balf_fx.compile(unequal, batches, params=0.7, progress=False, **options)
    report = balf_fx.report(small)
    assert report.params_after == parameters(small) <= 0.7 * parameters(unequal)
    assert torch.isfinite(small(batches[0])).all()


def test_prepare_and_convert_take_experts(unequal, batches):
    prepared = balf_fx.prepare(unequal, batches[0], factors="sensitivity")
    balf_fx.calibrate(prepared, batches[:3], progress=False)
    balf_fx.calibrate(prepared, batches[3:], progress=False)
    for share in (0.6, 0.8):
        small = balf_fx.convert(prepared, params=share, batches=batches, progress=False)
        assert parameters(small) <= share * parameters(unequal)
        assert balf_fx.report(small).flops_after == count_flops(small, batches[0])


@pytest.mark.skipif(True not in GROUPED, reason="this torch has no grouped_mm")
def test_ranks_of_grouped_products_fit_their_kernels(batches):
    model = Mixture(grouped=True).eval()
    with pytest.raises(OptionError, match="in steps of 4"):
        balf_fx.compile(model, batches, allocation={"up": 6}, effort="fast", progress=False)


@pytest.mark.parametrize("grouped", GROUPED)
def test_the_backend_compresses_experts(batches, grouped):
    torch.manual_seed(0)
    model = Mixture(grouped=grouped).eval()
    model, batches = half(model, batches)
    options = {"flops": 0.6, "calibration_steps": len(batches), "progress": False, "inner": "eager"}
    compiled = torch.compile(model, backend="balf", options=options)
    with torch.no_grad():
        for batch in (*batches, batches[0]):
            compiled(batch)
        report = balf_fx.report(compiled)
        assert report.flops_kept <= 0.6
        assert {row.name: row.kind for row in report.sites}["up"] == "experts"
        offline = balf_fx.compile(model, batches, flops=0.6, progress=False)
        torch.testing.assert_close(compiled(batches[0]), offline(batches[0]))
        assert compiled(batches[0][:4]).shape == (4, 10)
    torch.compiler.reset()


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_experts_in_a_loop_are_layers_on_their_own_rows(batches, effort):
    torch.manual_seed(0)
    model = without_last(Loop(chosen=True).eval())
    small = balf_fx.compile(model, batches, params=0.6, effort=effort, progress=False)
    report = balf_fx.report(small)
    assert report.params_after == parameters(small) <= 0.6 * parameters(model)
    reasons = {row.name: row.reason for row in report.refused}
    assert reasons["router"] == Reason.ROUTER.value
    assert {name for name, reason in reasons.items() if reason == Reason.UNSEEN.value} == {"experts.3.0", "experts.3.2"}
    for layer in (0, 2):
        assert torch.equal(small.get_submodule(f"experts.3.{layer}").weight, model.experts[3][layer].weight)
    assert torch.isfinite(small(batches[0])).all()


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_a_dense_mixture_is_a_sum_of_layers(batches, effort):
    torch.manual_seed(0)
    model = Loop(chosen=False).eval()
    small = balf_fx.compile(model, batches, flops=0.6, effort=effort, progress=False)
    report = balf_fx.report(small)
    assert report.flops_after == count_flops(small, batches[0]) <= 0.6 * count_flops(model, batches[0])
    assert "router" in {row.name for row in report.sites}  # gradients know what it does


def test_the_distortion_of_a_rank_is_the_error_over_all_rows(batches):
    torch.manual_seed(0)
    model, batches = Selected().double().eval(), [batch.double() for batch in batches]
    small = balf_fx.compile(model, batches, allocation={"weight": 5}, effort="fast", progress=False)
    x = torch.cat(batches).reshape(-1, INPUTS)
    chosen = model.router(x).argmax(-1)
    first, second = small.get_parameter("weight.0"), small.get_parameter("weight.1")
    error = torch.bmm(x.unsqueeze(1), (model.weight - first @ second)[chosen]).detach()
    (row,) = balf_fx.report(small).sites
    torch.testing.assert_close(row.distortion, float(error.square().sum() / len(x)))
    for expert in range(EXPERTS):  # no other factors of this rank lose less on the rows of an expert
        own = x[chosen == expert] @ model.weight[expert]
        least = torch.linalg.svdvals(own)[5:].square().sum()
        torch.testing.assert_close(error.squeeze(1)[chosen == expert].square().sum(), least)


def test_a_refit_corrects_each_expert_for_errors_made_before_it():
    torch.manual_seed(0)
    model, ranks = Mixture().eval(), {"stem": 5, "up": 8}
    batches = [torch.randn(32, 6, 16) for _ in range(6)]
    x = torch.cat(batches).reshape(-1, 16)
    h = model.stem(x)
    chosen = model.router(h).softmax(-1).topk(2, -1)[1]
    found = []
    for refit in (False, True):
        small = balf_fx.compile(model, batches, allocation=ranks, effort="fast", refit=refit, progress=False)
        first, second = small.get_parameter("up.0"), small.get_parameter("up.1")
        changed = small.stem[1](small.stem[0](x)) + small.stem.get_parameter("1_bias")
        wrong = [h @ w.T - changed @ (b @ a).T for w, a, b in zip(model.up, first, second, strict=True)]
        found.append([float(e[(chosen == i).any(-1)].square().sum()) for i, e in enumerate(wrong)])
    before, after = found
    assert all(new < 0.99 * old for new, old in zip(after, before, strict=True))


class SharedFirst(nn.Module):
    """A layer for all rows, computed before the experts to which it is added, which read ids of their own."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.experts = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, OUTPUTS), Selected()

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        return self.shared(x) + self.experts(x)


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_a_layer_for_all_rows_is_refitted_beside_experts(capture):
    torch.manual_seed(0)
    model, batches = SharedFirst().eval(), list(torch.randn(6, 64, INPUTS))
    small = balf_fx.compile(model, batches, params=0.8, capture=capture, progress=False)
    assert balf_fx.report(small).params_kept <= 0.8
    wanted, found = model(batches[0]), small(batches[0])
    assert float((found - wanted).square().mean()) < 0.5 * float(wanted.var())
