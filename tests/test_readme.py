import re
from pathlib import Path

import pytest
import torch

from balf_fx.backend import balf

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDES = [path for name in (".", "passes", "benchmarks") if (path := ROOT / name / "README.md").exists()]
SNIPPETS = [
    pytest.param(path, snippet, id=f"{path.relative_to(ROOT).parent}: {snippet.strip().splitlines()[-1][:40]}")
    for path in GUIDES
    for snippet in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
]
COMMANDS = re.findall(r"```console\n(.*?)\n```", README, re.DOTALL)


@pytest.fixture(autouse=True)
def _backend():
    """What installing balf_fx does for torch.compile, where the tests run from a checkout that is not installed."""
    torch.compiler.reset()
    if "balf" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(balf, name="balf")
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("path", "snippet"), SNIPPETS)
def test_every_snippet_runs(path, snippet, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(snippet, str(path), "exec"), {"__name__": "readme"})


def test_there_are_two_commands_of_one_line_each():
    assert len(COMMANDS) == 2
    assert not any("\n" in command for command in COMMANDS)


def test_ci_runs_exactly_the_test_command():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == COMMANDS[-1]
