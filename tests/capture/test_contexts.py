"""Contexts of autocast and of gradients inside of forward and around it."""

import pytest
import torch
from torch import fx, nn

import balf_fx
from balf_fx.capture.contexts import check_transforms
from balf_fx.capture.normal_form import capture
from balf_fx.errors import CaptureError

X = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))


def low(enabled=True):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


class Net(nn.Module):
    def __init__(self, context=None) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.block = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8), nn.Softmax(-1))
        self.context = context

    def forward(self, x):
        x = self.first(x)
        if self.context is None:
            return self.block(x)
        with self.context():
            return self.block(x)


CONTEXTS = {
    "autocast": low,
    "no autocast": lambda: low(False),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
}


@pytest.mark.parametrize("method", ["auto", "export"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_layers_inside_of_a_context_are_sites(name, method):
    model = Net(CONTEXTS[name]).eval()
    graph_module = capture(model, X, method=method)
    found, expected = graph_module(X + 1), model(X + 1)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    small = balf_fx.compile(model, [X, X + 1], params=0.7, capture=method, progress=False)
    assert set(balf_fx.plan(small).ranks) == {"first", "block.0", "block.3"}
    assert small(X).dtype == expected.dtype
    assert not torch.is_autocast_enabled("cpu")
    with torch.enable_grad():
        prepared = balf_fx.prepare(model, X, capture=method, sensitivity=True)
    balf_fx.calibrate(prepared, [X], progress=False)
    samples = [module.sample for module in prepared.modules() if hasattr(module, "sample")]
    assert len(samples) == 3
    assert all(sample is not None for sample in samples)


@pytest.mark.parametrize("method", ["symbolic_trace", "export"])
def test_a_model_that_is_called_inside_of_autocast(method):
    def forward(model, x):
        with low():
            return model(x)

    model = Net().eval()
    small = balf_fx.compile(model, [X, X + 1], params=1.0, capture=method, forward=forward, progress=False)
    assert torch.equal(forward(small, X), forward(model, X))
    assert torch.equal(small(X), forward(model, X))
    smaller = balf_fx.compile(model, [X, X + 1], params=0.7, capture=method, forward=forward, progress=False)
    assert forward(smaller, X).dtype == forward(model, X).dtype


def test_the_backend_leaves_no_context_open():
    model = Net(low).eval()
    options = {"params": 0.7, "calibration_steps": 2, "inner": "eager", "progress": False}
    small = torch.compile(model, backend="balf", options=options)
    with torch.no_grad():
        outputs = [small(X + i) for i in range(4)]
    assert balf_fx.plan(small).params_kept <= 0.7
    assert {output.dtype for output in outputs} == {model(X).dtype}
    assert not torch.is_autocast_enabled("cpu")


class Mapped(Net):
    def forward(self, x):
        return torch.vmap(self.block)(self.first(x))


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="torch 2.8 does not export vmap with a dynamic batch")
def test_operations_of_vmap_become_operations_on_batches():
    model = Mapped().eval()
    assert torch.equal(capture(model, X)(X + 1), model(X + 1))
    small = balf_fx.compile(model, [X, X + 1], params=0.7, progress=False)
    assert balf_fx.report(small).params_kept <= 0.7
    assert small(X).shape == model(X).shape


def test_transforms_that_stay_in_a_graph_are_named():
    graph = fx.Graph()
    graph.placeholder("x")
    graph.call_function(torch._C._functorch._vmap_increment_nesting, (3, "error"))
    with pytest.raises(CaptureError, match=r"transform of torch\.func.*operations on batches"):
        check_transforms(fx.GraphModule(nn.Module(), graph))


def test_autocast_leaves_the_users_weights_alone():
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    model.append(model[0])  # of which both calls are cast alike
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch)

    x = torch.randn(32, 16)
    small = balf_fx.compile(model, [x], params=0.9, effort="fast", forward=forward, progress=False)
    assert small(x).dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
