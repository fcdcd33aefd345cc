"""Block by block, the result is that of all blocks at once, bit for bit, and earlier statistics are in files."""

import logging
import weakref

import pytest
import torch
from architectures import make
from expert_models import Mixture
from small_models import ConvNet, randomise_batchnorm
from torch import nn
from torch.nn import functional as F

import balf_fx
from balf_fx.calibration.observers import CovarianceObserver, SensitivityObserver, observer_of
from balf_fx.engine import blockwise, trials
from balf_fx.errors import CalibrationError, NonFiniteError
from balf_fx.graph.annotation import annotation, graph_record, sites
from balf_fx.passes.refit import _Solver

AMPLE, SMALL, TINY = "1GiB", 40_000, 1


class Text(nn.Module):
    """A language model with a tied table, whose batches have padding."""

    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(40, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids) * attention_mask.unsqueeze(-1)
        return self.head(x + self.down(F.silu(self.up(x))))


class Repeated(nn.Module):
    """A layer that is used in the first block and in the last."""

    def __init__(self):
        super().__init__()
        self.layer, self.other, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.layer(x))
        return self.head(F.relu(self.layer(F.relu(self.other(x)))))


class Untouched(nn.Module):
    """One of the outputs, and an input of the last layer, depend on no layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 5)

    def forward(self, x):
        scaled = 2 * x
        return self.head(F.relu(self.second(F.relu(self.first(x)))) + scaled), scaled


def texts():
    ids = torch.randint(40, (3, 6, 8))
    return [{"input_ids": each, "attention_mask": (torch.arange(8) < 5 + each[:, :1] % 3).long()} for each in ids]


def unequal():
    mixture = Mixture()
    nn.init.constant_(mixture.router.bias[-1:], -1000.0)  # the last expert is never chosen
    return mixture


MODELS = {
    **{
        name: lambda name=name: make(name)
        for name in (
            "mlp",
            "squeeze and excite",
            "joined",
            "skip",
            "chain",
            "normalised",
            "fused",
            "grouped",
            "transformer",
        )
    },
    "convolutions": lambda: (randomise_batchnorm(ConvNet()), list(torch.randn(3, 8, 3, 12, 12))),
    "padded text": lambda: (Text(), texts()),
    "untouched": lambda: (Untouched(), list(torch.randn(6, 2, 12))),
    "experts": lambda: (unequal(), list(torch.randn(3, 8, 6, 16))),
}


def squared(output, batch):
    """A loss of the user's."""
    return (output - batch.mean()).square().sum()


OPTIONS = {
    "balanced": {"effort": "balanced", "flops": 0.6},
    "best": {"flops": 0.6},
    "no widths": {"effort": "balanced", "flops": 0.6, "widths": False},
    "loss": {"effort": "balanced", "flops": 0.6, "loss": squared},
    "fast": {"effort": "fast", "params": 0.6},
    "balf": {**balf_fx.BALF, "params": 0.7},
    "svd": {"factors": "svd", "effort": "fast", "params": 0.6},
    "free": {},
    "separable": {"effort": "fast", "flops": 0.4, "separable": True},
}


def counted_walks(monkeypatch, name):
    found, plain = [], getattr(blockwise, name)
    monkeypatch.setattr(blockwise, name, lambda *args: (found.append(len(args[1])), plain(*args))[1])
    return found


@pytest.fixture
def walks(monkeypatch):
    """How many blocks each walk over a model had."""
    return counted_walks(monkeypatch, "walk")


@pytest.fixture
def walks_back(monkeypatch):
    """The same for walks back."""
    return counted_walks(monkeypatch, "walk_backward")


def small_batches(batches):
    """A few samples, so that the values of any block fit into the memory of `SMALL`."""
    return list(torch.cat(list(batches))[:12].split(2)) if isinstance(batches[0], torch.Tensor) else batches


def compressed(model, batches, **options):
    return balf_fx.compile(model, batches, **{"progress": False, "effort": "fast", "params": 0.6, **options})


def assert_same(one, other):
    assert one.code == other.code
    assert balf_fx.plan(one).to_json() == balf_fx.plan(other).to_json()
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, "fast") for name in MODELS if name != "untouched"),
        *(("convolutions", "balf"), ("convolutions", "separable"), ("fused", "svd"), ("padded text", "free")),
    ],
)
def test_the_result_is_that_of_all_blocks_at_once(name, options, walks):
    torch.manual_seed(0)
    model, batches = MODELS[name]()
    model.eval()
    pair = [
        balf_fx.compile(model, iter(batches), memory=memory, progress=False, **OPTIONS[options])
        for memory in (AMPLE, TINY)
    ]
    assert_same(*pair)
    # The statistics; with the fast effort, then the original and one or two allocations on a few samples.
    assert len(walks) in {"fast": (3, 4), "separable": (3, 4), "balf": (1,)}.get(options, (0,))
    assert all(count > 2 for count in walks)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, "balanced") for name in ("convolutions", "fused", "grouped", "experts", "padded text", "untouched")),
        *((name, "balanced") for name in ("joined", "skip", "chain")),
        *(("transformer", "best"), ("transformer", "no widths"), ("squeeze and excite", "loss")),
    ],
)
def test_with_gradients_too(name, options, walks_back):
    torch.manual_seed(0)
    model, batches = MODELS[name]()
    model.eval()
    larger = {
        "transformer": 60_000,
        "convolutions": 80_000,
        "experts": 320_000,
        "untouched": 16_000,
        "joined": 80_000,
        "skip": 80_000,
    }
    pair = [
        balf_fx.compile(model, iter(small_batches(batches)), memory=memory, progress=False, **OPTIONS[options])
        for memory in (AMPLE, larger.get(name, SMALL))
    ]
    assert_same(*pair)
    assert len(walks_back) == 1
    assert walks_back[0] > 1


def test_batches_are_run_in_pieces_where_a_block_does_not_fit(walks_back, monkeypatch):
    """The model is that of as many pieces at all layers at once."""
    model, batches = make("fused")
    batches = batches[0][:6].split(3)
    pair = [compressed(model, batches, memory=TINY, effort="balanced")]
    monkeypatch.setattr(blockwise, "_sizes", lambda _: {})
    pair.append(compressed(model, batches, memory=TINY, effort="balanced"))
    assert_same(*pair)
    assert len(walks_back) == 1


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_a_layer_in_several_blocks_has_sums_in_another_order(effort):
    model, batches = Repeated().eval(), list(torch.randn(6, 10, 12))
    one, other = (compressed(model, batches, memory=memory, effort=effort) for memory in (AMPLE, 3000))
    assert balf_fx.plan(one).ranks == balf_fx.plan(other).ranks
    torch.testing.assert_close(one.state_dict(), other.state_dict())


def test_a_module_and_a_checkpoint_are_the_same_too(tmp_path):
    model, batches = make("transformer")
    plain = compressed(model, batches, result="module", memory=AMPLE)
    for _ in range(2):
        again = compressed(model, batches, result="module", memory=TINY, checkpoint=tmp_path)
        torch.testing.assert_close(plain.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_statistics_of_finished_blocks_are_in_files(monkeypatch):
    """At the end of each block, what was scored is in files, and what was not is of blocks to come."""
    held, plain, pages = [], blockwise._score_sites, []

    def score_sites(graph_module, score, names, own):
        plain(graph_module, score, names, own)
        pages.append(own)
        for site, nodes in sites(graph_module).items():
            mark = annotation(nodes[0])
            observer = observer_of(graph_module, mark.observer, CovarianceObserver)
            if observer.moments is not None:
                scored = mark.curve is not None
                assert scored or site.name not in names
                held.append(own.has(observer.moments.scatter) and (not scored or own.has(mark.curve.spectrum.left)))

    monkeypatch.setattr(blockwise, "_score_sites", score_sites)
    model, batches = make("transformer")
    compressed(model, batches, memory=TINY)
    assert len(held) > 10
    assert all(held)
    assert len(set(map(id, pages))) == 1


def test_statistics_of_gradients_and_widths_are_in_files_too(monkeypatch):
    """In the backward pass: the halves of each layer that was scored, and the curves of widths whose layers were."""
    halves, bases, curves, plain = [], [], [], blockwise._score_widths

    def score_widths(graph_module, score, scored, pages):
        plain(graph_module, score, scored, pages)
        record = graph_record(graph_module)
        seen = {observer.site.name: observer.halves for observer in observers(graph_module)}
        assert {name for name, own in seen.items() if any(own)} == scored
        bases.extend(pages.has(each.basis) for each in observers(graph_module) if each.basis is not None)
        own = [half for name in scored for half in seen[name]]
        halves.extend(pages.has(half.gradients.scatter) and pages.has(half.moments.scatter) for half in own)
        curves.append(sum(curve is not None for curve in record.width_curves))
        for curve in filter(None, record.width_curves):
            large = curve.covariances if curve.left is None else (curve.left, curve.right)
            assert all(map(pages.has, large))

    def observers(graph_module):
        return [module for module in graph_module.modules() if isinstance(module, SensitivityObserver)]

    monkeypatch.setattr(blockwise, "_score_widths", score_widths)
    model, batches = make("transformer")
    compressed(model, small_batches(batches), memory=SMALL, effort="balanced")
    assert len(halves) > 10
    assert len(bases) > 10
    assert all(halves)
    assert all(bases)
    assert curves[0] == 0
    assert curves == sorted(curves)
    assert curves[-1] == 3  # queries, values, and the hidden features of the MLP


def test_solutions_of_a_refit_are_in_files_once_their_layer_is_solved(monkeypatch):
    kept, plain = [], _Solver._give_back

    def give_back(self, node, site):
        plain(self, node, site)
        kept.extend(self.pages.has(part.right) for part in annotation(node).refit or ())

    monkeypatch.setattr(_Solver, "_give_back", give_back)
    model, batches = make("transformer")
    compressed(model, small_batches(batches), memory=SMALL, effort="best")
    assert len(kept) > 10
    assert all(kept)


def test_ample_memory_and_gradients_of_weights_go_as_before(walks, walks_back):
    model, batches = make("mlp")
    compressed(model, batches, memory=AMPLE)
    compressed(model, batches, memory=AMPLE, effort="balanced")
    compressed(model, batches, memory=TINY, **balf_fx.AIR)
    assert walks == walks_back == []


def errors(run):
    found = []
    for memory in (AMPLE, SMALL):
        with pytest.raises(CalibrationError) as error:
            run(memory)
        found.append(error.value)
    return found


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_errors_are_the_same(effort):
    model, batches = make("transformer")
    batches = small_batches(batches)

    def found(given, **options):
        return errors(lambda memory: compressed(model, given, memory=memory, effort=effort, **options))

    for one in found([batches[0], batches[0][..., :7]]):
        assert str(one).startswith("the model cannot run calibration batch 1, which is a float32 tensor of shape")
    one, other = found([batches[0], batches[0] * float("nan")])
    assert isinstance(one, NonFiniteError)
    assert str(one) == str(other)
    one, other = found(batches, weights=lambda batch: torch.ones(len(batch), 5))
    assert "no layer has these positions" in str(one)
    assert str(one) == str(other)


@pytest.mark.parametrize("memory", [AMPLE, 5000])
def test_an_error_of_the_users_loss_stays_what_it_is(memory):
    model, batches = make("mlp")
    with pytest.raises(ValueError, match="no loss") as error:
        compressed(model, small_batches(batches), memory=memory, effort="balanced", loss=raising)
    assert type(error.value) is ValueError


def raising(output, batch):
    raise ValueError(f"no loss of {output.shape} for {batch.shape}")


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_a_function_calls_the_model_once(effort):
    model, batches = make("mlp")
    options = {"effort": effort, "forward": lambda module, batch: module(batch[:1]) + module(batch[1:])}
    assert compressed(model, small_batches(batches), memory=AMPLE, **options)(batches[0]).shape == (48, 10)
    with pytest.raises(CalibrationError, match="more than once"):
        compressed(model, small_batches(batches), memory=5000, **options)


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_a_function_may_change_what_the_model_returns(effort):
    model, batches = make("mlp")
    options = {"effort": effort, "forward": lambda module, batch: {"answer": 2 * module(batch["x"])}}
    given = [{"x": batch} for batch in small_batches(batches)]
    assert_same(*(compressed(model, given, memory=memory, **options) for memory in (AMPLE, 5000)))


@pytest.mark.parametrize("value", [None, torch.ones(2), torch.tensor(float("nan"))], ids=str)
def test_a_loss_that_is_none_gives_the_same_error(value):
    model, batches = make("mlp")
    options = {"effort": "balanced", "loss": lambda output, _: value if value is None else output.sum() * value}
    one, other = errors(lambda memory: compressed(model, small_batches(batches), memory=memory, **options))
    assert str(one).startswith("loss(output, batch)")
    assert str(one) == str(other)


def test_a_layer_that_nothing_has_reached_stays_dense(caplog):
    mixture = Mixture(experts=2)
    nn.init.constant_(mixture.router.bias, 0.0)
    few = [torch.randn(1, 1, 16)]
    with caplog.at_level(logging.WARNING):
        pair = [compressed(mixture.eval(), few, memory=memory, params=0.9) for memory in (AMPLE, TINY)]
    assert_same(*pair)
    assert caplog.text.count("site up stays dense") == 2


def test_outputs_of_trials_are_computed_one_by_one(monkeypatch):
    """Those of all samples, as of a language model, are never held at once."""
    walks, alive, plain = [], [], trials.with_known_outputs

    def watched(outputs, seen):
        for output in outputs:
            seen.append(weakref.ref(output))
            alive.append(sum(each() is not None for each in seen))
            yield output
            del output

    def with_known_outputs(program, calibration, pages):
        module = plain(program, calibration, pages)
        walks.append([])
        module.outputs = watched(module.outputs, walks[-1])
        return module

    monkeypatch.setattr(trials, "with_known_outputs", with_known_outputs)
    model, batches = make("mlp")
    compressed(model, list(torch.cat(batches)[:16].split(4)), memory=TINY)
    assert [len(seen) for seen in walks] == [4] * 3
    assert alive == [1] * 12
