"""Two and four processes find what one finds on all batches, and an error of one is one of all."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import killing, worker
from distributed.worker import EFFORTS, IN_FOUR, batches_for, compiled, described, make_batches, model_for
from filelock import FileLock

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"),
]
ROOT = Path(__file__).parents[2]
CASES = [(2, name) for name in EFFORTS] + [(4, name) for name in IN_FOUR]


HELD = """
import sys
import torch, balf_fx
import torch.distributed as dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
before = sys.getrefcount(dist.group.WORLD)
balf_fx.compile(torch.nn.Sequential(torch.nn.Linear(8, 8)), [torch.randn(4, 8)], flops=0.5, progress=False)
assert "torch.distributed.nn.functional" in sys.modules
sys.exit(sys.getrefcount(dist.group.WORLD) - before)
"""


def run(size, folder):
    """Run the processes, each of which stores what it has found."""
    command = [sys.executable, worker.__file__]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(size):
            log = stack.enter_context((folder / f"{rank}.log").open("w"))
            own = [*command, str(rank), str(size), str(folder)]
            processes.append(subprocess.Popen(own, env=here, stdout=log, stderr=subprocess.STDOUT))
            stack.callback(processes[-1].kill)
        codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0] * size, "\n".join((folder / f"{rank}.log").read_text() for rank in range(size))


def run_once(size, folder):
    """What each process has found; of several workers that run tests, the first runs the processes."""
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            run(size, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    own = tmp_path_factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return {size: run_once(size, folder / f"{size}-processes") for size in (2, 4)}


@pytest.fixture(scope="module")
def alone():
    return {
        name: described(compiled(batches_for(name), model_for(name), **options)) for name, options in EFFORTS.items()
    }


def same_bits(first, second):
    assert first["ranks"] == second["ranks"]
    assert first["tensors"].keys() == second["tensors"].keys()
    assert all(value.equal(second["tensors"][name]) for name, value in first["tensors"].items())


@pytest.mark.parametrize(("size", "name"), CASES)
def test_all_processes_end_with_the_model_of_one(found, alone, size, name):
    first, *others = (each[name] for each in found[size])
    for other in others:
        same_bits(first, other)
    assert first["ranks"] == alone[name]["ranks"]
    assert first["factor"] == alone[name]["factor"]
    assert (first["factor"] != 1) == (name == "temperature")
    torch.testing.assert_close(first["output"], alone[name]["output"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["probe", "latency", "auto"])
def test_what_chance_or_a_clock_decides_is_the_same_in_all(found, name):
    same_bits(*(each[name] for each in found[2]))


def test_statistics_of_several_calibrations_are_those_of_all_batches(found):
    batches = make_batches()
    expected = worker.statistics([batches[:2], batches[2:]], distributed=False)
    for each in found[2]:
        assert each["statistics"]["ranks"] == expected["ranks"]
        assert each["statistics"]["statistics"].keys() == expected["statistics"].keys()
        torch.testing.assert_close(each["statistics"]["statistics"], expected["statistics"], rtol=1e-12, atol=1e-12)


def test_exchanges(found):
    for size, processes in found.items():
        for each in (process["exchanges"] for process in processes):
            assert [value["rank"] for value in each["gathered"]] == list(range(size))
            assert [value["view"].tolist() for value in each["gathered"]] == [[r, r + 1.0] for r in range(size)]
            assert each["once"] == 0
            assert each["merged"] == list(range(size))
            assert [item for item, _ in each["shared"]] == list(range(5))
            assert {owner for _, owner in each["shared"]} == set(range(size))
            assert each["together"][0] == "CalibrationError"
            assert each["alone"] == 1
        last = processes[-1]["exchanges"]["together"]
        assert last == ("CalibrationError", "no")
        assert {process["exchanges"]["together"][1] for process in processes[:-1]} == {f"process {size - 1}: no"}


def test_one_process_may_compress_alone(found, alone):
    for each in found[2]:
        same_bits(each["alone"], alone["fast"])


@pytest.mark.parametrize("size", [2, 4])
def test_a_bad_batch_of_one_process_is_an_error_of_all(found, size):
    own = found[size][1]["bad batch"]
    assert own[0] == "NonFiniteError"
    assert [each["bad batch"] for each in found[size][2:]] == [found[size][0]["bad batch"]] * (size - 2)
    assert found[size][0]["bad batch"] == ("NonFiniteError", f"process 1: {own[1]}")


def test_a_bad_conversion_of_one_process_is_an_error_of_all(found):
    other, own = (each["bad conversion"] for each in found[2])
    assert own[0] == "CalibrationError"
    assert other == ("CalibrationError", f"process 1: {own[1]}")


def test_an_error_of_the_users_function_is_told(found):
    other, own = (each["bad function"] for each in found[2])
    assert own[0] == "ZeroDivisionError"
    assert other == ("ProcessError", f"process 1 has failed with ZeroDivisionError: {own[1]}")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("options", "OptionError", "the same effort"),
        ("models", "ModelError", "conv.weight"),
        ("nothing", "CalibrationError", "no calibration batches"),
    ],
)
def test_what_cannot_be_compressed_together_is_an_error_of_all(found, name, kind, message):
    for each in found[2]:
        assert each[name][0] == kind
        assert message in each[name][1]


def test_mistakes_are_counted_over_all_validation_samples(found):
    expected = worker.certified(make_batches(8))
    first, second = (each["certificate"] for each in found[2])
    assert first == second
    assert (first.samples, [each.share for each in first.tried]) == (
        expected.samples,
        [each.share for each in expected.tried],
    )


@pytest.mark.parametrize("name", worker.RESUMED)
def test_processes_go_on_from_a_checkpoint_to_the_same_model(found, name):
    processes = [each["checkpoint"][name] for each in found[2]]
    assert [each["failed"] for each in processes] == [
        ("CheckpointError", "it fails"),
        ("CheckpointError", "process 0: it fails"),
    ]
    for each, whole in zip(processes, (each[name] for each in found[2]), strict=True):
        for model in each["models"]:
            same_bits(model, whole)
        assert each["files"] == ["model.safetensors"]
        kind, message = each["other batches"]
        assert kind == "CheckpointError"
        assert "calibration batch 0 differs" in message
        kind, message = each["another number"]
        assert kind == "CheckpointError"
        assert "number of processes was 2, and is 1 now" in message


def test_processes_of_which_one_is_killed_again_and_again_end_with_the_same_model(tmp_path):
    command = [sys.executable, Path(killing.__file__), tmp_path / "checkpoint", "4"]
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    found = json.loads(printed[-1])
    assert len(printed) == 1 or torch.__version__ < (2, 9), "only torch 2.8 prints the ranks that are connected"
    assert found["resumed"] >= 4
    assert found["expected"][0] == found["expected"][1]
    assert found["results"]
    assert all(each == found["expected"] for each in found["results"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_wrapped_models_are_compressed_as_the_model_inside(found, alone, kind):
    first, second = (each["wrapped"][kind] for each in found[2])
    same_bits(first, second)
    assert first["ranks"] == alone["fast"]["ranks"]
    torch.testing.assert_close(first["output"], alone["fast"]["output"], rtol=1e-4, atol=1e-5)
    assert all(each["wrapped"]["kinds"] == {"DTensor"} for each in found[2]), "the model is not changed"


def test_a_process_that_ends_is_an_error_of_the_others_within_the_time_limit(found):
    (kind, message), seconds = found[2][0]["dead"]
    assert kind == "ProcessError"
    assert "another process has ended" in message
    assert seconds < worker.SECONDS


def test_nothing_holds_the_group_once_it_is_destroyed(tmp_path):
    """What export imports would hold it: then its threads end with the process, and may abort it."""
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HELD]
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
