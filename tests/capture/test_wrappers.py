"""What is passed as a model."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.errors import CaptureError, ModelError, OptionError

X = torch.randn(32, 16)


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def small(model, batches=X, **options):
    return balf_fx.compile(model, batches, **{"params": 0.7, "effort": "fast", "progress": False, **options})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("google/vit", "not a str: load it first"),
        (lambda x: x, "not a function"),
        (torch.jit.trace(mlp(), X), "compiled by TorchScript.*pass the original module"),
    ],
    ids=["a name", "a function", "TorchScript"],
)
@pytest.mark.parametrize("door", [small, balf_fx.prepare])
def test_other_things_are_no_models(model, message, door):
    with pytest.raises(ModelError, match=message):
        door(model, X)


def test_wrappers_are_taken_off():
    model = mlp()
    expected = small(model)
    inner = nn.Sequential(model[0], torch.compile(nn.Sequential(model[1], model[2]))).eval()
    for wrapped in (torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        found = small(wrapped)
        assert torch.equal(found(X), expected(X))
        assert list(found.state_dict()) == list(expected.state_dict())
    found = small(inner)
    torch.testing.assert_close(found(X), expected(X))
    assert isinstance(inner[1], torch._dynamo.OptimizedModule)
    model.compile()
    assert torch.equal(small(model)(X), expected(X))


@pytest.fixture
def process_group(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch was built without distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_models_that_are_distributed():
    model = mlp()
    expected = small(model)
    found = small(nn.parallel.DistributedDataParallel(model))
    assert torch.equal(found(X), expected(X))
    assert list(found.state_dict()) == list(expected.state_dict())
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    sharded = fsdp.fully_shard(copy.deepcopy(model))
    found = small(sharded)
    assert torch.equal(found(X), expected(X))
    assert type(sharded[0].weight).__name__ == "DTensor"
    with pytest.raises(ModelError, match="sharded by FullyShardedDataParallel: shard it by"):
        small(fsdp.FullyShardedDataParallel(mlp(), device_id=torch.device("cpu")))


def test_adapters_are_merged_first():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0"])).eval()
    with pytest.raises(ModelError, match=r"merge_and_unload\(\)"):
        small(adapted)
    assert balf_fx.report(small(adapted.merge_and_unload())).sites


@pytest.mark.parametrize("options", [{"factors": "svd"}, {"effort": "best"}], ids=["svd", "best"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[0].weight.data[0, 0].fill_(torch.nan), "weight of 0 .Linear. contains NaN"),
        (lambda m: m[2].bias.data[0].fill_(-torch.inf), "bias of 2 .Linear. contains NaN or inf"),
        (lambda m: m[3].weight.data[0].fill_(torch.inf), "weight of 3 .LayerNorm. contains NaN or inf"),
        (lambda m: m[4].running_var[0].fill_(torch.nan), "running_var of 4 .BatchNorm1d. contains NaN"),
        (lambda m: m[0].weight.data.mul_(1e30), "values of up to .*squares overflow"),
    ],
)
def test_weights_that_nothing_can_be_computed_with_are_named(change, message, options):
    model = nn.Sequential(*mlp(), nn.LayerNorm(8), nn.BatchNorm1d(8)).eval()
    change(model)
    with pytest.raises(ModelError, match=message):
        small(model, **options)


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_complex_outputs(capture):
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp()

        def forward(self, x):
            return torch.fft.fft(self.mlp(x))

    model = Spectrum().eval()
    same = small(model, [X, X + 1], params=1.0, effort="best", capture=capture)
    torch.testing.assert_close(same(X), model(X))
    assert small(model, [X, X + 1], effort="best", capture=capture)(X).is_complex()


def double(self, x):
    return 2 * nn.Sequential.forward(self, x)


@pytest.mark.parametrize("capture", ["auto", "symbolic_trace", "export"])
def test_a_forward_that_was_replaced_on_the_instance(capture):
    model = mlp()
    model.forward = types.MethodType(double, model)
    same = small(model, params=1.0, capture=capture)
    torch.testing.assert_close(same(X), 2 * mlp_like(model)(X))
    torch.testing.assert_close(model(X), same(X))


def mlp_like(model):
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    return plain


def test_a_layer_whose_forward_was_replaced_is_not_taken_for_a_plain_one():
    model = mlp()
    weight = model[0].weight
    model[0].forward = lambda x: F.linear(x, weight).tanh()
    found = small(model, params=0.9, capture="symbolic_trace")
    assert "0" not in balf_fx.plan(found).ranks


def test_a_forward_that_is_a_function_on_the_instance_is_named():
    model = mlp()
    inner = copy.deepcopy(model)
    model.forward = lambda x: inner(x) + 1
    with pytest.raises(CaptureError, match="replaced on the instance"):
        small(model, capture="symbolic_trace")


@pytest.mark.parametrize(
    "options",
    [{"seed": "a"}, {"seed": 1.5}, {"memory": -1}, {"memory": "much"}, {"widths": "no"}, {"allocation": {0: 4}}],
)
def test_options_of_the_wrong_kind(options):
    with pytest.raises(OptionError, match=f"^{next(iter(options))} must"):
        small(mlp(), **options)


@pytest.mark.parametrize("layer", [nn.LazyLinear(4), nn.Linear(8, 4, device="meta")], ids=["lazy", "meta"])
def test_weights_that_are_not_there(layer):
    with pytest.raises(ModelError, match=r"run one batch|load its weights"):
        small(nn.Sequential(*mlp(), layer).eval())
