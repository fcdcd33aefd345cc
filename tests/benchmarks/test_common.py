"""A results file says how it was made, and names no machine, user or folder."""

import json
import subprocess

import click
import pytest
import torch
from click.testing import CliRunner
from torch import nn


@pytest.fixture
def common(load_benchmark):
    return load_benchmark("common")


def git(folder, *arguments):
    name = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(["git", *name, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in ("code.py", "benchmarks/results/rows.json"):
        (tmp_path / name).write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "suffix"),
    [(None, ""), ("benchmarks/results/rows.json", ""), ("untracked.py", ""), ("code.py", "-dirty")],
)
def test_the_commit_tells_whether_the_code_differs(common, repository, changed, suffix):
    if changed is not None:
        (repository / changed).write_text("2")
    assert common.commit(repository) == git(repository, "rev-parse", "HEAD") + suffix


def test_there_is_no_commit_outside_of_a_repository(common, repository, tmp_path_factory):
    assert common.commit(tmp_path_factory.mktemp("elsewhere")) is None
    assert common.commit(repository / "benchmarks") is None


@pytest.fixture
def command(common):
    @click.command()
    @click.option("--flops", multiple=True, type=float)
    @click.option("--model", default="resnet20")
    @click.option("--resume", is_flag=True)
    @click.option("--data", type=click.Path(path_type=common.Path))
    @click.option("--json", "output", type=click.Path(path_type=common.Path))
    def main(flops, model, resume, data, output):
        earlier = json.loads(output.read_text()) if resume else None
        common.write_json(output, {"results": [model]}, earlier)

    def run(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    return run


def test_a_results_file_tells_the_command_and_all_options(common, command, tmp_path):
    output = tmp_path / "rows.json"
    command("--flops", 0.9, "--flops", 0.5, "--data", tmp_path, "--json", output)
    found = json.loads(output.read_text())
    assert found["command"] == "python benchmarks/test_common.py --flops 0.9 --flops 0.5"
    assert found["options"] == {"flops": [0.9, 0.5], "model": "resnet20", "resume": False}
    assert found["torch"] == torch.__version__
    assert found["commit"] == common.COMMIT
    assert found["results"] == ["resnet20"]
    assert str(tmp_path) not in output.read_text()


def test_a_continued_file_keeps_the_earlier_header(command, tmp_path):
    output = tmp_path / "rows.json"
    command("--model", "a b", "--json", output)
    first = json.loads(output.read_text())
    command("--resume", "--json", output)
    second = json.loads(output.read_text())
    del first["results"]
    assert second["continues"] == first
    assert first["command"] == "python benchmarks/test_common.py --model 'a b'"
    assert second["command"] == "python benchmarks/test_common.py --resume"


def test_without_a_command_there_are_no_options(common, tmp_path):
    common.write_json(tmp_path / "rows.json", {})
    found = json.loads((tmp_path / "rows.json").read_text())
    assert (found["command"], found["options"]) == (None, {})


def test_flops_are_counted_with_positional_and_keyword_arguments(common):
    model, x = nn.Linear(4, 6, bias=False).eval(), torch.randn(5, 4)
    assert common.count_flops(model, x) == common.count_flops(model, {"input": x}) == 2 * 5 * 4 * 6


def test_fused_attention_is_counted(common):
    attention = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    projections, products, feedforward = 4 * 16 * 16, 2 * 5 * 16, 2 * 16 * 32
    assert common.count_flops(attention, torch.randn(3, 5, 16)) == 2 * 3 * 5 * (projections + products + feedforward)
