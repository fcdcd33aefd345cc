"""A run that is killed goes on where it stopped, to the same model, bit for bit; another run is refused."""

import contextlib
import copy
import fnmatch
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import balf_fx
from balf_fx.calibration.observers import SensitivityObserver
from balf_fx.checkpoint import journal
from balf_fx.checkpoint.folder import Folder
from balf_fx.engine import compress
from balf_fx.engine.resuming import in_words
from balf_fx.errors import CheckpointError, OptionError

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_with_the_same_model(tmp_path):
    """Really killed, at random moments: after statistics, between trials, between layers, while a file is written."""
    command = [sys.executable, TESTS / "killed.py", tmp_path / "checkpoint", "20"]
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == 20
    assert found["resumed"] >= 10
    assert found["results"]
    assert set(found["results"]) == {found["expected"]}


class Killed(BaseException):
    """Ends a run as a signal would."""


@pytest.fixture
def killed_after(monkeypatch):
    """Kills a run once a stage is written for the n-th time; the statistics of each batch are written."""
    monkeypatch.setattr(journal, "EVERY", 0.0)
    monkeypatch.setattr(journal, "_SHARE", float("inf"))
    put = Folder.put

    @contextlib.contextmanager
    def context(pattern, times=1):
        written = []

        def counted(self, stage, *args):
            put(self, stage, *args)
            written.extend([stage] if fnmatch.fnmatch(stage, pattern) else [])
            if len(written) == times:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(Folder, "put", counted)
            with contextlib.suppress(Killed):
                yield
        assert len(written) == times

    return context


def weights(batch):
    return torch.linspace(0.5, 1.5, len(batch))


@pytest.fixture
def model():
    """Compressed to 0.4, two of its layers are refitted."""
    layers = [nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(24, 8)).eval()


@pytest.fixture
def batches():
    return list(torch.randn(4, 8, 12))


def assert_same(one, other):
    assert balf_fx.plan(one) == balf_fx.plan(other)
    held, expected = one.state_dict(), other.state_dict()
    assert held.keys() == expected.keys()
    assert all(
        torch.equal(value, expected[name]) and value.stride() == expected[name].stride() for name, value in held.items()
    )


WAYS = {
    "best": ({"flops": 0.5}, [("calibration", 2), ("trial *", 2), ("part 0, layer *", 1)]),
    "blocks": ({"flops": 0.4, "effort": "fast", "memory": 3000}, [("calibration, block *", 2), ("trial *", 1)]),
    "blocks with gradients": (
        {"flops": 0.4, "memory": 3000},
        [("calibration, block *", 2), ("calibration with gradients, block *", 2), ("trial *", 1)],
    ),
    "up": ({"flops": 0.4, "refit": "up", "weights": weights}, [("calibration batches", 1), ("part 0, layer *", 1)]),
    "fast": ({"flops": 0.4, "effort": "fast"}, [("calibration batches", 3), ("trial *", 1)]),
    "air": ({"flops": 0.4, "factors": "air"}, [("calibration", 3), ("layer *", 2)]),
    "ranks": ({"allocation": {"0": 3, "2": 4, "4": 4}}, [("allocation", 1)]),
    "free": ({}, [("memory", 1)]),
    "module": ({"flops": 0.4, "result": "module"}, [("part 0, layer *", 1)]),
}
"""Options, and the stages at which runs are killed one after another."""


@pytest.mark.parametrize("way", WAYS)
def test_each_kind_of_run_goes_on_to_the_same_model(way, model, batches, tmp_path, killed_after):
    given, stops = WAYS[way]
    options = {"progress": False, **given}
    expected = balf_fx.compile(model, iter(batches), **options)
    for stop in stops:
        with killed_after(*stop):
            balf_fx.compile(model, iter(batches), checkpoint=tmp_path, **options)
    small = balf_fx.compile(model, iter(batches), checkpoint=tmp_path, **options)
    assert_same(small, expected)
    again = balf_fx.compile(model, iter(batches), checkpoint=tmp_path, **options)
    assert_same(again, expected)
    assert type(again).__name__ == type(small).__name__
    assert again.code == small.code if given.get("result") is None else type(again) is nn.Sequential
    assert torch.equal(again(batches[0]), expected(batches[0]))


def test_batches_that_were_seen_are_not_run_again(model, batches, tmp_path, killed_after, monkeypatch):
    with killed_after("calibration", 2):
        balf_fx.compile(model, batches, flops=0.4, checkpoint=tmp_path, progress=False)
    run, indices = compress._run, []

    def counted(program, piece, calibration, index, generator):
        indices.append(index)
        return run(program, piece, calibration, index, generator)

    monkeypatch.setattr(compress, "_run", counted)
    balf_fx.compile(model, batches, flops=0.4, checkpoint=tmp_path, progress=False)
    assert indices == [2, 3]


def test_blocks_that_were_finished_are_not_observed_again(model, batches, tmp_path, killed_after, monkeypatch):
    options = {"flops": 0.4, "effort": "balanced", "memory": 3000, "checkpoint": tmp_path, "progress": False}
    with killed_after("calibration with gradients, block *", 2):
        balf_fx.compile(model, batches, **options)
    plain, seen = SensitivityObserver.take, []

    def take(self, *args):
        seen.append(self.site.name)
        plain(self, *args)

    monkeypatch.setattr(SensitivityObserver, "take", take)
    balf_fx.compile(model, batches, **options)
    assert set(seen) == {"0", "2"}  # of "0", "2", "4" and "6", the last two were finished


def test_a_limit_of_mistakes_goes_on_at_the_budget_it_had_reached(model, batches, tmp_path, killed_after):
    pytest.importorskip("scipy")
    validation = list(torch.randn(4, 64, 12))
    options = {"disagreement": 0.05, "effort": "fast", "progress": False}
    expected = balf_fx.compile(model, batches, validation=validation, **options)
    for stop in ("calibration", "flops 0.95, allocation"):
        with killed_after(stop):
            balf_fx.compile(model, batches, validation=iter(validation), checkpoint=tmp_path, **options)
    small = balf_fx.compile(model, batches, validation=iter(validation), checkpoint=tmp_path, **options)
    assert_same(small, expected)
    assert_same(balf_fx.compile(model, batches, validation=validation, checkpoint=tmp_path, **options), expected)
    with pytest.raises(CheckpointError, match="validation batch 1 differs"):
        balf_fx.compile(model, batches, validation=[validation[0]] * 4, checkpoint=tmp_path, **options)


@pytest.mark.parametrize("result", ["graph", "module"])
def test_a_conversion_goes_on(model, batches, tmp_path, killed_after, result):
    prepared = balf_fx.prepare(model, batches[0], factors="sensitivity", result=result)
    balf_fx.calibrate(prepared, batches, progress=False)
    options = {"flops": 0.4, "batches": batches, "result": result, "model": model, "progress": False}
    expected = balf_fx.convert(prepared, **options)
    with killed_after("trial *"):
        balf_fx.convert(prepared, checkpoint=tmp_path, **options)
    assert_same(balf_fx.convert(prepared, checkpoint=tmp_path, **options), expected)
    assert_same(balf_fx.convert(prepared, checkpoint=tmp_path, **options), expected)
    balf_fx.calibrate(prepared, batches[:1], progress=False)
    with pytest.raises(CheckpointError, match="the model's statistics differs"):
        balf_fx.convert(prepared, checkpoint=tmp_path, **options)


def test_another_run_is_refused_with_the_difference(model, batches, tmp_path, killed_after):
    options = {"flops": 0.4, "effort": "balanced", "checkpoint": tmp_path, "progress": False}
    with killed_after("trial *"):
        balf_fx.compile(model, batches, **options)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refused(message, model=model, batches=batches, **changed):
        with pytest.raises(CheckpointError, match=message):
            balf_fx.compile(model, batches, **{**options, **changed})

    def check_everything():
        refused("option flops was 0.4, and is 0.5 now", flops=0.5)
        refused("option seed was 0, and is 3 now", seed=3)
        refused("option memory was 0.5, and is '1G' now", memory="1G")
        refused(r"option weights was None, and is .*\.weights now", weights=weights)
        refused("option forward was .* now", forward=lambda module, batch: module(batch))
        refused("calibration batch 1 differs", batches=[batches[0], batches[2], batches[1], batches[3]])
        refused("there were 4 calibration batches, and now there are 3", batches=batches[:3])
        refused("there were 4 calibration batches, and now there are more", batches=[*batches, batches[0]])
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[4].bias += 1
        refused("the model's 4.bias differs", model=other)
        refused("the model's graph differs", model=nn.Sequential(model[0], nn.GELU(), *model[2:]).eval())

    check_everything()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    balf_fx.compile(model, batches, **options)
    check_everything()  # once it is complete, too


def test_another_version_is_refused(model, batches, tmp_path):
    options = {"effort": "fast", "flops": 0.6, "checkpoint": tmp_path, "progress": False}
    balf_fx.compile(model, batches, **options)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(torch.__version__, "1.0"))
    with pytest.raises(CheckpointError, match=r"version torch was 1\.0, and is"):
        balf_fx.compile(model, batches, **options)


def test_a_full_disk_leaves_what_was_written(model, batches, tmp_path, monkeypatch):
    options = {"flops": 0.4, "checkpoint": tmp_path, "progress": False}
    expected = balf_fx.compile(model, batches, flops=0.4, progress=False)
    monkeypatch.setattr(journal, "EVERY", 0.0)
    monkeypatch.setattr(journal, "_SHARE", float("inf"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # manifest and digests fit, statistics do not
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written .* make room and call again"):
            balf_fx.compile(model, batches, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "manifest.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(balf_fx.compile(model, batches, **options), expected)


def test_a_complete_folder_holds_the_result_alone(model, batches, tmp_path, monkeypatch):
    options = {"flops": 0.4, "checkpoint": tmp_path, "progress": False}
    small = balf_fx.compile(model, batches, **options)
    assert_same(balf_fx.load(tmp_path / "model.safetensors", model), small)
    stages = list((tmp_path / "stages").iterdir())
    assert sum(path.stat().st_size for path in stages) < 20_000
    monkeypatch.setattr("balf_fx.api.run", pytest.fail)
    assert_same(balf_fx.compile(model, batches, **options), small)


def test_memory_stays_what_it_was_where_less_is_free_now(model, batches, tmp_path, killed_after, monkeypatch):
    monkeypatch.setattr("balf_fx.engine.memory.free_memory", lambda: 1 << 40)
    options = {"flops": 0.4, "progress": False}
    expected = balf_fx.compile(model, batches, **options)
    with killed_after("calibration", 2):
        balf_fx.compile(model, batches, checkpoint=tmp_path, **options)
    monkeypatch.setattr("balf_fx.engine.memory.free_memory", lambda: 4000)
    assert_same(balf_fx.compile(model, batches, checkpoint=tmp_path, **options), expected)


def test_quantized_layers_leave_no_finished_model(batches, tmp_path, caplog):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "0")
    options = {"flops": 0.8, "effort": "fast", "progress": False}
    expected = balf_fx.compile(model, batches, **options)
    for _ in range(2):
        small = balf_fx.compile(model, batches, checkpoint=tmp_path, **options)
        assert torch.equal(small(batches[0]), expected(batches[0]))
    assert "the checkpoint has no finished model" in caplog.text


def test_another_loss_of_the_same_name_and_other_arrays_are_other_runs(model, batches, tmp_path):
    def scaled(factor):
        return lambda output, batch: factor * output.square().mean()

    def forward(module, batch):
        return module(torch.from_numpy(batch))

    arrays = [batch.numpy() for batch in batches]
    options = {"flops": 0.4, "effort": "balanced", "checkpoint": tmp_path, "forward": forward, "progress": False}
    balf_fx.compile(model, arrays, loss=scaled(1), **options)
    balf_fx.compile(model, arrays, loss=scaled(1), **options)
    with pytest.raises(CheckpointError, match=r"option loss was .*lambda>, and is .*lambda> now"):
        balf_fx.compile(model, arrays, loss=scaled(9), **options)
    with pytest.raises(CheckpointError, match="calibration batch 0 differs"):
        balf_fx.compile(model, [array + 1 for array in arrays], loss=scaled(1), **options)


def test_equal_options_have_equal_words():
    assert in_words(["a"]) == in_words(("a",)) != in_words(["b"])
    assert in_words({"a": 1, "b": 2}) == in_words({"b": 2, "a": 1}) != in_words({"a": 1, "b": None})
    assert in_words(weights).endswith("test_resuming.weights")
    assert in_words("best") != in_words(None)


def test_a_folder_is_a_path(model, batches):
    with pytest.raises(OptionError, match="checkpoint must be the path of a folder, not 3"):
        balf_fx.compile(model, batches, flops=0.4, checkpoint=3)
