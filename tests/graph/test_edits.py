"""Nodes, modules and tensors whose values nothing reads are dropped; what has an effect is kept."""

import pytest
import torch
from small_models import ConvNet
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import balf_fx
from balf_fx.graph.annotation import graph_record
from balf_fx.graph.edits import drop_dead_code
from balf_fx.graph.flops import count_flops

CAPTURES = pytest.mark.parametrize("capture", ["symbolic_trace", "export"])


@fx.wrap
def record(x):
    RECORDED.append(x)
    return x


RECORDED = []


class Dead(nn.Module):
    """A branch whose result is not returned, and a weight that only this branch reads."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.weight = nn.Parameter(torch.randn(8, 32))

    def forward(self, x):
        x = self.used(x).relu()
        dropped = F.dropout2d(F.dropout(self.unused(x), 0.5, self.training)[None], 0.5, self.training)
        F.linear(dropped.sigmoid(), self.weight).mean()
        return self.last(x)


class Effects(nn.Module):
    """Nothing reads these results, but leaving the calls out would change others."""

    def __init__(self):
        super().__init__()
        self.layer, self.relu = nn.Linear(8, 8), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.layer(x)
        self.relu(x)
        x[:, 0].add_(1.0)
        x.__setitem__((slice(None), 1), 2.0)
        record(x)
        torch.rand(3)
        torch._assert(x.shape[0] > 0, "empty")
        x.exp().sum()
        return x


@CAPTURES
def test_dead_branches_are_dropped_before_costs_are_counted(capture):
    model, x = Dead().eval(), torch.randn(32, 16)
    prepared = balf_fx.prepare(model, x, capture=capture)
    assert graph_record(prepared).flops == 2 * 32 * (16 * 32 + 32 * 8)
    names = {name for name, _ in prepared.named_parameters()}
    assert names == {"used.weight", "used.bias", "last.weight", "last.bias"}
    compressed = balf_fx.compile(model, x, flops=0.6, capture=capture, progress=False)
    report = balf_fx.report(compressed)
    assert report.flops_after == count_flops(compressed, x) <= 0.6 * 2 * 32 * (16 * 32 + 32 * 8)
    assert report.params_after == sum(parameter.numel() for parameter in compressed.parameters())


@CAPTURES
def test_code_that_the_graph_drops_still_runs_in_the_model(capture):
    model, x = Dead().eval(), torch.randn(64, 16)
    options = {"flops": 0.5, "dense": ["*"], "effort": "balanced", "capture": capture, "progress": False}
    graph_module = balf_fx.compile(model, x, **options)
    assert graph_module.used.out_features <= 16
    compressed = balf_fx.compile(model, x, **options, result="module")
    assert compressed.unused.in_features == 32
    torch.testing.assert_close(compressed(x), graph_module(x))


class DeadRecurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.recurrent = nn.Linear(16, 32), nn.LSTM(32, 8)

    def forward(self, x):
        x = self.layer(x)
        self.recurrent(x[None])
        return x


@CAPTURES
def test_dead_recurrent_layers_are_dropped(capture):
    prepared = balf_fx.prepare(DeadRecurrent().eval(), torch.randn(32, 16), capture=capture)
    assert graph_record(prepared).flops == 2 * 32 * 16 * 32
    assert {name for name, _ in prepared.named_parameters()} == {"layer.weight", "layer.bias"}


def test_the_backend_drops_dead_branches_too():
    torch._dynamo.reset()
    model, x = Dead().eval(), torch.randn(32, 16)
    options = {"flops": 0.6, "calibration_steps": 1, "inner": "eager", "progress": False}
    compiled = torch.compile(model, backend="balf", options=options)
    with torch.no_grad():
        for _ in range(2):
            compiled(x)
    report = balf_fx.report(compiled)
    assert report.flops_before == 2 * 32 * (16 * 32 + 32 * 8)
    assert {row.name for row in report.sites} == {"used", "last"}


def test_calls_with_effects_are_kept():
    graph_module = fx.symbolic_trace(Effects().eval())
    before = [str(node.target) for node in graph_module.graph.nodes]
    drop_dead_code(graph_module)
    after = [str(node.target) for node in graph_module.graph.nodes]
    assert [target for target in before if target not in after] == ["exp", "sum"]
    x = torch.randn(4, 8)
    with torch.no_grad():
        torch.testing.assert_close(graph_module(x.clone()), Effects.forward(graph_module, x.clone()))
    assert len(RECORDED) == 2


def test_hooked_modules_are_kept():
    graph_module, seen = fx.symbolic_trace(ConvNet().eval()), []
    with graph_module.graph.inserting_before(graph_module.graph.output_node()):
        graph_module.graph.call_module("head", (graph_module.graph.output_node().args[0],))
    graph_module.head.register_forward_pre_hook(lambda *_: seen.append(1))
    count = len(graph_module.graph.nodes)
    drop_dead_code(graph_module)
    assert len(graph_module.graph.nodes) == count


def test_a_parametrization_leaves_no_tensor_behind():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(16, 3)), nn.ReLU(), nn.Linear(3, 16)).eval()
    compressed = balf_fx.compile(model, torch.randn(64, 16), allocation={}, effort="fast", progress=False)
    assert {name for name, _ in compressed.named_parameters()} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert balf_fx.report(compressed).params_kept == 1.0
    assert compressed.double()(torch.randn(2, 16).double()).dtype == torch.float64


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_of_a_shared_weight_one_name_is_left(effort):
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 32)).eval()
    model[3].weight = model[0].weight
    model[3].bias = model[0].bias
    x = torch.randn(64, 16)
    compressed = balf_fx.compile(model, x, params=0.6, capture="export", effort=effort, progress=False)
    count = sum(parameter.numel() for parameter in compressed.parameters())
    assert balf_fx.report(compressed).params_after == count <= 0.6 * sum(p.numel() for p in model.parameters())
