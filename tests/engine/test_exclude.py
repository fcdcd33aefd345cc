"""`exclude` leaves a layer as it is, bit for bit; `dense` leaves its rank alone."""

import pytest
import torch
from architectures import make
from small_models import ConvNet, randomise_batchnorm

import balf_fx
from balf_fx.backend import balf

EFFORTS = ["fast", "balanced", "best"]
CAPTURES = ["symbolic_trace", "export"]
LAYERS = {
    "mlp": ["down"],  # reads the hidden features
    "gated mlp": ["w1"],  # writes half of what is read
    "inverted residual": ["block.2"],  # depthwise, between layers that could be narrower
    "transformer": ["qkv"],  # writes queries, keys and values
    "conv net": ["block.0"],  # with a BatchNorm behind it
    "conv net, depthwise": ["block.3"],  # behind another BatchNorm
}
BATCHNORMS = {"conv net": ["block.1"]}
TARGET = 0.75


def subject(name, count=2):
    if name.startswith("conv net"):
        return randomise_batchnorm(ConvNet()).eval(), list(torch.randn(count, 48, 3, 12, 12))
    return make(name, count=count)


def compress(name, count=2, **options):
    model, batches = subject(name, count)
    return model, balf_fx.compile(model, batches, **{"flops": TARGET, "progress": False, **options})


def changed(model, small, layers):
    """Which tensors of some layers are not bit for bit what they were."""
    before, after = model.state_dict(), small.state_dict()
    own = [key for key in before if any(key.startswith(f"{layer}.") for layer in layers)]
    own = [key for key in own if not key.endswith("num_batches_tracked")]
    assert own
    return [key for key in own if key not in after or not torch.equal(before[key], after[key])]


def assert_untouched(name, model, small):
    assert changed(model, small, [*LAYERS[name], *BATCHNORMS.get(name, [])]) == []
    plan = balf_fx.plan(small)
    assert plan.flops_kept <= TARGET
    assert not any(set(LAYERS[name]) & set(width.layers) for width in plan.widths)
    assert not any(layer.name in LAYERS[name] for layer in plan.layers)
    assert plan.layers  # there was something to do elsewhere


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", LAYERS)
def test_an_excluded_layer_keeps_its_weights_bit_for_bit(name, effort, capture):
    model, small = compress(name, exclude=LAYERS[name], effort=effort, capture=capture)
    assert_untouched(name, model, small)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", ["mlp", "inverted residual", "conv net"])
def test_so_does_a_layer_that_include_leaves_out(name, effort):
    model = subject(name)[0]
    others = [path for path, module in model.named_modules() if hasattr(module, "weight") and path not in LAYERS[name]]
    include = [path for path in others if path not in ("bn", "block.1")]
    model, small = compress(name, include=include, effort=effort)
    assert_untouched(name, model, small)


@pytest.mark.parametrize("name", LAYERS)
def test_without_it_the_layer_would_have_changed(name):
    model, small = compress(name, flops=0.5)
    assert changed(model, small, LAYERS[name])


@pytest.mark.parametrize(
    ("name", "effort"), [*((name, "best") for name in LAYERS), ("mlp", "fast"), ("inverted residual", "balanced")]
)
def test_the_backend_leaves_an_excluded_layer_the_users_own_tensors(name, effort):
    torch.compiler.reset()
    model, batches = subject(name)
    graphs = []

    def inner(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module

    options = {"flops": TARGET, "exclude": LAYERS[name], "effort": effort, "calibration_steps": 2, "inner": inner}
    compiled = torch.compile(model, backend=balf, options={**options, "progress": False})
    with torch.no_grad():
        for batch in (*batches, batches[0]):
            compiled(batch)
    (graph_module,) = graphs
    held = {id(tensor) for tensor in (*graph_module.parameters(), *graph_module.buffers())}
    for layer in (*LAYERS[name], *BATCHNORMS.get(name, [])):
        assert all(id(parameter) in held for parameter in model.get_submodule(layer).parameters())
    plan = balf_fx.plan(compiled)
    assert plan.flops_kept <= TARGET
    assert not any(layer.name in LAYERS[name] for layer in plan.layers)
    assert plan.layers
    torch.compiler.reset()


def test_a_file_makes_the_same_model_of_it(tmp_path):
    model, small = compress("conv net", exclude=LAYERS["conv net"], effort="fast")
    balf_fx.save(small, tmp_path / "small.safetensors")
    loaded = balf_fx.load(tmp_path / "small.safetensors", randomise_batchnorm(ConvNet()).eval())
    assert_untouched("conv net", model, loaded)
    x = torch.randn(4, 3, 12, 12)
    assert torch.equal(loaded(x), small(x))


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize(("name", "layer"), [("mlp", "down"), ("transformer", "proj"), ("conv net", "head")])
def test_a_dense_layer_has_no_factors_and_is_refitted(name, layer, effort, capture):
    options = {"dense": [layer], "widths": False, "pivot": False, "effort": effort, "capture": capture}
    model, small = compress(name, 6, **options)
    assert balf_fx.plan(small).ranks[layer] is None
    assert balf_fx.plan(small).flops_kept <= TARGET
    assert small.get_parameter(f"{layer}.weight").shape == model.get_parameter(f"{layer}.weight").shape
    assert bool(changed(model, small, [layer])) is (effort == "best")


@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_dense_layers_may_become_narrower(effort):
    _, small = compress("mlp", dense=["up", "down"], effort=effort)
    assert set(balf_fx.plan(small).ranks.values()) == {None}
    (width,) = balf_fx.plan(small).widths
    assert width.size < width.features == 32
    assert small.get_parameter("up.weight").shape == (width.size, 12)
    assert small.get_parameter("down.weight").shape == (10, width.size)


def test_the_backend_knows_dense_layers_too():
    torch.compiler.reset()
    model, batches = make("mlp")
    options = {"flops": TARGET, "dense": ["*"], "calibration_steps": 2, "inner": "eager", "progress": False}
    compiled = torch.compile(model, backend=balf, options=options)
    with torch.no_grad():
        for batch in (*batches, batches[0]):
            compiled(batch)
    plan = balf_fx.plan(compiled)
    assert set(plan.ranks.values()) == {None}
    assert [width.size < width.features for width in plan.widths] == [True]
    torch.compiler.reset()
