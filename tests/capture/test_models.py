"""Copies of models, with the values of weights that torch.nn.utils computes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import balf_fx

MODELS = {
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 32)), nn.ReLU(), nn.Linear(32, 16)),
    "spectral_norm of a critic": lambda: nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(32, 1))
    ),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(16, 3)), nn.Linear(3, 32)),
    "weight and bias": lambda: nn.Sequential(
        parametrizations.weight_norm(parametrizations.weight_norm(nn.Linear(16, 32)), "bias", dim=None),
        nn.Linear(32, 16),
    ),
    "older weight_norm of no site": lambda: nn.Sequential(
        nn.utils.weight_norm(nn.Linear(16, 1)), nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 16)
    ),
    "older spectral_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(16, 32)), nn.Linear(32, 1)),
}


class LowRank(nn.Module):
    """A parametrization whose value is larger than what it is computed from."""

    def __init__(self):
        super().__init__()
        self.right = nn.Parameter(torch.randn(2, 16))

    def forward(self, left):
        return left @ self.right


class Noise(nn.Module):
    def forward(self, weight):
        return weight + torch.rand(())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("name", MODELS)
def test_computed_weights_become_plain_ones(name, effort, tmp_path):
    model, batch = MODELS[name]().eval(), torch.randn(64, 16)
    before, answer = copy.deepcopy(model.state_dict()), model(batch)
    compressed = balf_fx.compile(model, batch, flops=0.9, effort=effort, progress=False)
    names = {name.rpartition(".")[2] for name in compressed.state_dict()}
    assert {"weight"} < names <= {"weight", "bias", "1_bias"}
    assert not any(map(parametrize.is_parametrized, compressed.modules()))
    assert balf_fx.report(compressed).params_after == sum(p.numel() for p in compressed.parameters())
    torch.save(compressed, tmp_path / "pickled.pt")
    balf_fx.save(compressed, tmp_path / "saved.safetensors")
    loaded = balf_fx.load(tmp_path / "saved.safetensors", MODELS[name]().eval())
    for other in (pickle.loads(pickle.dumps(compressed)), copy.deepcopy(compressed), loaded):
        assert torch.equal(other(batch), compressed(batch))
    compressed.load_state_dict(compressed.state_dict())
    whole = balf_fx.compile(model, batch, flops=1.0, progress=False)
    torch.testing.assert_close(whole(batch), answer)
    assert torch.equal(model(batch), answer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_value_that_would_be_larger_or_random_stays_computed():
    layer, noisy = nn.Linear(16, 16), nn.Linear(16, 16)
    layer.weight = nn.Parameter(torch.randn(16, 2))
    parametrize.register_parametrization(layer, "weight", LowRank(), unsafe=True)
    parametrize.register_parametrization(noisy, "bias", Noise())
    model, batch = nn.Sequential(nn.Linear(16, 16), layer).eval(), torch.randn(32, 16)
    compressed = balf_fx.compile(model, batch, flops=0.9, capture="symbolic_trace", progress=False)
    assert parametrize.is_parametrized(compressed.get_submodule("1"))
    prepared = balf_fx.prepare(nn.Sequential(nn.Linear(16, 16), noisy).eval(), batch, capture="symbolic_trace")
    assert parametrize.is_parametrized(prepared.get_submodule("1"))


def test_a_feature_extractor_is_copied_in_evaluation_mode():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
    model = extraction.create_feature_extractor(net, {"2": "middle.0", "3": "last"}).eval()
    batches = list(torch.randn(2, 4, 3, 8, 8))
    for result in ("graph", "module"):
        small = balf_fx.compile(model, batches, flops=1.0, result=result, progress=False)
        assert list(small(batches[0])) == ["middle.0", "last"]
        torch.testing.assert_close(small(batches[0]), model(batches[0]))


class Decoder(nn.Module):
    """Encodes and decodes under causal masks, which the modules of torch ask about."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 1)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 2, 64, batch_first=True), 1)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.decoder(target, self.encoder(source, mask), mask)


def test_layers_of_torch_with_causal_masks_are_sites():
    model, batches = Decoder().eval(), [(torch.randn(16, 6, 32), torch.randn(16, 6, 32)) for _ in range(2)]
    state = copy.deepcopy(model.state_dict())
    small = balf_fx.compile(model, batches, flops=0.8, effort="fast", pivot=False, progress=False)
    report = balf_fx.report(small)
    assert {"encoder.layers.0.linear1", "decoder.layers.0.linear2"} <= {site.name for site in report.sites}
    assert report.flops_in_sites > 0.9
    same = balf_fx.compile(model, batches, flops=1.0, effort="fast", progress=False)
    for size in (1, 5):
        other = (torch.randn(size, 6, 32), torch.randn(size, 6, 32))
        torch.testing.assert_close(same(*other), model(*other), rtol=1e-4, atol=1e-4)
    hooked = [module for module in model.modules() if module._forward_pre_hooks]
    assert not hooked
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
