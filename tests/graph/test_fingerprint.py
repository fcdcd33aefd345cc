import pytest
import torch

from balf_fx.graph.fingerprint import Fingerprint


def sums(tensor):
    flat = tensor.double().flatten()
    ramp = torch.linspace(1, 2, len(flat), dtype=torch.float64)
    return [float(flat.square().sum()), float(flat.square() @ ramp), float(flat.abs().sum())]


@pytest.mark.parametrize("shape", [(0, 3), (1,), (5, 7), (300, 400)])
def test_sums_are_those_of_the_whole_tensor(shape):
    weight, bias = torch.randn(shape), torch.randn(9)
    found = Fingerprint.of(weight, bias)
    assert found.shape == shape
    assert found.sums == pytest.approx([*sums(weight), *sums(bias)], rel=1e-12)
    assert found.matches(Fingerprint.of(weight.clone(), bias))


@pytest.mark.parametrize("change", [lambda w: w.flip(0), lambda w: w * 1.001, lambda w: w[:2]])
def test_other_weights_have_other_fingerprints(change):
    weight = torch.randn(300, 400)
    assert Fingerprint.of(weight, None) != Fingerprint.of(change(weight), None)


def test_rounding_matches():
    weight = torch.randn(300, 400)
    assert Fingerprint.of(weight, None).matches(Fingerprint.of(weight * (1 + 1e-7), None))
    assert not Fingerprint.of(weight, None).matches(Fingerprint.of(weight * 1.001, None))
