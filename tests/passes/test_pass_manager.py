"""Passes of others between ours, and what they can rely on in `node.meta`."""

import copy
import dataclasses

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager, pass_result_wrapper
from torch.fx.passes.shape_prop import ShapeProp

import balf_fx
from balf_fx.errors import PassError
from balf_fx.graph.annotation import META_KEY, Annotation, annotation, graph_record, sites
from balf_fx.graph.flops import profile
from balf_fx.passes import (
    Allocate,
    Annotate,
    Factorize,
    FindPivots,
    FindWidths,
    InsertObservers,
    Narrow,
    Pivot,
    RemoveObservers,
    Score,
    ScoreWidths,
    SplitBias,
)

BITS = "bits"


@dataclasses.dataclass(frozen=True)
class ChooseBits:
    """A pass of someone else's: fewer bits for the factors of sites that the allocator found easy to compress."""

    threshold: float = 0.95

    def __call__(self, graph_module):
        for node in graph_module.graph.nodes:
            mark = node.meta.get(META_KEY)
            if isinstance(mark, Annotation) and mark.choice is not None:
                easy = mark.choice.chosen.rank is not None and mark.choice.energy_kept > self.threshold
                node.meta[BITS] = 4 if easy else 8
        return PassResult(graph_module, False)


@dataclasses.dataclass(frozen=True)
class RoundWeights:
    """Another one: round the weights of all modules whose nodes say to how many bits."""

    def __call__(self, graph_module):
        chosen = [node for node in graph_module.graph.find_nodes(op="call_module") if BITS in node.meta]
        for node in chosen:
            layer = graph_module.get_submodule(node.target)
            levels = 2 ** (node.meta[BITS] - 1) - 1
            flat = layer.weight.detach().flatten(1)
            scale = flat.abs().amax(1, keepdim=True) / levels
            layer.weight = nn.Parameter(((flat / scale).round() * scale).reshape(layer.weight.shape))
        return PassResult(graph_module, bool(chosen))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8)).eval()


@pytest.fixture
def batches():
    return list(torch.randn(6, 32, 16) @ torch.diag(torch.linspace(0.05, 2, 16)))


def calibrated(model, batches):
    """Observed by a manager of our passes, and calibrated."""
    graph_module = fx.symbolic_trace(copy.deepcopy(model))
    profile(graph_module, [batches[0]])
    observed = PassManager([Annotate(), FindWidths(), InsertObservers()])(graph_module).graph_module
    with torch.no_grad():
        for batch in batches:
            observed(batch)
    return observed


def test_quantization_passes_stand_between_and_after_ours(batches):
    model = mlp()
    observed = calibrated(model, batches)
    passes = [Score(), Allocate(flops=0.6), ChooseBits(), RemoveObservers(), Narrow(), Factorize(), RoundWeights()]
    result = PassManager(passes)(observed)
    assert result.modified
    layers = {node.target: node for node in result.graph_module.graph.find_nodes(op="call_module")}
    linear = {name: result.graph_module.get_submodule(name) for name in layers if name[0] in "024"}
    assert set(linear) > {"2.0", "2.1"}
    assert {layers[name].meta[BITS] for name in linear} == {4, 8}
    for name, layer in linear.items():
        levels = max(len(row.unique()) for row in layer.weight.detach())
        assert levels <= 2 ** layers[name].meta[BITS] - 1
    x = torch.cat(batches)
    assert (result.graph_module(x) - model(x)).square().mean() < 0.1 * model(x).square().mean()


def test_the_managed_pipeline_is_the_librarys_own(batches):
    model = mlp()
    scored = [FindPivots(), Score(), Allocate(flops=0.6)]
    rewritten = [RemoveObservers(), Pivot(), Narrow(), Factorize(), SplitBias()]
    managed = PassManager(scored + rewritten)(calibrated(model, batches)).graph_module
    own = balf_fx.compile(model, batches, flops=0.6, factors="activations", refit=False, progress=False)
    assert managed.state_dict().keys() == own.state_dict().keys()
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in managed.state_dict().items())


def filled(graph_module):
    """The fields that are set at all sites."""
    marks = [annotation(nodes[0]) for nodes in sites(graph_module).values()]
    assert marks
    fields = [{f.name for f in dataclasses.fields(m) if getattr(m, f.name) not in (None, (), False)} for m in marks]
    return set.intersection(*fields)


def test_each_pass_leaves_what_the_documentation_says(batches):
    graph_module = fx.symbolic_trace(mlp())
    profile(graph_module, [batches[0]])
    counted = {"flops", "shape"}
    assert graph_record(graph_module).flops > 0
    Annotate(exclude=["4"])(graph_module)
    assert filled(graph_module) == {*counted, "site", "calls"}
    (excluded,) = (node for node in graph_module.graph.nodes if annotation(node).refusal is not None)
    assert excluded.target == "4"
    FindWidths()(graph_module)
    assert graph_record(graph_module).widths
    InsertObservers(sensitivity=True)(graph_module)
    observed = {*counted, "site", "calls", "observer", "sensitivity"}
    assert filled(graph_module) == observed
    balf_fx.calibrate(graph_module, batches, progress=False)
    assert filled(graph_module) == observed
    FindPivots()(graph_module)
    assert all(site.pivots is not None for site in sites(graph_module))
    Score("sensitivity")(graph_module)
    assert filled(graph_module) == {*observed, "curve", "scored_with", "fingerprint"}
    assert all(annotation(nodes[0]).curve.loss > 0 for nodes in sites(graph_module).values())
    ScoreWidths()(graph_module)
    assert len(graph_record(graph_module).width_curves) == len(graph_record(graph_module).widths)
    Allocate(flops=0.6)(graph_module)
    assert filled(graph_module) == {*observed, "curve", "scored_with", "fingerprint", "choice"}
    kept = {node.name for nodes in sites(graph_module).values() for node in nodes if annotation(node).choice}
    RemoveObservers()(graph_module)
    Pivot()(graph_module)
    assert kept == {node.name for nodes in sites(graph_module).values() for node in nodes}
    Narrow()(graph_module)
    Factorize()(graph_module)
    rewritten = [node for node in graph_module.graph.find_nodes(op="call_module") if META_KEY not in node.meta]
    assert rewritten
    assert all(annotation(nodes[0]).choice.chosen.rank is None for nodes in sites(graph_module).values())
    assert graph_record(graph_module).allocation.target == 0.6
    assert graph_module(batches[0]).shape == (32, 8)


def test_nothing_but_one_key_is_written(batches):
    graph_module = calibrated(mlp(), batches)
    written = {key for node in graph_module.graph.nodes for key in node.meta}
    assert written == {META_KEY, "nn_module_stack"}  # the latter is tracing's


def test_passes_of_torch_and_torchao_take_their_turn(batches):
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8WeightOnlyConfig()
    model = mlp()

    def record_shapes(graph_module):
        ShapeProp(graph_module).propagate(batches[0])

    def quantize(graph_module):
        quantization.quantize_(graph_module, config)

    passes = [
        *(Score(), Allocate(flops=0.6), RemoveObservers()),
        pass_result_wrapper(record_shapes),  # not before: whatever runs an observed graph calibrates it
        *(Narrow(), Factorize()),
        pass_result_wrapper(quantize),
    ]
    result = PassManager(passes)(calibrated(model, batches)).graph_module
    layers = [module for module in result.modules() if isinstance(module, nn.Linear)]
    assert len(layers) > 3
    assert all(type(layer.weight.data) is not torch.Tensor for layer in layers)
    float_model = balf_fx.compile(
        model, batches, flops=0.6, factors="activations", refit=False, pivot=False, progress=False
    )
    assert all("tensor_meta" in node.meta for node in result.graph.nodes if not str(node.target).endswith(".0"))
    difference = (result(batches[0]) - float_model(batches[0])).square().mean()
    assert difference < 1e-3 * model(batches[0]).square().mean()


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Score(factors="svd")], "Score needs a graph with sites: run Annotate first"),
        ([Annotate(), Allocate(params=0.5)], "run Score first"),
        ([Annotate(), Score(factors="svd"), Factorize()], "run Score and Allocate first"),
        ([Annotate(), Score(factors="svd"), Allocate(flops=0.5)], "the graph's FLOPs were not counted"),
    ],
)
def test_a_pass_in_the_wrong_place_says_what_is_missing(passes, message):
    with pytest.raises(Exception, match="An error occurred when running") as error:
        PassManager(passes)(fx.symbolic_trace(mlp()))
    assert isinstance(error.value.__cause__, PassError)
    assert message in str(error.value.__cause__)


def test_observers_go_without_a_trace(batches):
    model = mlp()
    observed = calibrated(model, batches)
    assert RemoveObservers()(observed).modified
    assert not RemoveObservers()(observed).modified
    assert observed.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(observed(batches[0]), model(batches[0]))
    assert {node.op for node in observed.graph.nodes} == {"placeholder", "call_module", "output"}
    assert len(observed.graph.nodes) == 7
