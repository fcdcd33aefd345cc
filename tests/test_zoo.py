"""A sample of what `benchmarks/zoo.py` sweeps: every kind of architecture keeps what balf_fx promises."""

import json

import pytest
import torch
from torch import nn

import balf_fx

TORCHVISION = ("shufflenet_v2_x0_5",)
TIMM = ("test_byobnet", "test_coatnet", "test_efficientnet", "test_mambaout", "test_nfnet", "test_vit_relpos")
TRANSFORMERS = ("clip_vision", "convnext", "t5_encoder", "whisper_encoder")
SAMPLE = [
    (source, name)
    for source, names in {"torchvision": TORCHVISION, "timm": TIMM, "transformers": TRANSFORMERS}.items()
    for name in names
]


@pytest.fixture
def zoo(load_benchmark):
    return load_benchmark("zoo")


@pytest.fixture
def checks(load_benchmark):
    return load_benchmark("zoo_checks")


@pytest.fixture
def subjects(load_benchmark):
    return load_benchmark("zoo_subject")


def assert_keeps_its_promises(checks, row):
    assert row.problems == ()
    assert row.relative_deviation <= checks.TOLERANCE or row.exact_deviation <= checks.EXACT_TOLERANCE
    assert row.flops_kept <= (row.minimum or checks.BUDGET)
    assert row.flops_in_sites > 0
    assert row.captured in ("symbolic_trace", "export")


@pytest.mark.slow
@pytest.mark.parametrize(("source", "name"), SAMPLE)
def test_an_architecture_is_captured_and_compressed(zoo, checks, source, name):
    pytest.importorskip(source, reason=f"{source} is not installed")
    assert_keeps_its_promises(checks, zoo.examine(zoo.Case(source, name)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("DenseNet", {"growth_rate": 8, "block_config": (2, 2), "num_init_features": 16}),
        (
            "SwinTransformer",
            {
                "patch_size": [4, 4],
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [2, 4],
                "window_size": [4, 4],
            },
        ),
        (
            "VisionTransformer",
            {
                "image_size": 32,
                "patch_size": 8,
                "num_layers": 2,
                "num_heads": 4,
                "hidden_dim": 64,
                "mlp_dim": 128,
            },
        ),
    ],
)
def test_a_small_relative_of_a_large_architecture(zoo, checks, subjects, architecture, options):
    models = pytest.importorskip("torchvision").models
    subject = subjects.Subject(
        getattr(models, architecture)(**options).eval(), lambda samples: torch.randn(samples, 3, 32, 32)
    )
    subjects.randomise(subject)
    examination = checks.Examination()
    checks.examine_subject(subject, examination)
    assert_keeps_its_promises(checks, examination.row(zoo.Case("torchvision", architecture), seconds=0))


def test_failed_checks_are_problems_and_end_nothing(zoo, checks, subjects, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    nn.init.constant_(model[1].weight, torch.inf)
    monkeypatch.setattr(checks.balf_fx, "prepare", lambda model, _, **options: nn.init.zeros_(model[0].weight))
    examination = checks.Examination()
    checks.examine_subject(subjects.Subject(model, lambda samples: torch.randn(samples, 8)), examination)
    original, compiled, untouched = examination.row(zoo.Case("torchvision", "broken"), seconds=0).problems
    assert original == "original: CheckError: outputs are not finite"
    assert compiled.startswith("compile: ")
    assert untouched.startswith("untouched: CheckError: the original's parameters")


class Amplifier(nn.Module):
    """Rounding errors of its BatchNorm grow a millionfold."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x):
        y = self.norm(self.conv(x)).mean((2, 3))
        return torch.sin(1e5 * y)


def test_rounding_is_told_from_error(checks, subjects, monkeypatch):
    subject = subjects.Subject(Amplifier().eval(), lambda samples: torch.randn(samples, 3, 8, 8))
    subjects.randomise(subject)
    dense = balf_fx.compile(subject.model, subject.batch(2), flops=1.0, progress=False)
    found = checks._deviations(subject, dense)
    assert found["relative_deviation"] > checks.TOLERANCE
    assert found["exact_deviation"] <= checks.EXACT_TOLERANCE
    monkeypatch.setattr(checks.balf_fx, "prepare", lambda model, _: nn.Sequential(model, nn.Softsign()))
    with pytest.raises(checks.CheckError, match="and in float64 by"):
        checks._deviations(subject, dense)


def test_what_cannot_be_built_is_a_problem(zoo):
    pytest.importorskip("torchvision")
    (problem,) = zoo.examine(zoo.Case("torchvision", "no_such_model")).problems
    assert problem.startswith("build: ValueError: Unknown model")


@pytest.mark.slow
def test_a_worker_outlives_its_process(zoo):
    worker = zoo.Worker(time_limit=0.01)
    case = zoo.Case("transformers", "bert")
    assert "took more than 0.01 s" in worker.examine(case, compiled=False).problems[0]
    worker._start()
    worker._process.kill()
    worker._process.join()
    assert "crash" in worker.examine(case, compiled=False).problems[0]
    worker.stop()


def test_statistics_are_settled_and_modes_kept(subjects):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    batch = torch.randn(8, 3, 5, 5)
    subjects.settle_batchnorm(model, batch)
    normalised = model(batch).detach()
    assert normalised.mean().abs() < 1e-5
    assert normalised.std() == pytest.approx(1, abs=0.01)
    assert model[1].momentum == 0.1
    assert not model[1].training


def test_deviation_is_relative_to_the_largest_output(checks):
    wanted = [torch.tensor([[0.0, 4.0]]), torch.tensor([[100.0]])]
    got = [torch.tensor([[1.0, 4.0]]), torch.tensor([[102.0]])]
    assert checks.deviation(wanted, got) == (2.0, 0.25)
    with pytest.raises(checks.CheckError, match="shape"):
        checks.deviation(wanted, [torch.zeros(2, 1), torch.zeros(1, 1)])
    for number in (float("nan"), float("inf")):
        with pytest.raises(checks.CheckError, match="NaN or infinite"):
            checks.deviation([torch.tensor([number])], [torch.tensor([number])])


def test_results_replace_only_what_was_run_again(zoo, tmp_path):
    path = tmp_path / "results" / "zoo.json"
    first = zoo.Results(path)
    for name in ("b", "a"):
        first.add(zoo.Row("torchvision", name, seconds=1))
    first.add(zoo.Skip("torchvision", "c", "too large: 200 M parameters"))
    again = zoo.Results(path)
    assert (again.known("torchvision"), again.known("timm")) == ({"a", "b", "c"}, set())
    again.add(zoo.Row("torchvision", "b", seconds=2))
    again.add(zoo.Row("torchvision", "c", seconds=2))
    data = json.loads(path.read_text())
    assert [(row["name"], row["seconds"]) for row in data["results"]] == [("a", 1), ("b", 2), ("c", 2)]
    assert data["skipped"] == []
    assert data["versions"].keys() == {"torchvision"}
    assert data["torch"] == data["continues"]["torch"] == torch.__version__


def test_results_say_nothing_of_a_run_of_which_no_row_is_left(zoo, tmp_path):
    path = tmp_path / "zoo.json"
    for seconds in (1, 2):
        zoo.Results(path).add(zoo.Row("torchvision", "a", seconds=seconds))
    assert "continues" not in json.loads(path.read_text())


def test_selection_covers_every_family(zoo):
    timm = pytest.importorskip("timm")
    (case,) = zoo.cases("timm", ["repghostnet_*"])
    assert case == zoo.Case("timm", "repghostnet_050")
    assert case.name in timm.list_models(module="repghost")
    assert list(zoo.cases("timm", ["repghostnet_*"], {"repghostnet_050"})) == []  # nor a larger one of the family
    assert list(zoo.cases("torchvision", ["resnet18"], {"resnet18"})) == []
    (too_large,) = zoo.cases("torchvision", ["vit_h_14"])
    assert too_large.reason == "too large: 632 M parameters"
    assert [entry.reason.partition(":")[0] for entry in zoo.cases("torchvision", ["raft_small"])] == ["optical flow"]


def test_table_and_summary(zoo):
    rows = [zoo.Row("timm", "one", flops_kept=0.6), zoo.Row("timm", "two", problems=("compile: CaptureError: no",))]
    skips = [zoo.Skip("timm", "three", "too large: 200 M parameters")]
    assert "CaptureError" in zoo.table(rows)
    assert zoo.summary(rows, skips).splitlines()[2].split() == ["timm", "1", "1", "1"]
    assert "timm: 1 left out: too large" in zoo.summary(rows, skips)
