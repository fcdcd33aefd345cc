import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.calibration.observers import CovarianceObserver, observer_of
from balf_fx.capture.normal_form import capture
from balf_fx.graph.annotation import annotation, sites


class Encoder(nn.Module):
    """A layer of torch's transformers, whose output projection reads rows, positions first."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, input_ids, attention_mask):
        padding = attention_mask == 0
        return self.head(self.layer(self.embedding(input_ids), src_key_padding_mask=padding)[:, 0])


def test_padding_does_not_count_in_the_output_projection_of_attention():
    torch.manual_seed(0)
    model = Encoder().double().eval()
    ids, mask = torch.randint(0, 50, (4, 6)), torch.ones(4, 6, dtype=torch.long)
    for sample in range(4):
        mask[sample, 2 + sample :] = 0
    prepared = balf_fx.prepare(
        model, {"input_ids": ids, "attention_mask": mask}, factors="activations", capture="export"
    )
    balf_fx.calibrate(prepared, [{"input_ids": ids, "attention_mask": mask}], progress=False)
    (node,) = next(nodes for site, nodes in sites(prepared).items() if site.name.endswith("out_proj"))
    observer = observer_of(prepared, annotation(node).observer, CovarianceObserver)
    seen = []
    model.layer.self_attn.register_forward_hook(lambda *values: seen.append(values[-1][0]))
    model(ids, mask)  # with gradients, without which a layer takes a path that calls no hook
    rows = seen[0].detach()[mask.bool()]
    moments, layer = observer.moments, model.layer.self_attn.out_proj
    mean, covariance = moments.mean[0], moments.covariance()[0]
    if observer.side == "input":
        mean, covariance = layer.weight @ mean + layer.bias, layer.weight @ covariance @ layer.weight.mT
    assert int(moments.count) == int(mask.sum())
    torch.testing.assert_close(mean.detach(), rows.mean(0))
    torch.testing.assert_close(covariance.detach(), rows.T.cov(correction=0))


class Rows(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.layer, self.way = nn.Linear(8, 6), way

    def forward(self, x):
        return self.way(self.layer, x)


WAYS = {  # whether the layer then reads positions
    "positions": (lambda layer, x: layer(x.reshape(-1, 8)).view(x.shape[0], 5, 6), True),
    "heads": (lambda layer, x: layer(x.reshape(-1, 8)).view(x.shape[0], 5, 2, 3), False),
    "rows alone": (lambda layer, x: layer(x.reshape(-1, 8)), False),
    "rows read twice": (lambda layer, x: (y := layer(x.reshape(-1, 8))).view(x.shape[0], 5, 6) + y.sum(), False),
    "features flattened": (lambda layer, x: layer(x.reshape(-1, 8)).view(x.shape[0], -1), False),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_reshape_of_rows_goes_before_the_layer(name):
    way, moves = WAYS[name]
    model, x = Rows(way).double().eval(), torch.randn(4, 5, 8, dtype=torch.float64)
    graph_module = capture(model, x, method="export")
    (layer,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert (len(annotation(layer).shape) == 3) == moves
    for samples in (4, 3):
        value = torch.randn(samples, 5, 8, dtype=torch.float64)
        torch.testing.assert_close(graph_module(value), model(value))
