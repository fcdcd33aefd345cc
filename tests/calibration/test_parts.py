"""Parts of a fused projection are weighted by their own gradients, as separate layers are."""

import torch
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.calibration.observers import SensitivityObserver, observer_of
from balf_fx.graph.annotation import annotation, sites


class Attention(nn.Module):
    """A class token reads the others, so that queries and values have gradients at other positions."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.layers = nn.ModuleList([nn.Linear(12, 36)] if fused else [nn.Linear(12, 12) for _ in range(3)])
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        query, key, value = self.layers[0](x).chunk(3, -1) if self.fused else (layer(x) for layer in self.layers)
        heads = (each.unflatten(-1, (2, 6)).transpose(1, 2) for each in (query, key, value))
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.head(x[:, 0] + mixed[:, 0])


def pair():
    torch.manual_seed(0)
    separate, fused = Attention(fused=False).double().eval(), Attention(fused=True).double().eval()
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(fused.layers[0], name).copy_(torch.cat([getattr(layer, name) for layer in separate.layers]))
        fused.head.load_state_dict(separate.head.state_dict())
    return separate, fused


def observed(model, batches):
    prepared = balf_fx.prepare(model, batches[0], sensitivity=True, capture="export")
    balf_fx.calibrate(prepared, batches, progress=False)
    found = {}
    for site, nodes in sites(prepared).items():
        observer = observer_of(prepared, annotation(nodes[0]).sensitivity, SensitivityObserver)
        found[site.name] = observer.halves
    return found


def test_moments_of_parts_are_those_of_separate_layers():
    batches = [2 * torch.randn(count, 7, 12, dtype=torch.float64) for count in (16, 16, 5)]
    separate, fused = (observed(model, batches) for model in pair())
    for half, whole in enumerate(fused["layers.0"]):
        parts = whole.parts
        for index in range(3):
            own = separate[f"layers.{index}"][half]
            torch.testing.assert_close(parts.count[index], torch.as_tensor(own.moments.count, dtype=torch.float64))
            torch.testing.assert_close(parts.mean[index], own.moments.mean[0])
            torch.testing.assert_close(parts.covariance()[index], own.moments.covariance()[0])
        assert (parts.mean[0] - parts.mean[2]).norm() > 0.1 * parts.mean[0].norm()
    assert all(own.parts is None for halves in separate.values() for own in halves)
