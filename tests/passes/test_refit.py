import copy
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import balf_fx
from balf_fx.calibration.pieces import Pieces
from balf_fx.errors import CalibrationError, OptionError
from balf_fx.graph.annotation import annotate, annotation, sites
from balf_fx.graph.site import Reason, Refusal
from balf_fx.passes import Allocate, Annotate, Factorize, InsertObservers, Refit, Score
from balf_fx.passes.refit import _Solver
from balf_fx.progress import Progress
from balf_fx.refit.lockstep import Lockstep
from balf_fx.refit.offload import Shelf, Shelved
from balf_fx.refit.problems import Problem


class Residual(nn.Module):
    """A residual stream, a depthwise convolution, an in-place ReLU and a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.first, self.second = nn.Conv2d(12, 24, 1), nn.Conv2d(24, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.qkv, self.head = nn.Linear(12, 36), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.second(F.relu(self.first(x), inplace=True))
        x = F.relu_(self.depthwise(x)).flatten(2).mT
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))


def calibrated(model, batches, **options):
    prepared = balf_fx.prepare(model, batches[0], **options)
    balf_fx.calibrate(prepared, batches, progress=False)
    return prepared


def chosen(model, ranks, inputs):
    """A graph of a model of one input, after Allocate, and the name of its placeholder."""
    graph_module = fx.symbolic_trace(model)
    for apply in (Annotate(), InsertObservers()):
        apply(graph_module)
    for value in inputs:
        graph_module(value)
    Score()(graph_module)
    Allocate(ranks=ranks)(graph_module)
    (placeholder,) = graph_module.graph.find_nodes(op="placeholder")
    return graph_module, str(placeholder.target)


def solutions(graph_module):
    return {site.name: annotation(nodes[0]).refit for site, nodes in sites(graph_module).items()}


def distance(model, other, batches):
    with torch.no_grad():
        return sum(float((model(batch) - other(batch)).square().sum()) for batch in batches)


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("factors", ["activations", "sensitivity"])
@pytest.mark.parametrize("mode", ["full", "up"])
def test_refit_brings_the_answer_nearer(mode, factors, capture):
    kept = []
    for seed in range(3):
        torch.manual_seed(seed)
        model, batches = Residual().eval(), list(torch.randn(4, 16, 3, 8, 8))
        prepared = calibrated(model, batches, sensitivity=factors == "sensitivity", capture=capture)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        once = balf_fx.convert(prepared, flops=0.5, factors=factors, batches=batches, refit=False, progress=False)
        refit = balf_fx.convert(prepared, flops=0.5, factors=factors, batches=batches, refit=mode, progress=False)
        fresh = list(torch.randn(4, 16, 3, 8, 8))
        assert distance(model, refit, batches) < distance(model, once, batches)
        kept.append(distance(model, refit, fresh) / distance(model, once, fresh))
        if factors == "activations":  # otherwise the allocation is chosen with the refit in mind
            assert balf_fx.plan(refit).ranks == balf_fx.plan(once).ranks
        assert balf_fx.report(refit).flops_kept <= 0.5
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert refit(fresh[0][:3]).shape == (3, 5)
    assert sum(kept) / len(kept) < 0.9  # of these models; not of each


def test_where_nothing_is_lost_nothing_changes():
    model, batches = Residual().eval(), list(torch.randn(2, 8, 3, 8, 8))
    refit = balf_fx.convert(calibrated(model, batches), flops=1.0, batches=batches, progress=False)
    torch.testing.assert_close(refit(batches[0]), model(batches[0]))


@pytest.mark.parametrize("mode", ["full", "up"])
def test_a_linear_network_at_full_rank_is_exact(mode):
    widths = (12, 4, 12, 12, 20, 12)
    model = nn.Sequential(*map(nn.Linear, widths, widths[1:])).double().eval()
    batches = list(torch.randn(3, 40, 12, dtype=torch.float64))
    ranks = {"2": 4, "3": 5, "4": 4}  # their inputs have rank 4
    prepared = calibrated(model, batches)
    refit = balf_fx.convert(prepared, allocation=ranks, batches=batches, refit=mode, progress=False)
    torch.testing.assert_close(refit(batches[0]), model(batches[0]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", ["full", "up"])
@pytest.mark.parametrize("factors", ["activations", "sensitivity"])
def test_chunks_and_files_change_nothing(mode, factors, monkeypatch):
    model, batches = Residual().double().eval(), list(torch.randn(3, 8, 3, 8, 8, dtype=torch.float64))
    prepared = calibrated(model, batches, sensitivity=factors == "sensitivity")
    options = {"flops": 0.5, "factors": factors, "batches": batches, "refit": mode, "progress": False}
    monkeypatch.setattr(Pieces, "of", lambda self, piece, index: [piece])  # tests/calibration/test_pieces.py
    parked = []
    park = Shelf.park
    monkeypatch.setattr(Shelf, "park", lambda self, values: parked.append(self.nbytes(values)) or park(self, values))
    expected = balf_fx.convert(prepared, **options).state_dict()
    assert not parked
    for memory in (0, 100_000):
        found = balf_fx.convert(prepared, memory=memory, **options).state_dict()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
        assert max(parked) > 0
        parked.clear()
    for name, value in (("CHUNK_ELEMENTS", 5_000), ("_CHUNK_POSITIONS", 1)):
        monkeypatch.setattr(f"balf_fx.refit.windows.{name}", value)
        torch.testing.assert_close(balf_fx.convert(prepared, **options).state_dict(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", ["full", "up"])
def test_some_of_many_pixels_tell_as_much_as_all(mode, monkeypatch):
    model, batches = Residual().eval(), list(torch.randn(4, 16, 3, 16, 16))
    prepared = calibrated(model, batches)
    fresh = list(torch.randn(4, 16, 3, 16, 16))

    def refit(enough):
        monkeypatch.setattr("balf_fx.refit.windows._ENOUGH", enough)
        return balf_fx.convert(prepared, flops=0.8, batches=batches, refit=mode, progress=False)

    once = balf_fx.convert(prepared, flops=0.8, batches=batches, refit=False, progress=False)
    gain = distance(model, once, fresh) - distance(model, refit(10**9), fresh)
    assert gain > 0
    assert distance(model, once, fresh) - distance(model, refit(20), fresh) > 0.9 * gain


def test_parts_with_ranks_of_their_own_are_refitted_too():
    model, batches = Residual().eval(), list(torch.randn(4, 16, 3, 8, 8))
    prepared = calibrated(model, batches)
    ranks = {"second": 3, "qkv": (2, 3, None)}
    once = balf_fx.convert(prepared, allocation=ranks, progress=False)
    up, full = (
        balf_fx.convert(prepared, allocation=ranks, batches=batches, refit=mode, progress=False)
        for mode in ("up", "full")
    )
    assert distance(model, full, batches) < distance(model, up, batches) < distance(model, once, batches)
    torch.testing.assert_close(up.get_parameter("qkv.0.weight"), once.get_parameter("qkv.0.weight"))


def test_up_keeps_right_factors_and_dense_weights(conv_net, images):
    prepared = calibrated(conv_net, images)
    once, up = (
        balf_fx.convert(prepared, flops=0.5, batches=images, refit=mode, progress=False) for mode in (False, "up")
    )
    rows = balf_fx.report(once).sites
    kept = [f"{row.name}.0.weight" if row.rank is not None else f"{row.name}.weight" for row in rows]
    assert all(torch.equal(once.get_parameter(name), up.get_parameter(name)) for name in kept)
    assert distance(conv_net, up, images) < distance(conv_net, once, images)


def test_an_unknown_mode_is_an_error():
    with pytest.raises(OptionError, match="'full', 'up'"):
        Refit([], mode="down")


@pytest.mark.parametrize("factors", ["activations", "svd"])
def test_compile_refits_too(conv_net, images, factors):
    options = {"flops": 0.5, "factors": factors, "progress": False}
    once, refit = (balf_fx.compile(conv_net, iter(images), refit=refit, **options) for refit in (False, True))
    assert distance(conv_net, refit, images) < distance(conv_net, once, images)


def test_the_prepared_graph_stays_as_it_is(conv_net, images):
    prepared = calibrated(conv_net, images, sensitivity=True)
    before = copy.deepcopy(prepared.state_dict())
    moments = [module.moments for module in prepared.modules() if hasattr(module, "moments")]
    balf_fx.convert(prepared, flops=0.5, factors="sensitivity", batches=images, progress=False)
    assert all(torch.equal(before[name], value) for name, value in prepared.state_dict().items())
    assert all(
        a is b for a, b in zip(moments, (m.moments for m in prepared.modules() if hasattr(m, "moments")), strict=True)
    )


def test_a_forward_that_does_not_call_the_model_is_an_error(conv_net, images):
    prepared = calibrated(conv_net, images)
    with pytest.raises(CalibrationError, match="did not call the model"):
        balf_fx.convert(prepared, flops=0.5, batches=images, forward=lambda model, batch: None, progress=False)


@pytest.mark.parametrize("mode", ["full", "up"])
def test_batches_of_any_size_will_do(mode):
    model, batches = Residual().eval(), [torch.randn(size, 3, 8, 8) for size in (16, 1, 0, 16)]
    prepared = calibrated(model, batches)
    once, refit = (
        balf_fx.convert(prepared, flops=0.5, batches=batches, refit=refit, progress=False) for refit in (False, mode)
    )
    assert distance(model, refit, batches) < distance(model, once, batches)


class Behind(nn.Module):
    """A residual block whose branch ends in something that hands it on."""

    def __init__(self, last) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = (nn.Linear(a, b) for a, b in ((8, 12), (12, 32), (32, 12), (12, 5)))
        self.last = last

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(x + self.last(self.down(F.gelu(self.up(x))))))


@pytest.mark.parametrize(
    "last",
    [
        nn.Identity(),
        nn.Sequential(nn.Dropout(0.5), nn.Identity()),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: torch.dropout(x, 0.5, False),
    ],
)
def test_the_residual_stream_is_seen_behind_what_hands_a_value_on(last):
    torch.manual_seed(0)
    plain, batches = Behind(nn.Sequential()).eval(), list(torch.randn(3, 128, 8))
    model = Behind(last).eval()
    model.load_state_dict(plain.state_dict())
    options = {"allocation": {"stem": 4, "up": 4, "down": 4}, "refit": "full", "progress": False}
    one, other = (balf_fx.compile(m, batches, factors="sensitivity", **options) for m in (plain, model))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)
    stream = balf_fx.compile(model, batches, factors="sensitivity", **{**options, "refit": False})
    assert not torch.equal(stream.state_dict()["down.0.weight"], other.state_dict()["down.0.weight"])


class Cut(nn.Module):
    """A residual block between two layers, so that what is added to a layer's output has moved, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(10, 10), nn.Linear(10, 5)

    def forward(self, x):
        return self.head(torch.tanh(x + self.inner(torch.tanh(x))))


@pytest.mark.parametrize("mode", ["full", "up"])
def test_the_part_of_a_program_is_refitted_as_in_the_whole(mode):
    first, second = nn.Linear(8, 10).double().eval(), Cut().double().eval()
    batches = list(torch.randn(3, 40, 8, dtype=torch.float64))
    whole, name = chosen(nn.Sequential(first, second), {"0": 4, "1.inner": 3}, batches)
    Refit([{name: batch} for batch in batches], mode)(whole)

    ranks = {"0": 4}
    compressed = balf_fx.compile(
        nn.Sequential(first), iter(batches), allocation=ranks, effort="fast", refit=False, progress=False
    )
    with torch.no_grad():
        values, handed = [first(batch) for batch in batches], [compressed(batch) for batch in batches]
    part, name = chosen(second, {"inner": 3}, values)
    Refit([{name: value} for value in values], mode, handed=[{name: value} for value in handed])(part)
    apart, _ = chosen(second, {"inner": 3}, values)
    Refit([{name: value} for value in values], mode)(apart)

    expected = solutions(whole)
    assert expected["0"] is None
    for layer, found in solutions(part).items():
        ((left, right, bias),) = [(part.left, part.right, part.bias) for part in found]
        (wanted,) = expected[f"1.{layer}"]
        if wanted.left is None:
            assert left is None
        else:
            torch.testing.assert_close(left @ right, wanted.left @ wanted.right)
        torch.testing.assert_close(right, wanted.right)
        torch.testing.assert_close(bias, wanted.bias)
    assert solutions(apart)["inner"] is None


def test_what_is_handed_goes_batch_by_batch():
    with pytest.raises(OptionError, match="handed has 1 batches, inputs has 2"):
        Refit([{}, {}], handed=[{}])


@pytest.mark.parametrize("mode", ["full", "up"])
@pytest.mark.parametrize("excluded", ["second", "depthwise", "qkv"])
def test_excluded_layers_stay_as_they_are(mode, excluded):
    model, batches = Residual().eval(), list(torch.randn(3, 16, 3, 8, 8))
    ranks = {"stem": 6, "first": 4, "second": 6, "qkv": 8}
    del ranks[excluded if excluded in ranks else "second"]
    weight, bias = (model.get_parameter(f"{excluded}.{name}").detach().clone() for name in ("weight", "bias"))

    def refit(names):
        graph_module, name = chosen(copy.deepcopy(model), ranks, batches)
        for node in graph_module.graph.nodes:
            if node.target in names:
                annotate(node, site=None, refusal=Refusal(node.target, "layer", Reason.EXCLUDED))
        Refit([{name: batch} for batch in batches], mode)(graph_module)
        Factorize()(graph_module)
        return graph_module

    kept, solved = refit([excluded]), refit([])
    assert torch.equal(kept.get_parameter(f"{excluded}.weight"), weight)
    assert torch.equal(kept.get_parameter(f"{excluded}.bias"), bias)
    assert not torch.equal(solved.get_parameter(f"{excluded}.bias"), bias)
    others = [name for name, _ in solved.named_parameters() if not name.startswith((excluded, "stem"))]
    assert all(kept.get_parameter(name).shape == solved.get_parameter(name).shape for name in others)


class Fresh(Sequence):
    """Values that are made anew at each access, as those read from files are."""

    def __init__(self, values) -> None:
        self.values, self.made = values, []

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        found = {name: value.clone() for name, value in self.values[index].items()}
        self.made += map(weakref.ref, found.values())
        return found

    def alive(self):
        return sum(reference() is not None for reference in self.made)


@pytest.mark.parametrize("mode", ["full", "up"])
@pytest.mark.parametrize("memory", [0, 30_000, 1 << 30])
def test_inputs_that_are_read_from_files_change_nothing(mode, memory):
    model, batches = Residual().eval(), list(torch.randn(4, 8, 3, 8, 8))
    ranks = {"stem": 6, "first": 4, "second": 6, "qkv": 8}

    def refit(wrap):
        graph_module, name = chosen(model, ranks, batches)
        handed = [{name: batch + 0.1} for batch in batches]
        Refit(wrap([{name: batch} for batch in batches]), mode, memory, wrap(handed))(graph_module)
        return [
            (part.left, part.right, part.bias) for found in solutions(graph_module).values() for part in found or ()
        ]

    def shelved(values):
        found = Shelved(memory)
        for value in values:
            found.append(value)
        return found

    expected = refit(list)
    assert len(expected) > 3
    for wrap in (Fresh, shelved):
        for own, other in zip(expected, refit(wrap), strict=True):
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_a_walk_does_not_hold_all_inputs():
    model, batches = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), list(torch.randn(6, 16, 8))
    graph_module, name = chosen(model, {"0": 3}, batches)
    inputs = Fresh([{name: batch} for batch in batches])
    most = []
    nodes = [node for node in graph_module.graph.nodes if node.op != "output"]
    walk = Lockstep(graph_module, inputs, memory=0)
    layers = {node for node in nodes if node.op == "call_module"}
    walk.run(nodes, layers, lambda node: most.extend(inputs.alive() for _ in walk.batches()))
    assert len(inputs.made) == 2 * len(batches)  # once for their sizes, once for their values
    assert max(most) <= 1


class Recording(Progress):
    """Notes what it is given, and how far the work has come."""

    def __init__(self) -> None:
        self.names, self.weights = [], []

    def track(self, items, weights=()):
        self.weights = dict(zip([node.name for node in items], weights, strict=True))
        for node in items:
            self.names.append(node.name)
            yield node


@pytest.mark.parametrize("mode", ["full", "up"])
def test_progress_goes_node_by_node_and_counts_what_is_solved(mode):
    model, batches = Residual().eval(), list(torch.randn(2, 16, 3, 8, 8))
    prepared = calibrated(model, batches)
    Score()(prepared)
    Allocate(ranks={"first": 4})(prepared)
    (placeholder,) = prepared.graph.find_nodes(op="placeholder")
    progress = Recording()
    refit = Refit([{str(placeholder.target): batch} for batch in batches], mode, progress=progress)
    assert refit == Refit(refit.inputs, mode)
    refit(prepared)
    solved = {node.name for node in prepared.graph.nodes if annotation(node).refit is not None}
    assert solved == {"second", "depthwise", "qkv", "head"}
    assert progress.names == [node.name for node in prepared.graph.nodes if node.name in progress.weights]
    assert progress.weights["second"] > progress.weights["first"]  # which is not solved
    assert progress.weights["second"] > progress.weights["depthwise"] > progress.weights["head"] > 0


@pytest.mark.parametrize("memory", [0, 40_000, 120_000])
def test_values_in_memory_stay_within_the_bound(memory, monkeypatch):
    """But for those of the batch that runs."""
    model, batches = Residual().eval(), list(torch.randn(6, 8, 3, 8, 8))
    prepared = calibrated(model, batches)
    monkeypatch.setattr(Pieces, "of", lambda self, piece, index: [piece])
    seen, walks = [], Lockstep.batches

    def watched(self):
        for batch in walks(self):
            others = [each for each in self._batches if each is not batch and not each._shelf.used]
            seen.append(sum(each._shelf.nbytes((each.original, each.compressed)) for each in others))
            yield batch

    monkeypatch.setattr(Lockstep, "batches", watched)
    options = {"flops": 0.6, "batches": batches, "refit": True, "progress": False}
    balf_fx.convert(prepared, memory=memory, **options)
    assert max(seen) <= memory
    seen.clear()
    balf_fx.convert(prepared, **options)
    assert max(seen) > 120_000


@pytest.mark.parametrize("memory", [3_000_000, "3M"])
def test_the_walk_of_compile_takes_half_of_the_memory(memory, monkeypatch):
    found, start = [], Lockstep.__init__

    def started(self, *arguments):
        start(self, *arguments)
        found.append(self._memory)

    monkeypatch.setattr(Lockstep, "__init__", started)
    batches = list(torch.randn(2, 8, 3, 8, 8))
    balf_fx.compile(Residual().eval(), batches, flops=0.6, memory=memory, progress=False)
    assert found
    assert set(found) == {1_500_000 if isinstance(memory, int) else 3 * 2**19}


class FirstOfTwo(nn.Module):
    """Only the first of two positions reaches the answer; the second one has another distribution."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))))[:, 0]


@pytest.mark.parametrize("mode", ["full", "up"])
def test_positions_count_as_much_as_their_gradients(mode):
    """Those without a gradient do not count: other values there give the same layers."""
    model = FirstOfTwo().double().eval()
    x = torch.randn(3, 40, 2, 12, dtype=torch.float64)
    plain, other = list(x), [batch * torch.tensor([[1.0], [3.0]]) + torch.tensor([[0.0], [1.0]]) for batch in x]
    options = {"refit": mode, "progress": False, "centred": True, "seed": 0, "factors": "sensitivity"}
    ranks = {"first": 3, "second": 4}
    found = [balf_fx.compile(model, batches, allocation=ranks, **options) for batches in (plain, other)]
    torch.testing.assert_close(found[0].state_dict(), found[1].state_dict(), rtol=1e-6, atol=1e-8)


class Wide(nn.Module):
    """Layers with more outputs than inputs: grouped, fused, narrowed, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.thin = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.Conv2d(32, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 60, 1, groups=2)
        self.back = nn.Conv2d(60, 12, 1)
        self.qkv, self.up, self.down = nn.Linear(12, 48), nn.Linear(16, 40), nn.Linear(40, 12)
        self.head = nn.Linear(12, 70, bias=False)

    def forward(self, x):
        x = self.thin(F.gelu(self.stem(x)))
        x = self.back(F.gelu(self.grouped(x))).flatten(2).mT
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.down(F.gelu(self.up(F.scaled_dot_product_attention(q, k, v))))
        return self.head(x)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"flops": 0.4, "refit": "full"}, {"grouped", "qkv", "up", "head"}),
        ({"flops": 0.4, "refit": "up"}, {"grouped", "head"}),
        ({"flops": 0.3, "refit": "full", "widths": False}, {"grouped", "qkv", "up", "head"}),
        ({"flops": 0.3, "refit": "up", "widths": False}, {"grouped", "qkv", "up", "head"}),
    ],
)
def test_a_layer_with_more_outputs_than_inputs_is_solved_as_by_its_outputs(options, names, monkeypatch):
    torch.manual_seed(3)
    model, batches = Wide().double().eval(), list(torch.randn(4, 12, 3, 6, 6, dtype=torch.float64))
    fewer, solve = [], Problem.solve

    def noted(self, walk):
        fewer.append(self.target.site.name if self.linear is not None else None)
        return solve(self, walk)

    monkeypatch.setattr(Problem, "solve", noted)
    options |= {"effort": "best", "pivot": False, "progress": False}
    small = balf_fx.compile(model, batches, **options)
    assert names <= set(fewer)
    monkeypatch.setattr(_Solver, "_linear_target", lambda *_: None)
    fewer.clear()
    expected = balf_fx.compile(model, batches, **options)
    assert set(fewer) == {None}
    for batch in batches:
        torch.testing.assert_close(small(batch), expected(batch), rtol=1e-6, atol=1e-8)


def test_values_that_no_node_reads_are_not_kept():
    """The logits of a language model, for instance."""
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 90, bias=False)).eval()
    inputs = list(torch.randn(4, 30, 6))
    graph_module, name = chosen(model, {"0": 2}, inputs)
    walk, kept = Lockstep.batches, []

    def batches(self):
        for batch in walk(self):
            yield batch
            kept.extend(other for other in self._batches if other is not batch and "_1" in map(str, other.original))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lockstep, "batches", batches)
        Refit([{name: value} for value in inputs])(graph_module)
    assert not kept
    assert solutions(graph_module)["1"] is not None


class Branches(nn.Module):
    """Blocks of two branches beside a stream, as in GPT-J, whose sum is written in one order or another."""

    def __init__(self, stream_first):
        super().__init__()
        make = lambda: nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24))  # noqa: E731
        self.one, self.other = (nn.ModuleList(make() for _ in range(3)) for _ in range(2))
        self.stem, self.head, self.stream_first = nn.Linear(16, 24), nn.Linear(24, 8), stream_first

    def forward(self, x):
        x = self.stem(x)
        for one, other in zip(self.one, self.other, strict=True):
            x = (x + one(x)) + other(x) if self.stream_first else (one(x) + other(x)) + x
        return self.head(x)


def test_the_error_of_a_stream_is_corrected_however_its_sum_is_written():
    batches = list(torch.randn(4, 64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    found = []
    for stream_first in (True, False):
        torch.manual_seed(0)
        model = Branches(stream_first).double().eval()
        small = balf_fx.compile(model, batches, flops=0.5, progress=False)
        found.append(float((small(batches[0]) - model(batches[0])).square().mean()))
    assert found[0] == pytest.approx(found[1], rel=0.05)
